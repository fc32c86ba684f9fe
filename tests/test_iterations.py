"""Which pairs are measured, under everything a training loop may do."""

import copy
import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaStatus

FIELDS = ("alpha", "step_length", "slope_start", "slope_end", "slope_variance_start", "slope_variance_end")


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_batches(count, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def wrap(model, loss_fn, kind="sgd", **options):
    base = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.2),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=0.01),
    }[kind]()
    return AlphaGuided(base, model, loss_fn, **{"variance": "exact", **options})


def plain_run(kind="sgd", batches=None, **options):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind, **options)
    for x, y in batches or make_batches(6):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    return guided


def check_same(a, b, fields=FIELDS, tolerance=1e-9):
    assert len(a) > 0
    for left, right in zip(a, b, strict=True):
        for name in fields:
            assert getattr(left, name) == pytest.approx(getattr(right, name), rel=tolerance), name


KINDS = ["sgd", "momentum", "adam"]


# ------------------------------------------------------------------ every


def test_every_third_pair_has_the_values_it_has_when_every_pair_is_measured():
    dense, sparse = plain_run("adam", make_batches(9)), plain_run("adam", make_batches(9), every=3)
    assert sparse.alpha_history.iterations.tolist() == [0, 3, 6]
    check_same(sparse.alpha_history, [dense.alpha_history[n] for n in (0, 3, 6)])


def test_every_may_be_a_function_asked_once_per_iteration_before_its_forward_pass():
    asked = []

    def question(n):
        asked.append(n)
        return n in (1, 2)

    guided = plain_run(every=question)
    assert guided.alpha_history.iterations.tolist() == [1, 2]
    assert asked == list(range(7))


def test_iterations_in_no_pair_run_without_hooks():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, every=4)
    hooked = []
    for x, y in make_batches(6):
        guided.zero_grad()
        hooked.append(
            bool(model[0]._forward_hooks or loss_fn._forward_hooks or model[0].weight._post_accumulate_grad_hooks)
        )
        loss_fn(model(x), y).backward()
        guided.step()
    assert hooked == [True, True, False, False, True, True]


def test_there_are_at_most_k_minus_one_measurements_after_k_steps():
    guided = plain_run()
    assert guided.iteration == 6
    assert guided.alpha_history.iterations.tolist() == [0, 1, 2, 3, 4]
    assert guided.alpha_history.dropped == {}


# ------------------------------------------------------------------ loops of all kinds


@pytest.mark.compatibility("Loops", "evaluation in between, inference_mode, gradients of inputs")
@pytest.mark.parametrize("kind", KINDS)
def test_other_passes_do_not_disturb(kind):
    reference = plain_run(kind)
    model, loss_fn, other = make_model(), nn.CrossEntropyLoss(), make_model(9)
    guided = wrap(model, loss_fn, kind)
    for x, y in make_batches(6):
        guided.zero_grad()
        loss = loss_fn(model(x), y)
        with torch.no_grad():
            loss_fn(model(x[:5]), y[:5])  # evaluation
        with torch.inference_mode():
            loss_fn(model(x[:5]), y[:5])
        loss_fn(model(x * 2), y)  # a forward pass that nobody differentiates
        loss_fn(other(x), y).backward()  # another model on the same loss function
        torch.autograd.grad(loss_fn(model(x.clone().requires_grad_()), y), model[2].bias)
        loss.backward()
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history)


@pytest.mark.compatibility("Loops", "gradient accumulation")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("backend", ["layerwise", "cached"])  # backpack has the gradient only after the last
def test_accumulation_over_micro_batches_measures_the_whole_batch(kind, parts, backend):
    reference = plain_run(kind)
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind, backend=backend)
    for x, y in make_batches(6):
        guided.zero_grad()
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss_fn(model(xs), ys) / parts).backward()
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history, (*FIELDS, "loss_start", "loss_variance_start"))
    assert {m.samples_start for m in guided.alpha_history} == {12}


def test_accumulation_in_micro_batches_of_different_size():
    reference = plain_run("adam")
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        for part in (slice(0, 7), slice(7, 12)):
            (loss_fn(model(x[part]), y[part]) * (len(y[part]) / 12)).backward()
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history, (*FIELDS, "loss_start", "loss_variance_start"))


def test_plain_sgd_under_accumulation_goes_from_the_fast_path_to_one_that_can():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    assert guided.backend == "backpack"
    for x, y in make_batches(6):
        guided.zero_grad()
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            (loss_fn(model(xs), ys) / 2).backward()
        guided.step()
    assert guided.backend == "layerwise"
    assert "several backward passes" in repr(guided)
    reference = plain_run()
    assert [m.information for m in guided.alpha_history] == ["slopes", "full", "full", "full", "full"]
    check_same(guided.alpha_history[1:], reference.alpha_history[1:])
    assert guided.alpha_history[0].slope_end == pytest.approx(reference.alpha_history[0].slope_end)


@pytest.mark.compatibility("Loops", "clip_grad_norm_, clip_grad_value_")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_slopes_are_those_of_the_loss_also_under_clipping(kind, clip):
    def run(backend):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = wrap(model, loss_fn, kind, backend=backend)
        true = []
        for x, y in make_batches(7):
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            before = [p.detach().clone() for p in model.parameters()]
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
            guided.step()
            d = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).detach()
            true.append((float(d.norm()), float(gradient @ d / d.norm())))
        return guided, true

    for backend in ("auto", "layerwise", "cached", "gradients"):
        guided, true = run(backend)
        # Clipping by norm is one factor, which is found; clipping by value costs the first pair.
        assert guided.alpha_history.dropped == ({} if clip == "norm" else {"gradients_modified": 1})
        assert guided.alpha_history.iterations.tolist() == [0, 1, 2, 3, 4, 5][clip == "value" :]
        assert guided._session.pairing.habits.keep_copies == (clip == "value")
        for m in guided.alpha_history:
            assert m.step_length == pytest.approx(true[m.iteration][0], rel=1e-6)
            assert m.slope_start == pytest.approx(true[m.iteration][1], rel=1e-6)
        if backend != "gradients":
            assert {m.information for m in guided.alpha_history} == {"full"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.125, 65536.0])
def test_a_loss_scale_is_divided_out(kind, scale):
    reference = plain_run(kind)
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    for x, y in make_batches(7):
        guided.zero_grad()
        (loss_fn(model(x), y) * scale).backward()
        for p in model.parameters():
            p.grad.div_(scale)
        guided.step()
    # Scaling and unscaling by a power of two loses nothing, so the run is the same.
    check_same(list(guided.alpha_history)[:5], list(reference.alpha_history), tolerance=1e-8)


@pytest.mark.compatibility("Precision", "steps that a GradScaler skips")
@pytest.mark.parametrize("clear", ["wrapper", "model", "in place"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_step_skipped_by_a_scaler_keeps_the_iteration_and_drops_the_pairs_that_touch_it(kind, clear):
    model, loss_fn = make_model().float(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k, (x, y) in enumerate(make_batches(9)):
        if clear == "wrapper":
            guided.zero_grad()
        else:
            model.zero_grad(set_to_none=clear == "model")
        scaler.scale(loss_fn(model(x.float() * (math.inf if k == 4 else 1.0)), y)).backward()
        scaler.step(guided)
        scaler.update()
    assert guided.iteration == 8
    assert guided.alpha_history.dropped == {"step_skipped": 2}
    assert guided.alpha_history.iterations.tolist() == [0, 1, 2, 5, 6]


@pytest.mark.compatibility("Precision", "GradScaler: bit for bit the bare loop")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_scaler_changes_nothing(kind, clip):
    reference = plain_run(kind, make_batches(7))
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    for x, y in make_batches(7):
        guided.zero_grad()
        scaler.scale(loss_fn(model(x), y)).backward()
        if clip:
            scaler.unscale_(guided)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # never clips, but multiplies by one
        scaler.step(guided)
        scaler.update()
    assert guided.alpha_history.dropped == {}
    check_same(guided.alpha_history, reference.alpha_history, tolerance=1e-7)


def test_gradients_altered_through_data_are_noticed():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    reference = plain_run("adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        for p in model.parameters():
            p.grad.data.mul_(0.5)  # Adam does not care, so the steps are the same
        guided.step()
    assert guided.alpha_history.dropped == {}
    check_same(guided.alpha_history, reference.alpha_history, ("slope_start", "slope_end"), tolerance=1e-5)


@pytest.mark.compatibility("Loops", "GANs: two networks, two optimizers")
def test_two_networks_trained_against_each_other():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    loss_fn = nn.BCEWithLogitsLoss()
    both = nn.ModuleList([generator, critic])
    d = AlphaGuided(torch.optim.SGD(critic.parameters(), lr=0.1), both, loss_fn, variance="exact")
    g = AlphaGuided(torch.optim.Adam(generator.parameters(), lr=0.01), both, loss_fn, variance="exact")
    real, fake = torch.ones(12, 1, dtype=torch.float64), torch.zeros(12, 1, dtype=torch.float64)
    for _ in range(5):
        noise = torch.randn(12, 4, dtype=torch.float64)
        d.zero_grad()
        (loss_fn(critic(torch.randn(12, 6, dtype=torch.float64)), real)
         + loss_fn(critic(generator(noise).detach()), fake)).backward()  # fmt: skip
        d.step()
        g.zero_grad()
        loss_fn(critic(generator(noise)), real).backward()  # also reaches the critic, whose next step clears it
        g.step()
    for guided in (d, g):
        assert [m.information for m in guided.alpha_history] == ["full"] * 4
        assert guided.alpha_history.dropped == {}


@pytest.mark.compatibility("Loops", "parameters edited between steps: that pair is dropped")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("how", ["no_grad", "data", "load_state_dict"])
def test_parameters_edited_between_steps_drop_the_pair(kind, how):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    for k, (x, y) in enumerate(make_batches(6)):
        if k == 3:
            if how == "no_grad":
                with torch.no_grad():
                    model[0].weight.add_(0.01)
            elif how == "data":
                model[0].weight.data.mul_(1.01)
            else:
                model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.alpha_history.iterations.tolist() == [0, 1, 3, 4]
    assert guided.alpha_history.dropped == {"parameters_changed": 1}


@pytest.mark.compatibility("Loops", "weights swapped for an evaluation (EMA)")
def test_weights_swapped_and_swapped_back_drop_nothing():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    for x, y in make_batches(5):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        own = copy.deepcopy(model.state_dict())
        model.load_state_dict({name: value * 0.0 for name, value in own.items()})
        with torch.no_grad():
            loss_fn(model(x), y)
        model.load_state_dict(own)
    assert len(guided.alpha_history) == 4


@pytest.mark.parametrize("edit", ["flip", "negate"])
def test_edits_that_keep_every_norm_are_noticed_too(edit):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    for k, (x, y) in enumerate(make_batches(5)):
        if k == 2:
            with torch.no_grad():
                weight = model[2].weight
                weight.copy_(weight.flip(0) if edit == "flip" else -weight)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.alpha_history.iterations.tolist() == [0, 2, 3]


def test_foreign_weights_during_the_pass_drop_both_pairs():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided, other = wrap(model, loss_fn), make_model(5).state_dict()
    for k, (x, y) in enumerate(make_batches(6)):
        own = copy.deepcopy(model.state_dict())
        if k == 3:
            model.load_state_dict(other)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        model.load_state_dict(own)
        guided.step()
    assert 2 not in guided.alpha_history.iterations
    assert 3 not in guided.alpha_history.iterations


def test_a_parameter_edited_between_backward_and_step_drops_the_pair_that_starts_there():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    for k, (x, y) in enumerate(make_batches(6)):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        if k == 3:
            with torch.no_grad():
                model[0].weight.add_(0.01)
        guided.step()
    assert guided.alpha_history.iterations.tolist() == [0, 1, 2, 4]
    assert guided.alpha_history.dropped == {"parameters_changed": 1}


@pytest.mark.compatibility("Loops", "step() before any backward pass")
def test_step_without_backward_is_allowed():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    guided.step()
    (x, y), *_ = make_batches(1)
    loss_fn(model(x), y).backward()
    guided.step()
    guided.step()  # with the old gradients, as torch allows
    assert guided.iteration == 3
    assert len(guided.alpha_history) == 0
    assert guided.alpha_history.dropped["no_backward"] >= 2


def test_gradients_set_by_hand_are_measured():
    weight = nn.Parameter(torch.tensor([4.0, 2.0], dtype=torch.float64))
    guided = AlphaGuided(torch.optim.SGD([weight], lr=0.25))
    for _ in range(4):
        weight.grad = 2.0 * weight.detach()  # of |w|^2
        guided.step()
    assert guided.alpha_history.alphas == pytest.approx([-0.5] * 3)


def test_frozen_and_unused_parameters_are_allowed():
    model = make_model()
    model.add_module("unused", nn.Linear(3, 3).double())
    used = nn.Sequential(model[0], model[1], model[2])
    model[0].bias.requires_grad_(False)
    loss_fn = nn.CrossEntropyLoss()
    for build in (lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p)):
        guided = AlphaGuided(build(list(model.parameters())), model, loss_fn, variance="exact")
        for x, y in make_batches(4):
            guided.zero_grad()
            loss_fn(used(x), y).backward()
            guided.step()
        assert [m.information for m in guided.alpha_history] == ["full"] * 3
        guided.detach()


@pytest.mark.compatibility("Loops", "requires_grad toggled in mid-run")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_requires_grad_toggled_in_mid_run(kind):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    for k, (x, y) in enumerate(make_batches(8)):
        if k == 3:
            model[0].weight.requires_grad_(False)
        if k == 5:
            model[0].weight.requires_grad_(True)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert len(guided.alpha_history) >= 6


def test_a_short_last_batch_weighs_with_its_own_noise():
    batches = [*make_batches(3), *make_batches(1, size=4, seed=1)]
    guided = plain_run("adam", batches)
    last = guided.alpha_history[-1]
    assert (last.samples_start, last.samples_end) == (12, 4)


def test_a_batch_of_one_has_slopes_only():
    guided = plain_run("sgd", make_batches(4, size=1))
    assert [m.information for m in guided.alpha_history] == ["slopes"] * 3
    for m in guided.alpha_history:
        assert m.alpha == pytest.approx(-m.slope_end / m.slope_start)
        assert math.isfinite(m.loss_start)
        assert math.isnan(m.loss_variance_start)


def test_a_non_finite_loss_is_a_status():
    batches = make_batches(5)
    batches[2] = (batches[2][0] * math.nan, batches[2][1])
    guided = plain_run("sgd", batches)
    assert guided.alpha_history[1].status is AlphaStatus.NOT_FINITE
    assert math.isnan(guided.alpha_history[1].alpha)


def test_a_step_too_short_to_move_the_parameters_is_no_step():
    model, loss_fn = make_model().float(), nn.CrossEntropyLoss()
    for kind in ("sgd", "adam"):
        guided = wrap(model, loss_fn, kind)
        guided.param_groups[0]["lr"] = 1e-30 if kind == "sgd" else 0.0
        for x, y in make_batches(3):
            guided.zero_grad()
            loss_fn(model(x.float()), y).backward()
            guided.step()
        assert [(m.status, m.alpha) for m in guided.alpha_history] == [(AlphaStatus.NO_STEP, -1.0)] * 2
        guided.detach()


def test_the_direction_of_plain_sgd_is_right_at_tiny_rates():
    def run(dtype):
        model, loss_fn = make_model().to(dtype), nn.CrossEntropyLoss()
        guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=1e-7), model, loss_fn, variance="exact")
        for x, y in make_batches(4):
            guided.zero_grad()
            loss_fn(model(x.to(dtype)), y).backward()
            guided.step()
        return guided.alpha_history

    check_same(run(torch.float32), run(torch.float64), ("step_length", "slope_start", "slope_end"), tolerance=1e-4)


@pytest.mark.compatibility("Loops", "closures")
def test_a_closure_is_seen_once_and_its_loss_used():
    reference = plain_run("momentum")
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    guided = AlphaGuided(optimizer, model, variance="exact")
    for x, y in make_batches(6):

        def closure(x=x, y=y):
            guided.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        guided.step(closure)
    check_same(guided.alpha_history, reference.alpha_history, FIELDS[1:])
    for m, r in zip(guided.alpha_history, reference.alpha_history, strict=True):
        assert m.loss_start == pytest.approx(r.loss_start)
        assert m.information == "slopes+variances"


@pytest.mark.compatibility("torch.optim", "closures that are evaluated many times (LBFGS)")
def test_lbfgs_starts_from_the_first_evaluation_of_its_closure():
    model = make_model()
    guided = AlphaGuided(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3), model)
    (x, y), *_ = make_batches(1)
    first = []
    for _ in range(4):
        evaluations = []

        def closure(evaluations=evaluations):
            guided.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            evaluations.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            return loss

        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        guided.step(closure)
        d = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        first.append(float(evaluations[0] @ d / d.norm()))
    assert [m.slope_start for m in guided.alpha_history] == pytest.approx(first[:3])


@pytest.mark.compatibility("Process", "several wrappers on one model")
def test_two_wrappers_on_one_model_with_one_loss_function():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    lower = AlphaGuided(torch.optim.SGD(model[0].parameters(), lr=0.1), model, loss_fn, variance="exact")
    upper = AlphaGuided(torch.optim.Adam(model[2].parameters(), lr=0.01), model, loss_fn, variance="exact")
    for x, y in make_batches(4):
        lower.zero_grad()
        upper.zero_grad()
        loss_fn(model(x), y).backward()
        lower.step()
        upper.step()
    for guided in (lower, upper):
        assert [m.information for m in guided.alpha_history] == ["full"] * 3


def test_an_exception_in_the_loop_costs_one_pair_and_nothing_else():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    for k, (x, y) in enumerate(make_batches(6)):
        guided.zero_grad()
        if k == 2:
            with pytest.raises(ValueError, match="batch_size"):
                loss_fn(model(x), y[:3]).backward()
            with pytest.raises(ZeroDivisionError):
                guided.step(lambda: 1 / 0)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.iteration == 6
    assert guided.alpha_history.iterations.tolist() == [0, 2, 3, 4]
    assert guided.alpha_history.dropped == {"exception": 1}


def test_groups_with_rates_of_their_own():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "lr": 0.01}]
    runs = {}
    for backend in ("backpack", "cached"):
        net = copy.deepcopy(model)
        groups = [{"params": net[0].parameters(), "lr": 0.3}, {"params": net[2].parameters(), "lr": 0.01}]
        guided = AlphaGuided(torch.optim.SGD(groups, lr=1.0), net, loss_fn, backend=backend, variance="exact")
        for x, y in make_batches(4):
            guided.zero_grad()
            loss_fn(net(x), y).backward()
            guided.step()
        runs[backend] = guided.alpha_history
        assert guided.alpha_history[0].lr == (0.3, 0.01)
    check_same(runs["backpack"], runs["cached"])


def test_momentum_switched_on_in_mid_run_leaves_the_fast_path():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    for k, (x, y) in enumerate(make_batches(6)):
        if k == 3:
            guided.param_groups[0]["momentum"] = 0.9
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.backend == "layerwise"
    assert guided.alpha_history[-1].information == "full"


@pytest.mark.compatibility("Loops", "add_param_group in mid-run")
def test_add_param_group_in_mid_run():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.Adam(model[2].parameters()), model, loss_fn)
    for k, (x, y) in enumerate(make_batches(6)):
        if k == 3:
            guided.add_param_group({"params": model[0].parameters(), "lr": 0.1})
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.alpha_history.iterations.tolist() == [0, 1, 3, 4]
    assert guided.alpha_history[-1].lr == (1e-3, 0.1)
    assert guided.alpha_history.dropped == {"parameters_changed": 1}


# ------------------------------------------------------------------ losses handed over


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("how", ["backward", "record then backward", "record detached", "record trailing"])
def test_functional_losses(kind, how):
    reference = plain_run(kind)
    model = make_model()
    guided = wrap(model, None, kind)
    for x, y in make_batches(6):
        guided.zero_grad()
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        if how == "backward":
            mean = guided.backward(losses)
            assert mean.item() == pytest.approx(losses.mean().item())
            assert not mean.requires_grad
        elif how == "record then backward":
            guided.record_losses(losses)
            losses.mean().backward()
        elif how == "record trailing":
            guided.record_losses(losses.detach().reshape(-1, 1).expand(-1, 3))
            losses.mean().backward()
        else:
            losses.mean().backward()
            guided.record_losses(losses.detach())
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history)
    assert {m.information for m in guided.alpha_history} == {"full"}


def test_losses_of_reduction_none_also_handed_over_count_once():
    reference = plain_run("adam")
    model, loss_fn = make_model(), nn.CrossEntropyLoss(reduction="none")
    guided = wrap(model, loss_fn, "adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        guided.backward(loss_fn(model(x), y))
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history, (*FIELDS, "loss_start", "loss_variance_start"))


def test_a_recorded_mean_is_only_recorded():
    model = make_model()
    guided = wrap(model, None)
    for x, y in make_batches(4):
        guided.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        guided.record_losses(loss.detach())
        guided.step()
    for m in guided.alpha_history:
        assert m.information == "slopes+variances"
        assert math.isfinite(m.loss_start)
        assert math.isnan(m.loss_variance_start)


def test_a_penalty_is_in_the_slopes_but_not_in_the_losses():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, backend="gradients")
    points, gradients, losses = [], [], []
    for x, y in make_batches(4):
        guided.zero_grad()
        loss = loss_fn(model(x), y)
        (loss + 0.1 * model[0].weight.square().sum()).backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        points.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        guided.step()
    history = guided.alpha_history
    assert [m.loss_end for m in history] == pytest.approx(losses[1:])
    for n, m in enumerate(history):
        direction = (points[n + 1] - points[n]) / (points[n + 1] - points[n]).norm()
        assert m.slope_start == pytest.approx(float(direction @ gradients[n]))
        assert m.slope_end == pytest.approx(float(direction @ gradients[n + 1]))


def test_two_terms_of_one_loss_add_up():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    totals = []
    for x, y in make_batches(4):
        guided.zero_grad()
        output = model(x)
        loss = loss_fn(output, y) + 0.5 * loss_fn(-output, y)
        loss.backward()
        totals.append(loss.item())
        guided.step()
    assert [m.loss_start for m in guided.alpha_history] == pytest.approx(totals[:3])
    assert {m.information for m in guided.alpha_history} == {"full"}


def test_a_loss_without_losses_of_single_samples_is_recorded_and_said():
    class Opaque(nn.Module):
        def forward(self, output, y):
            return nn.functional.cross_entropy(output, y)

    model, loss_fn = make_model(), Opaque()
    guided = wrap(model, loss_fn)
    with pytest.warns(UserWarning, match="Opaque gives no losses of single samples"):
        for x, y in make_batches(4):
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes+variances"}
    assert all(math.isfinite(m.loss_start) for m in guided.alpha_history)


def test_a_loss_function_that_draws_random_numbers_and_counts_its_calls_is_left_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduction = "mean"
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output, y):
            self.calls += 1
            losses = nn.functional.cross_entropy(output, y, reduction="none") * torch.rand(())
            return losses.mean() if self.reduction == "mean" else losses

    def run(wrapped):
        model, loss_fn = make_model(), Noisy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = AlphaGuided(optimizer, model, loss_fn) if wrapped else optimizer
        for x, y in make_batches(4):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), float(loss_fn.calls)

    (bare, calls), (guided, same_calls) = run(False), run(True)
    assert torch.equal(bare, guided)
    assert calls == same_calls == 4.0


@pytest.mark.compatibility("Loops", "torch.utils.checkpoint, reentrant and not")
def test_gradient_checkpointing_measures_the_same():
    from torch.utils.checkpoint import checkpoint

    reference = plain_run("adam")
    for reentrant in (True, False):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = wrap(model, loss_fn, "adam")
        for x, y in make_batches(6):
            guided.zero_grad()
            output = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
            loss_fn(output, y).backward()
            guided.step()
        check_same(guided.alpha_history, reference.alpha_history)


# ------------------------------------------------------------------ losses of other makes


@pytest.mark.parametrize("style", ["getattr", "dictionary", "assertion"])
def test_a_loss_that_knows_no_none_is_recorded_and_said(style):
    class Custom(nn.Module):
        reduction = "mean"

        def forward(self, output, y):
            losses = nn.functional.cross_entropy(output, y, reduction="none")
            if style == "getattr":
                return getattr(losses, self.reduction)()
            if style == "dictionary":
                return {"mean": torch.mean}[self.reduction](losses)
            assert self.reduction == "mean"
            return losses.mean()

    model, loss_fn = make_model(), Custom()
    guided = wrap(model, loss_fn)
    with pytest.warns(UserWarning, match="Custom gives no losses of single samples"):
        for x, y in make_batches(3):
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes+variances"}


def test_a_loss_of_the_users_own_whose_graph_holds_its_buffers():
    class Weighted(nn.CrossEntropyLoss):
        pass

    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    runs = []
    for loss_fn in (Weighted(weight=weight), nn.CrossEntropyLoss(weight=weight)):
        model = make_model()
        guided = wrap(model, loss_fn)
        for x, y in make_batches(4):
            guided.zero_grad()
            loss_fn(model(x), target=y).backward()
            guided.step()
        runs.append(guided.alpha_history)
    check_same(*runs, ("alpha", "loss_start", "loss_variance_start"))


@pytest.mark.parametrize("sizes", [(8, 12), (8, 16), (16, 8)])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_two_batches_of_different_size_in_one_backward_pass_have_slopes_only(kind, sizes):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    with pytest.warns(UserWarning, match="several losses with different numbers of samples"):
        for first, second in zip(make_batches(3, sizes[0]), make_batches(3, sizes[1], seed=1), strict=True):
            guided.zero_grad()
            sum(loss_fn(model(x), y) for x, y in (first, second)).backward()
            guided.step()
    assert [m.information for m in guided.alpha_history] == ["slopes"] * 2


@pytest.mark.compatibility("Loops", "gradient penalties (create_graph): slopes only, named in a warning")
def test_a_gradient_penalty_has_slopes_only_and_says_so():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    with pytest.warns(UserWarning, match="the loss contains derivatives of the model"):
        for x, y in make_batches(3):
            x.requires_grad_()
            guided.zero_grad()
            output = model(x)
            (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
            (loss_fn(output, y) + slope.square().sum(1).mean()).backward()
            guided.step()
    assert [m.information for m in guided.alpha_history] == ["slopes"] * 2


def test_the_mean_slope_does_not_depend_on_the_choice_of_variances():
    runs = []
    for variance in ("exact", "sampled"):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = wrap(model, loss_fn, "adam", backend="cached", variance=variance)
        for x, y in make_batches(4, 40):
            guided.zero_grad()
            for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
                penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
                ((loss_fn(model(xs), ys) + penalty) / 2).backward()
            guided.step()
        runs.append(guided.alpha_history)
    check_same(*runs, ("slope_start", "slope_end"))


@pytest.mark.parametrize("variance", ["sampled", "exact"])
def test_a_penalty_on_the_parameters_is_noticed(variance):
    """The loss seen is not all that is sent backward: losses and slopes belong to different functions."""
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam", variance=variance)
    gradients = []
    with pytest.warns(UserWarning, match="not all of the loss that is sent backward") as caught:
        for x, y in make_batches(6):
            guided.zero_grad()
            (loss_fn(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            guided.step()
            d = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
            gradients[-1] = float(gradients[-1] @ d / d.norm())
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 500
    assert {m.information for m in guided.alpha_history} == {"slopes"}
    assert [m.slope_start for m in guided.alpha_history] == pytest.approx(gradients[:5])


def test_an_earlier_forward_pass_of_another_size_does_not_confuse_the_count():
    reference = plain_run("adam")
    model = make_model()
    guided = wrap(model, None, "adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        model(x[:4])
        loss.backward()
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history, ("samples_start", "slope_variance_start"))


@pytest.mark.parametrize("options", [{"variance": "sampled"}, {"variance": "exact"}], ids=str)
def test_losses_of_two_forward_passes_together(options):
    histories = []
    for together in (True, False):
        model = make_model()
        guided = wrap(model, None, "adam", **({"backend": "cached"} if together else options))
        (x, y), (u, v) = make_batches(1, 12)[0], make_batches(1, 7)[0]
        for _ in range(3):
            guided.zero_grad()
            if together:
                losses = nn.functional.cross_entropy(model(torch.cat([x, u])), torch.cat([y, v]), reduction="none")
            else:
                both = [nn.functional.cross_entropy(model(a), b, reduction="none") for a, b in ((x, y), (u, v))]
                losses = torch.cat(both)
            guided.backward(losses)
            guided.step()
        histories.append(guided.alpha_history)
    assert [m.samples_start for m in histories[1]] == [19, 19]
    first = 1 if options["variance"] == "exact" else 0  # the rules of layers do not fit, as is seen then
    check_same(*(history[first:] for history in histories))


def test_the_factor_of_a_recorded_mean_is_divided_out():
    slopes = []
    for scale in (1.0, 1024.0):
        model = make_model()
        guided = wrap(model, None, "adam")
        for x, y in make_batches(3):
            guided.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            guided.record_losses(loss)
            (loss * scale).backward()
            guided.step()
        slopes.append(guided.alpha_history[0].slope_start)
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-5)


def test_a_stray_backward_before_a_closure_does_not_count():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    reference = plain_run()
    stray = make_batches(1, seed=9)[0]
    for x, y in make_batches(6):
        loss_fn(model(stray[0]), stray[1]).backward()

        def closure(x=x, y=y):
            guided.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        guided.step(closure)
    check_same(guided.alpha_history, reference.alpha_history)


def test_a_loss_function_that_is_never_called_is_noticed_once():
    model = make_model()
    guided = wrap(model, nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="none of its calls was seen in the backward pass") as caught:
        for x, y in make_batches(5):
            guided.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            guided.step()
    assert len(caught) == 1


def test_a_recorded_mean_does_not_replace_what_loss_fn_says():
    reference = plain_run("adam")
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        guided.record_losses(loss.detach())
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history)
    assert {m.information for m in guided.alpha_history} == {"full"}


@pytest.mark.filterwarnings("ignore:loss_fn")
def test_a_batch_without_a_target_that_counts_raises_nothing():
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    for target in (0, -100, 1):
        guided.zero_grad()
        loss_fn(model(torch.randn(5, 4)), torch.full((5,), target)).backward()
        guided.step()
    assert {m.status.value for m in guided.alpha_history} == {"not_finite"}


def test_steps_at_rate_zero_without_a_gradient_count():
    model = nn.Linear(3, 1)
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.0), model, every=3)
    for step in range(6):
        optimizer.zero_grad()
        (model(torch.ones(2, 3)).sum() * 0.0).backward()
        optimizer.step()
        assert optimizer.iteration == step + 1


def test_what_is_known_of_the_noise_stands_where_a_batch_is_called_otherwise():
    """A batch of as many samples as its inputs are wide could be cut along either dimension, and is checked anew."""
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam", variance="sampled")
    for size in (8, 8, 6, 8, 8, 8):
        ((x, y),) = make_batches(1, size)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert [m.information for m in guided.alpha_history] == ["full"] * 5
