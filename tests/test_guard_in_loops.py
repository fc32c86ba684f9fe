"""The guard in loops as people write them: nothing of ours is worse than their own care."""

import io
import math
import warnings

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from tests.harm.setups import Sam
from tests.test_guard import all_finite, batches, go, guarded, make_model, snapshot, spiked
from tests.test_transparency import equal_states
from tests.zoo import TwoHeads


def sam_run(steered, bad, every=1):
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), nn.CrossEntropyLoss()
    optimizer = base = Sam(model.parameters(), lr=0.05)
    scheduler = None
    if steered:
        optimizer = AlphaGuided(base, model, loss_fn, every=every)
        scheduler = AlphaScheduler(optimizer, Hold())
    for k, (x, y) in enumerate(batches(60)):
        x = x * (math.nan if k in bad else 1.0)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        loss = closure()
        if steered or bool(torch.isfinite(loss)):
            optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    return model.state_dict(), optimizer


@pytest.mark.compatibility("Loops", "SAM, watched and steered")
@pytest.mark.parametrize("every", [1, 7])
def test_sam_is_judged_and_kept_at_the_point_it_starts_from(every):
    """A bad batch leaves the weights at w, and nothing follows from it."""
    bad = (10, 20, 33)
    (bare, _), (ours, optimizer) = sam_run(False, bad), sam_run(True, bad, every)
    assert [event.restored for event in optimizer.guard_events] == [False] * 3
    for name, value in bare.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("cut", range(4, 11))
def test_a_run_saved_anywhere_around_bad_batches_resumes_bit_for_bit(cut):
    """And loads with ``weights_only=True``, whatever was dropped before."""
    data = [(x * (math.nan if k in (5, 6, 7, 12) else 1.0), y) for k, (x, y) in enumerate(batches(20))]

    def build():
        return guarded("momentum")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = build()
        go(*run, data[:cut])
        file = io.BytesIO()
        torch.save([run[0].state_dict(), run[2].state_dict(), run[3].state_dict()], file)
        go(*run, data[cut:])
        file.seek(0)
        other = build()
        states = torch.load(file, weights_only=True)
        for part, state in zip((other[0], other[2], other[3]), states, strict=True):
            part.load_state_dict(state)
        go(*other, data[cut:])
    assert equal_states(run[0].state_dict(), other[0].state_dict())
    assert repr(run[2].guard_events) == repr(other[2].guard_events)  # losses among them are nan
    assert run[2].param_groups[0]["lr"] == other[2].param_groups[0]["lr"]


def test_the_very_first_batch_leaves_no_trace_either():
    run, clean = guarded("adam"), guarded("adam")
    data = list(batches(12))
    go(*run, [(data[0][0] * math.nan, data[0][1]), *data])
    go(*clean, data)
    assert equal_states(run[0].state_dict(), clean[0].state_dict())


@pytest.mark.parametrize("clears", ["optimizer", "model"])
def test_what_a_scaler_skips_leaves_no_trace_in_statistics(clears):
    run = guarded("adam")
    model, loss_fn, guided, scheduler = run
    for k, (x, y) in enumerate(batches(30)):
        (guided if clears == "optimizer" else model).zero_grad()
        loss = loss_fn(model(x * (math.nan if k in (10, 20, 29) else 1.0)), y)
        loss.backward()
        if bool(torch.isfinite(loss)):
            guided.step()
        scheduler.step()
    scheduler.finish()
    assert all_finite(model)
    assert {event.reason for event in guided.guard_events} == {"loss_not_finite"}
    assert not any(event.restored for event in guided.guard_events)
    assert guided.iteration == 27


@pytest.mark.parametrize("seed", range(3))
def test_ripples_of_a_full_batch_are_no_explosions(seed):
    def train(steered):
        torch.manual_seed(seed)
        x = torch.linspace(-1, 1, 128)[:, None]
        y = torch.sin(10 * x)
        model, loss_fn = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1)), nn.MSELoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if steered:
            optimizer = AlphaGuided(optimizer, model, loss_fn, backend="gradients", every=50)
        scheduler = AlphaScheduler(optimizer, Hold()) if steered else None
        for _ in range(900):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return model.state_dict(), optimizer

    (bare, _), (ours, optimizer) = train(False), train(True)
    assert optimizer.guard_events == ()
    assert equal_states(bare, ours)


@pytest.mark.parametrize("edit", ["in place", "loaded"])
def test_what_the_user_writes_to_the_parameters_is_not_undone(edit):
    run = guarded("sgd")
    model = run[0]
    data = list(batches(60))
    go(*run, data[:40])
    if edit == "in place":
        with torch.no_grad():
            model[3].bias.copy_(torch.tensor([9.0, -9.0, 0.0]))
    else:
        other = make_model()
        with torch.no_grad():
            other[3].weight.mul_(30.0)
        model.load_state_dict(other.state_dict())
    go(*run, data[40:])
    assert run[2].guard_events == ()
    assert run[2].param_groups[0]["lr"] == 0.1


def test_a_good_loss_at_the_end_answers_a_doubt():
    for loss, restored in ((0.2, 0), (50.0, 1), (None, 0)):
        run = guarded("sgd")
        data = list(batches(60))
        go(*run, [*data[:59], (1000 * data[59][0], (data[59][1] + 1) % 3)])
        assert [event.restored for event in run[2].guard_events] == [False]
        run[3].finish(loss)
        assert sum(event.restored for event in run[2].guard_events) == restored


def test_the_cut_of_a_rate_that_the_loop_owns_is_measured_too():
    """Plain SGD: the length of a step is its rate times the gradient's norm, with the rate that was used."""
    torch.manual_seed(0)
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, backend="gradients")
    scheduler = AlphaScheduler(guided, Hold())
    lengths = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, (x, y) in enumerate(batches(40)):
            guided.param_groups[0]["lr"] = 0.05 + 0.001 * k
            guided.zero_grad()
            loss_fn(model(x * (math.nan if k in (20, 21) else 1.0)), y).backward()
            before = [p.detach().clone() for p in model.parameters()]
            n = guided.iteration
            guided.step()
            change = [(p.detach() - b).norm() for p, b in zip(model.parameters(), before, strict=True)]
            if guided.iteration > n:
                lengths[n] = float(torch.stack(change).norm())
            scheduler.step()
    assert any(event.restored for event in guided.guard_events)
    for measurement in guided.alpha_history:
        assert measurement.step_length == pytest.approx(lengths[measurement.iteration], rel=1e-3)


def test_what_was_not_taken_is_not_given_back():
    """After a rest there is no point to go back to: bad batches are skipped, and the rate stays."""
    run = guarded("sgd")
    data = list(batches(80))
    spiked(run, data[:30], at=20)
    rate = run[2].param_groups[0]["lr"]
    assert rate == pytest.approx(0.05)
    model, loss_fn, guided, scheduler = run
    for x, y in data[30:38]:
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    scheduler.step()
    go(*run, [(x * math.nan, y) for x, y in data[38:42]])
    assert guided.param_groups[0]["lr"] == pytest.approx(rate)


def test_gradients_that_are_lazily_conjugated_are_judged():
    weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    guided = AlphaGuided(torch.optim.SGD([weight], lr=0.01))
    scheduler = AlphaScheduler(guided, Hold())
    for _ in range(4):
        guided.zero_grad()
        (weight.conj() * torch.randn(4)).abs().square().mean().backward()
        guided.step()
        scheduler.step()
    assert guided.iteration == 4


def test_a_second_phase_of_training_has_its_own_scheduler():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    kept = []
    for params in (model[3].parameters(), model[0].parameters()):  # the head, then the rest
        guided = AlphaGuided(torch.optim.SGD(params, lr=0.1), model, loss_fn)
        kept.append((guided, AlphaScheduler(guided, Hold())))
        go(model, loss_fn, *kept[-1], batches(5))
    assert [guided.iteration for guided, _ in kept] == [5, 5]


def test_detaching_during_a_search_leaves_the_rate_given():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.05), model, loss_fn)
    scheduler = AlphaScheduler(guided, total_steps=500)
    before = snapshot(model)
    go(model, loss_fn, guided, scheduler, batches(6))
    assert guided.param_groups[0]["lr"] < 0.04
    guided.detach()
    assert guided.param_groups[0]["lr"] == pytest.approx(0.05)
    assert before.keys() == snapshot(model).keys()


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_a_guard_that_does_nothing_changes_no_measurement(kind):
    """Rates, parameters and every alpha are those of a run that is only watched, hard batches included."""
    from tests.test_guard import KINDS

    data = [(x, torch.where(torch.arange(32) < (3 if k % 5 == 0 else 0), (y + 1) % 3, y))
            for k, (x, y) in enumerate(batches(150))]  # fmt: skip
    run = guarded(kind)
    go(*run, data)
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    watched = AlphaGuided(KINDS[kind](model.parameters()), model, loss_fn)
    for x, y in data:
        watched.zero_grad()
        loss_fn(model(x), y).backward()
        watched.step()
    assert run[2].guard_events == ()
    assert equal_states(run[0].state_dict(), model.state_dict())
    assert repr(list(run[2].alpha_history)) == repr(list(watched.alpha_history))


@pytest.mark.parametrize("one_prediction", [True, False])
def test_a_first_term_without_weight_breaks_no_batch(one_prediction):
    """An auxiliary loss that is switched on later, or targets that are not mixed in this batch."""

    ends = []
    for steered in (False, True):
        torch.manual_seed(0)
        model, loss_fn = TwoHeads(3, 3), nn.CrossEntropyLoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if steered:
            optimizer = AlphaGuided(optimizer, model, loss_fn)
            scheduler = AlphaScheduler(optimizer, Hold())
        for step in range(12):
            x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
            weight = 0.0 if step < 6 else 0.1
            one, two = model(x)
            optimizer.zero_grad()
            (weight * loss_fn(two if one_prediction else one, y.flip(0)) + loss_fn(two, y)).backward()
            optimizer.step()
            if steered:
                scheduler.step()
        ends.append(model.state_dict())
    assert equal_states(*ends)
    assert not optimizer.guard_events
    assert set(optimizer.alpha_history.to_dict()["information"]) == {"full"}


def test_bad_batches_that_meet_at_the_border_of_epochs_lower_no_rate_for_good():
    """One broken sample in the first batch and one in the last, and data that are not shuffled."""
    rates = []
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=3e-3), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, Hold())
    data = list(batches(20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the guard says that the data are at fault
        for _ in range(12):
            for n, (x, y) in enumerate(data):
                optimizer.zero_grad()
                loss_fn(model(x * math.nan if n in (0, 19) else x), y).backward()
                optimizer.step()
                scheduler.step()
                rates.append(optimizer.param_groups[0]["lr"])
    assert rates[30] == pytest.approx(1.5e-3)
    assert rates[50:] == [pytest.approx(3e-3)] * len(rates[50:])
    assert optimizer.iteration >= 12 * 18 - 4
