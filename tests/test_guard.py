"""Steps are taken back bit for bit, and nothing ever holds a nan."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from alpha_optim.measure.step_ends import BatchLoss
from alpha_optim.steer.guard import Guard, rise_limit
from tests.test_transparency import OPTIMIZERS


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def batches(count, size=32):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(size, 6, generator=generator)
        yield x, (x[:, :3].argmax(1))


def all_finite(model):
    return all(bool(torch.isfinite(v).all()) for v in model.state_dict().values() if v.is_floating_point())


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_a_step_into_a_nan_is_taken_back_bit_for_bit(kind):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    base = {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1),
        "momentum": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam(model.parameters(), lr=0.01),
    }[kind]
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    for k, (x, y) in enumerate(batches(8)):
        guided.zero_grad()
        loss = loss_fn(model(x * (math.nan if k == 5 else 1.0)), y)
        loss.backward()
        if k == 4:
            before_step_4 = snapshot(model)
        guided.step()
        scheduler.step()
        assert all_finite(model)
        if k == 5:
            assert all(torch.equal(v, model.state_dict()[name]) for name, v in before_step_4.items())
            assert all(p.grad is None for p in model.parameters())
            assert guided.iteration == 5
    (event,) = guided.guard_events
    assert (event.iteration, event.reason, event.restored, event.scale_factor) == (
        5,
        "loss_not_finite",
        True,
        0.5,
    )
    assert math.isfinite(event.loss_before)
    assert base.param_groups[0]["lr"] == pytest.approx({"adam": 0.005}.get(kind, 0.05))
    assert guided.iteration == 7


def test_an_explosion_is_taken_back_before_the_next_step():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    losses = []
    for k, (x, y) in enumerate(batches(30)):
        if k == 10:
            guided.param_groups[0]["lr"] = 1000.0
        guided.zero_grad()
        loss = loss_fn(model(x), y)
        losses.append(loss.item())
        loss.backward()
        guided.step()
        if k == 10:
            guided.param_groups[0]["lr"] = 0.1
        scheduler.step()
    assert losses[11] > 10 * losses[10]
    assert losses[12] < 1.5 * losses[10]
    assert [event.reason for event in guided.guard_events] == ["loss_rose"]
    # What the step did was measured all the same.
    assert 10 in guided.alpha_history.iterations


def test_a_gradient_that_is_not_finite_skips_the_step_and_lowers_nothing():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.Adam(model.parameters(), lr=0.01), model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    for k, (x, y) in enumerate(batches(6)):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        if k == 3:
            model[0].weight.grad[0, 0] = math.inf
            before = snapshot(model)
        guided.step()
        scheduler.step()
        if k == 3:
            assert all(torch.equal(v, model.state_dict()[name]) for name, v in before.items())
    (event,) = guided.guard_events
    assert (event.reason, event.restored) == ("gradient_not_finite", False)
    assert guided.param_groups[0]["lr"] == 0.01
    for state in guided.state.values():
        assert all(bool(torch.isfinite(v).all()) for v in state.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("lr", [1e-6, 1.0, 1e3, 1e6])
@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name not in ("LBFGS", "SGD tensor lr", "SGD maximize")]
)
def test_nothing_ever_holds_a_nan_whatever_the_initial_rate(name, lr):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    base = OPTIMIZERS[name](list(model.parameters()))
    for group in base.param_groups:
        group["lr"] = lr
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, total_steps=40)
    for x, y in batches(40):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        scheduler.step()
        assert all_finite(model)


def test_without_variances_the_usual_difference_between_batches_is_the_measure():
    weight = nn.Parameter(torch.tensor([1.0]))
    guided = AlphaGuided(torch.optim.SGD([weight], lr=0.1))
    scheduler = AlphaScheduler(guided, Hold())
    generator = torch.Generator().manual_seed(0)
    for k in range(40):
        guided.zero_grad()
        loss = weight.square().sum() + 1.0 + 0.1 * torch.rand((), generator=generator) + (50.0 if k == 30 else 0.0)
        guided.record_losses(loss)
        loss.backward()
        guided.step()
        scheduler.step()
    assert [event.iteration for event in guided.guard_events] == [30]


def test_healthy_training_is_never_interrupted():
    for size in (2, 8, 64):
        torch.manual_seed(1)
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.02), model, loss_fn, backend="gradients")
        scheduler = AlphaScheduler(guided, Hold())
        for x, y in batches(600, size):
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
            scheduler.step()
        assert guided.guard_events == ()


def test_the_limit_of_a_rise_is_the_one_in_a_million_quantile():
    from scipy.stats import t

    for n in (2, 8, 128):
        assert t.sf(rise_limit(n, n), 2 * n - 2) == pytest.approx(1e-6, rel=1e-3)
    assert math.isinf(rise_limit(1, 128))


def test_the_formula_decides_exactly_at_its_threshold():
    def rises_by(rise):
        guard = Guard(None)
        loss = BatchLoss(torch.tensor(1.0), torch.tensor(4.0), 100)
        params = [torch.zeros(1)]
        assert guard.judge(0, loss, params) is None
        guard.stepped = True
        return guard.judge(1, BatchLoss(torch.tensor(1.0 + rise), torch.tensor(5.0), 50), params)

    threshold = rise_limit(100, 50) * math.sqrt(4.0 / 100 + 5.0 / 50)
    assert rises_by(0.99 * threshold) is None
    assert rises_by(1.01 * threshold).reason == "loss_rose"


def test_switched_off_it_keeps_nothing_and_does_nothing():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=1e6), model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold(), guard=False)
    for x, y in batches(5):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        scheduler.step()
    assert guided.guard_events == ()
    assert guided.iteration == 5


def judged(guard, losses, params):
    """Events of a guard that sees these mean losses, one after the other."""
    events = []
    for n, loss in enumerate(losses):
        guard.stepped = n > 0
        event = guard.judge(n, BatchLoss(torch.tensor(float(loss)), None, 0), params)
        if event is not None:
            events.append(event)
    return events


def test_a_higher_loss_is_accepted_after_many_returns_and_the_run_goes_on():
    from alpha_optim.steer.best_point import PATIENCE

    params = [nn.Parameter(torch.ones(3))]
    wave = [0.01 * math.sin(n) for n in range(400)]
    climbs = [1.0 + w for w in wave[:20]] + [1.4 + 5 * w for w in wave[20:]]
    events = judged(Guard(None), climbs, params)
    assert [event.reason for event in events] == ["loss_rose"] + ["loss_drifted"] * PATIENCE


def test_noise_before_any_progress_is_no_drift():
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.ones(3))]
    losses = 1.0 + 0.2 * torch.randn(600, generator=generator)
    losses[0] = 0.7  # a lucky first batch
    assert judged(Guard(None), losses.tolist(), params) == []


def test_a_policy_may_return_to_the_best_point():
    class Returns(Hold):
        asked = 0

        def wants_return(self):
            self.asked += 1
            return self.asked == 15

    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, loss_fn)
    scheduler = AlphaScheduler(guided, Returns())
    kept = None
    for x, y in batches(25):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        before = len(guided.guard_events)
        guided.step()
        if len(guided.guard_events) > before:
            good = guided._session.guard._good.tensors
            kept = all(torch.equal(now, then) for now, then in zip(model.parameters(), good, strict=False))
            assert not guided.state  # momentum starts anew
        scheduler.step()
    (event,) = guided.guard_events
    assert (event.reason, event.restored, event.scale_factor) == ("policy_returned", True, 1.0)
    assert kept
    assert scheduler.scale == 1.0


def test_a_point_that_the_policy_does_not_trust_is_not_the_one_to_return_to():
    class Wary(Hold):
        """Trusts the first window only, and returns after the third."""

        asked = 0

        def trusts_point(self):
            return self.asked < 12

        def wants_return(self):
            self.asked += 1
            return self.asked == 35

    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    scheduler = AlphaScheduler(guided, Wary())
    points, losses = [], []
    for x, y in batches(40):
        guided.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        points.append(snapshot(model))
        losses.append(loss.item())
        guided.step()
        if guided.guard_events:
            break
        scheduler.step()
    assert sum(losses[20:30]) < sum(losses[:10]) - 1.0  # later windows were better
    now = snapshot(model)
    same = [all(torch.equal(value, now[name]) for name, value in point.items()) for point in points]
    assert same.index(True) == 10  # where the first window ended
