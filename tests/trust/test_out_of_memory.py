"""Memory runs out somewhere inside the package: the user's steps are those of the bare optimizer."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, CalibrateThenAnneal, Hold
from alpha_optim.measure import pairing
from alpha_optim.observe import memory
from alpha_optim.observe.step_direction import BetweenPoints
from alpha_optim.steer.point import Point
from tests.test_transparency import equal_states

GPU, CPU = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")


class Hungry(nn.Module):
    """Has no memory for another forward pass than the user's own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        if not isinstance(self.one.weight, nn.Parameter):  # a repetition is given others
            raise GPU
        return self.two(torch.tanh(self.one(x)))


def train(steps, wrap, build=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), policy=None):
    torch.manual_seed(0)
    model, loss_fn = build(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = None
    if wrap:
        optimizer = AlphaGuided(optimizer, model, loss_fn)
        scheduler = None if policy is None else AlphaScheduler(optimizer, policy)
    for _ in range(steps):
        x = torch.randn(20, 6)
        optimizer.zero_grad()
        loss_fn(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model, optimizer, scheduler


def refuse(monkeypatch, owner, name, error, after=0):
    """From the call ``after`` on there is no memory for a function."""
    original, calls = getattr(owner, name), 0

    def refused(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, refused)


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()], ids=["device", "cpu", "python"])
@pytest.mark.parametrize(("owner", "name"), [(pairing, "copied"), (BetweenPoints, "of")])
def test_the_step_is_made_and_measuring_stops_after_a_few(monkeypatch, owner, name, error):
    bare, _, _ = train(12, False)
    refuse(monkeypatch, owner, name, error, after=4)
    with pytest.warns(UserWarning, match="memory ran out while alpha was measured") as caught:
        model, optimizer, _ = train(12, True)
    assert len(caught) == 1
    assert equal_states(bare.state_dict(), model.state_dict())
    assert optimizer.alpha_history.dropped == {"out_of_memory": 3}
    assert [m.iteration for m in optimizer.alpha_history] == [0, 1, 2, 3]
    assert optimizer.iteration == 12


def test_other_errors_are_not_taken_for_it(monkeypatch):
    refuse(monkeypatch, pairing, "copied", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train(2, True)
    assert not memory.is_out_of_memory(RuntimeError("a bug"))


def test_without_memory_for_samples_there_are_slopes():
    bare, _, _ = train(12, False, Hungry)
    with pytest.warns(UserWarning, match=r"no slopes of single samples .*out of memory"):
        model, optimizer, _ = train(12, True, Hungry)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert {m.information for m in optimizer.alpha_history} == {"slopes"}


@pytest.mark.parametrize("policy", [Hold, lambda: CalibrateThenAnneal(300)], ids=["held", "searched"])
def test_without_memory_for_points_the_rate_given_is_kept(monkeypatch, policy):
    refuse(monkeypatch, Point, "_keep", CPU)
    with pytest.warns(UserWarning, match="memory ran out while a point of training was copied") as caught:
        model, optimizer, scheduler = train(60, True, policy=policy())
    assert {warning.filename for warning in caught} == {__file__}
    rates = [measurement.lr[0] for measurement in optimizer.alpha_history]
    assert max(rates) <= 0.01 * (1 + 1e-9)  # nothing was tried from where there is no way back
    assert rates[10:] == [pytest.approx(0.01)] * len(rates[10:])
    assert scheduler.get_last_lr() == [pytest.approx(0.01)]
    assert optimizer.iteration == 60
    assert all(bool(torch.isfinite(param).all()) for param in model.parameters())
    assert not any(event.restored for event in optimizer.guard_events)
    assert math.isfinite(optimizer.alpha_history[-1].alpha)


def test_without_memory_for_points_buffers_are_those_of_the_last_step(monkeypatch):
    """A batch that is not finite is left out, and leaves the statistics of the step before it."""

    def normed():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    refuse(monkeypatch, Point, "_keep", GPU, after=3)
    torch.manual_seed(0)
    model, loss_fn = normed(), nn.CrossEntropyLoss()
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.01), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, Hold())
    with pytest.warns(UserWarning, match="memory ran out"):
        for n in range(20):
            x = torch.randn(20, 6) * (math.nan if n == 15 else 1.0)
            optimizer.zero_grad()
            loss_fn(model(x), torch.arange(20) % 3).backward()
            optimizer.step()
            scheduler.step()
    assert [event.skipped for event in optimizer.guard_events] == [True]
    assert int(model[1].num_batches_tracked) == 19
    assert bool(torch.isfinite(model[1].running_mean).all())


@pytest.mark.parametrize("name", ["products", "_copied"])
def test_at_the_end_of_a_step_and_for_buffers_too(monkeypatch, name):
    refuse(monkeypatch, *{"products": (BetweenPoints, name), "_copied": (Point, name)}[name], GPU, after=2)
    with pytest.warns(UserWarning, match="memory ran out"):
        _, optimizer, _ = train(12, True, policy=Hold())
    assert optimizer.iteration == 12
    if name == "products":
        assert optimizer.alpha_history.dropped == {"out_of_memory": 4}  # the last of them had begun before


@pytest.mark.parametrize(
    "text",
    ["MPS backend out of memory (MPS allocated: 1 GB)", "CUBLAS_STATUS_ALLOC_FAILED when calling", "HIP out of memory"],
)
def test_other_libraries_say_it_in_their_own_words(text):
    assert memory.is_out_of_memory(RuntimeError(text))
    assert not memory.is_out_of_memory(ValueError(text))
    assert not memory.is_out_of_memory(None)
