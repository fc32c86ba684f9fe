"""What a measured step must not do: wait for the device, keep copies, hook what is not needed."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from alpha_optim.policies.base import Decision

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
}


class Reads(TorchDispatchMode):
    """Counts the operations that fetch a number from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 3))


def reads_per_step(model, optimizer, loss_fn, clip, scheduler=None, steps=8):
    """Reads in forward and backward pass, and in `step`, one pair per step."""
    counts = []
    for k in range(steps):
        generator = torch.Generator().manual_seed(k)
        x, y = torch.randn(24, 20, generator=generator), torch.randint(0, 3, (24,), generator=generator)
        with Reads() as around:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with Reads() as within:
            optimizer.step()
        counts.append((around.count, within.count))
        if scheduler is not None:
            scheduler.step()
    return counts


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("options", [{}, {"variance": "exact"}, {"backend": "gradients"}], ids=str)
def test_a_measured_step_fetches_nothing_that_the_bare_one_does_not(kind, clip, options):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    bare = reads_per_step(twin, OPTIMIZERS[kind](twin.parameters()), loss_fn, clip)
    guided = AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn, **options)
    assert reads_per_step(model, guided, loss_fn, clip) == bare
    assert len(guided.alpha_history) == 7


def test_with_a_guard_a_step_fetches_nothing_one_by_one():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    bare = reads_per_step(twin, OPTIMIZERS["adam"](twin.parameters()), loss_fn, clip=False)
    guided = AlphaGuided(OPTIMIZERS["adam"](model.parameters()), model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: 1.0)
    assert reads_per_step(model, guided, loss_fn, False, scheduler) == bare


def test_policies_see_measurements_one_step_later_where_they_would_have_to_be_waited_for(monkeypatch):
    seen = {}
    for lag in (0, 1):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = AlphaGuided(OPTIMIZERS["sgd"](model.parameters()), model, loss_fn)
        seen[lag] = []

        def policy(m, guided=guided, lag=lag):
            seen[lag].append((guided.iteration, m.iteration))
            return 1.0

        scheduler = AlphaScheduler(guided, policy)
        if lag:
            monkeypatch.setattr("alpha_optim.scheduler.waits", lambda optimizer: True)
        for k in range(6):
            generator = torch.Generator().manual_seed(k)
            guided.zero_grad()
            loss_fn(model(torch.randn(24, 20, generator=generator)), torch.zeros(24).long()).backward()
            guided.step()
            scheduler.step()
            len(guided.alpha_history)  # a logger that reads everything changes nothing
    assert seen[0] == [(n + 2, n) for n in range(5)]
    assert seen[1] == [(n + 3, n) for n in range(4)]


@pytest.fixture(autouse=True)
def _no_collector():
    """Python's collector frees what references in circles keep, but late: an accelerator's memory is full by then."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive():
    """Elements of all tensors there are."""
    places = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):  # isinstance wakes proxies that warn
            places[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // 4
    return sum(places.values())


def kept_elements(model, optimizer, loss_fn, steps):
    """Elements of all tensors alive after some steps, but for those that any training run has."""
    for k in range(steps):
        generator = torch.Generator().manual_seed(k)
        optimizer.zero_grad()
        x, y = torch.randn(24, 20, generator=generator), torch.randint(0, 3, (24,), generator=generator)
        loss_fn(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    del x, y
    return alive()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_between_steps_one_copy_of_the_parameters_is_kept(kind):
    def wide():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 3))

    loss_fn = nn.CrossEntropyLoss()
    model = wide()
    size = sum(param.numel() for param in model.parameters())
    bare = kept_elements(model, OPTIMIZERS[kind](model.parameters()), loss_fn, 5)
    model = wide()
    guided = kept_elements(model, AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn), loss_fn, 5)
    assert guided - bare <= 1.35 * size  # one copy, and the spots of parameters this small


class Doubled(torch.autograd.Function):
    """Has no rule for forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2.0 * gradient


class NoForwardMode(nn.Module):
    """Forward mode fails here, and two reverse passes are taken."""

    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, x):
        return Doubled.apply(self.inner(x))


@pytest.mark.parametrize("variance", ["sampled", "exact"])
@pytest.mark.parametrize("build", [make_model, NoForwardMode])
def test_whatever_a_measurement_holds_is_freed_without_the_collector(build, variance):
    model, loss_fn = build(), nn.CrossEntropyLoss()
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), model, loss_fn, variance=variance)
    x, y = torch.randn(24, 20), torch.zeros(24, dtype=torch.long)

    def step():
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()

    kept = []
    for _ in range(12):
        step()
        kept.append(alive())
    collected = gc.collect()
    assert kept[-1] - alive() <= 256, collected  # nothing as large as a batch or a layer was waiting
    assert kept[-1] - kept[2] <= 9 * 64  # the numbers of the history


def searching(policy_searches):
    """A policy that searches, or does not; it keeps no point, which would be one copy in host memory each."""

    class Policy(Hold):
        def decide(self, iteration, given):
            return Decision(1.0, trial=policy_searches, searching=policy_searches)

    return Policy()


@pytest.mark.parametrize("searches", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_steered_there_is_one_copy_of_the_parameters_during_a_search_and_after_it(kind, searches):
    def run(steered):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 3))
        loss_fn = nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS[kind](model.parameters())
        if not steered:
            return kept_elements(model, optimizer, loss_fn, 5)
        optimizer = AlphaGuided(optimizer, model, loss_fn)
        scheduler = AlphaScheduler(optimizer, searching(searches))
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        kept = kept_elements(model, optimizer, loss_fn, 5)
        guard, pending = optimizer._session.supervision.guard, optimizer._session.pairing.pending
        assert all(a is b for a, b in zip(guard._last.params, pending.direction.kept, strict=True))  # shared
        return kept

    bare, guided, size = run(False), run(True), 20 * 400 + 400 + 400 * 3 + 3
    assert guided - bare <= 1.35 * size


RUNS = []


class Counted(nn.Module):
    """Counts how often it is run, whoever runs it, where no repetition puts it back."""

    def forward(self, x):
        RUNS.append(len(x))
        return x


@pytest.mark.parametrize("every", [1, 10])
def test_the_model_is_run_again_only_when_variances_are_due_and_no_layer_is_ever_hooked(every):
    model, loss_fn = nn.Sequential(make_model(), Counted()), nn.CrossEntropyLoss()
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), model, loss_fn, every=every)
    RUNS.clear()
    runs = []
    for k in range(300):
        assert not any(module._forward_hooks for module in [*model[0].modules(), model[1]])
        generator = torch.Generator().manual_seed(k)
        guided.zero_grad()
        x, y = torch.randn(64, 20, generator=generator), torch.randint(0, 3, (64,), generator=generator)
        loss_fn(model(x), y).backward()
        guided.step()
        runs.append(list(RUNS))
        RUNS.clear()
    again = [sum(counts) - 64 for counts in runs]
    assert 64 in runs[0][1:]  # checked with all samples
    assert again[1] > 0  # the first step at both of its ends
    # Past the first iterations 16 of 64 samples, at both ends, cost 1 % of the training steps.
    assert sum(again[100:]) * 1.2 <= 0.0125 * 64 * 200
    assert {m.information for m in guided.alpha_history} == {"full"}
