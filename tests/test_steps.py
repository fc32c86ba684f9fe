"""Steps that tell little, closures, several optimizers, groups."""

import copy
import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaStatus
from tests.loops import FIELDS, check_same, make_batches, make_model, plain_run, train, wrap


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
        train(guided, net, loss_fn, make_batches(4))
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
