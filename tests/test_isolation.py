"""A measurement runs a user's model more than once: whatever the model keeps is as a plain run leaves it."""

import copy
import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from alpha_optim import AlphaGuided
from tests.today import Checkpointed

N = 6


class Keeps(nn.Module):
    """Two layers; each case adds something that its forward pass changes, and says what there is to compare."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.two(self.note(self.one(x).tanh()))

    def note(self, h):
        return h

    def kept(self):
        return None


class NestedContainers(Keeps):
    def __init__(self):
        super().__init__()
        self.log, self.counts = [[], {"last": []}], defaultdict(list)

    def note(self, h):
        self.log[0].append(float(h.detach().sum()))
        self.log[1]["last"].append(len(self.log[0]))
        self.counts[len(self.log[0]) % 2].append(1)
        return h

    def kept(self):
        return self.log, dict(self.counts)


class Counter:
    def __init__(self):
        self.calls = 0


class SlottedCounter:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0


class HelperObject(Keeps):
    def __init__(self, kind):
        super().__init__()
        self.helper = kind()

    def note(self, h):
        self.helper.calls += 1
        return h * (1 + 0.01 * self.helper.calls)

    def kept(self):
        return self.helper.calls


class TensorInAList(Keeps):
    def __init__(self):
        super().__init__()
        self.means = [torch.zeros(7)]

    def note(self, h):
        self.means[0].mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return h

    def kept(self):
        return self.means[0].tolist()


class NumpyArray(Keeps):
    def __init__(self):
        super().__init__()
        self.sums = np.zeros(2)

    def note(self, h):
        self.sums[1] += float(h.detach().sum())
        return h

    def kept(self):
        return self.sums.tolist()


class OwnGenerator(Keeps):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def note(self, h):
        return h + 0.1 * torch.randn(7, generator=self.generator)

    def kept(self):
        return self.generator.get_state().tolist()


class GlobalGenerators(Keeps):
    def note(self, h):
        drawn = random.random() + np.random.rand()  # noqa: NPY002
        return h * (1 + 0.1 * drawn + 0.1 * float(torch.rand(())))

    def kept(self):
        of_numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return random.getstate(), of_numpy, torch.get_rng_state().tolist()


class Teacher(Keeps):
    """A momentum encoder outside the registered modules, changed in place at every forward pass."""

    def __init__(self):
        super().__init__()
        self.teacher = [nn.Sequential(copy.deepcopy(self.one), nn.BatchNorm1d(7))]

    def note(self, h):
        with torch.no_grad():
            self.teacher[0][0].weight.mul_(0.9).add_(self.one.weight, alpha=0.1)
            self.teacher[0][0].bias.data = 0.9 * self.teacher[0][0].bias.data + 0.1 * self.one.bias.data
            self.teacher[0](torch.ones(2, 5))
        return h

    def kept(self):
        return {name: value.tolist() for name, value in self.teacher[0].state_dict().items()}


CASES = {
    "lists in lists, a default dict": NestedContainers,
    "a helper object": lambda: HelperObject(Counter),
    "a helper object with slots": lambda: HelperObject(SlottedCounter),
    "a tensor in a list": TensorInAList,
    "an array of numpy": NumpyArray,
    "a generator of its own": OwnGenerator,
    "the generators of python, numpy and torch": GlobalGenerators,
    "a teacher outside the modules": Teacher,
}
OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


def run(build, optimizer, wrap, steps=6):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model, loss_fn = build(), nn.CrossEntropyLoss()
    if wrap is None:
        opt = OPTIMIZERS[optimizer](model)
    else:
        opt = AlphaGuided(OPTIMIZERS[optimizer](model), model, loss_fn, **wrap)
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(N, 5, generator=data)
        y = torch.randint(0, 3, (N,), generator=data)
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
    return model, opt


# A forward pass that uses numbers which another run does not repeat is declined in words; it is put back all the same.
@pytest.mark.filterwarnings("ignore:no slopes of single samples")
@pytest.mark.parametrize("variance", ["sampled", "exact"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_what_a_model_keeps_is_what_a_plain_run_leaves(case, optimizer, variance):
    plain, _ = run(CASES[case], optimizer, None)
    watched, opt = run(CASES[case], optimizer, {"variance": variance})
    assert watched.kept() == plain.kept()
    for one, two in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, two)
    assert len(opt.alpha_history) > 0


class ChangesItsInput(Keeps):
    def forward(self, x):
        return super().forward(x.mul_(0.5).add_(0.1))


def test_a_batch_changed_in_place_is_changed_once():
    torch.manual_seed(0)
    model, loss_fn = ChangesItsInput(), nn.CrossEntropyLoss()
    opt = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-2), model, loss_fn, variance="exact")
    for _ in range(4):
        x, y = torch.randn(N, 5), torch.randint(0, 3, (N,))
        wanted = x * 0.5 + 0.1
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
        assert torch.equal(x, wanted)


class PerClass(Keeps):
    calls = 0

    def note(self, h):
        type(self).calls += 1
        return h


def test_attributes_of_a_class_are_kept():
    PerClass.calls = 0
    run(PerClass, "AdamW", {"variance": "exact"}, steps=5)
    assert PerClass.calls == 5


class Cache:
    """Keys and values of earlier calls, handed over as an argument."""

    def __init__(self):
        self.states = []


class WithCache(Keeps):
    def forward(self, x, cache):
        h = self.one(x).tanh()
        cache.states.append(h.detach())
        return self.two(h)


def test_a_cache_handed_over_grows_by_one_entry_a_call():
    torch.manual_seed(0)
    model, loss_fn = WithCache(), nn.CrossEntropyLoss()
    opt = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-2), model, loss_fn, variance="exact")
    for _ in range(4):
        cache = Cache()
        opt.zero_grad()
        loss_fn(model(torch.randn(N, 5), cache), torch.randint(0, 3, (N,))).backward()
        opt.step()
        assert len(cache.states) == 1


def test_losses_weighed_by_themselves_are_not_taken_for_weighted_samples():
    """In a focal loss the weight of a sample has a gradient too: the slope holds it, and no variance is claimed."""
    torch.manual_seed(0)
    model, loss_fn = Keeps().double(), nn.CrossEntropyLoss(reduction="none")
    opt = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, loss_fn, variance="exact")

    def flat(of):
        return torch.cat([of(p).detach().flatten() for p in model.parameters()])

    slopes = []
    with pytest.warns(UserWarning, match="do not weigh the same"):
        for _ in range(4):
            x, y = torch.randn(N, 5).double(), torch.randint(0, 3, (N,))
            opt.zero_grad()
            losses = loss_fn(model(x), y)
            ((1 - (-losses).exp()) ** 2 * losses).mean().backward()
            gradient, before = flat(lambda p: p.grad), flat(lambda p: p)
            opt.step()
            step = flat(lambda p: p) - before
            slopes.append(float(gradient @ step / step.norm()))
    assert len(opt.alpha_history) >= 2
    for record, slope in zip(opt.alpha_history, slopes, strict=False):
        assert record.information != "full"
        assert record.slope_start == pytest.approx(slope, rel=1e-9)


@pytest.mark.filterwarnings("ignore:no slopes of single samples")
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_torchs_checkpoints_are_as_they_were(reentrant, raises):
    names = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")

    def as_now():
        return [getattr(torch_checkpoint, name, None) for name in (*names, "CheckpointFunction")]

    found = as_now()
    exchanged = 0

    class Watches(Checkpointed):
        def forward(self, x):
            nonlocal exchanged
            now = as_now()
            exchanged += now != found
            if raises and now != found:
                raise RuntimeError("in a repetition")
            return super().forward(x)

    model, loss_fn = Watches(reentrant), nn.CrossEntropyLoss()
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.01), model, loss_fn)
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn(model(torch.randn(N, 6)), torch.arange(N) % 3).backward()
        optimizer.step()
    assert optimizer.alpha_history[-1].information == ("slopes" if raises else "full")
    assert exchanged
    assert found == as_now()


class Unloaded(nn.Module):
    """A part of it was never loaded, and is not used."""

    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(5, 3), nn.Linear(5, 3, device="meta").requires_grad_(False)

    def forward(self, x):
        return self.used(nn.functional.dropout(x, 0.2))


def test_parameters_that_were_never_loaded():
    model, loss_fn = Unloaded(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.AdamW(model.used.parameters()), model, loss_fn)
    for _ in range(6):
        guided.zero_grad()
        loss_fn(model(torch.randn(N, 5)), torch.randint(0, 3, (N,))).backward()
        guided.step()
    assert [m.information for m in guided.alpha_history] == ["full"] * 5
    assert guided.alpha_history.dropped == {}


def test_generators_of_devices_that_are_not_the_models_are_left_alone(monkeypatch):
    """`torch.manual_seed` would seed those of all devices."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model, loss_fn = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 3)), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters()), model, loss_fn)
    for _ in range(6):
        guided.zero_grad()
        loss_fn(model(torch.randn(40, 5)), torch.randint(0, 3, (40,))).backward()
        guided.step()
    assert {m.information for m in guided.alpha_history} == {"full"}
    assert seeded == []


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_watched_model_is_traced_as_a_bare_one_and_scripted_once_it_is_no_longer_watched():
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), nn.CrossEntropyLoss()
    x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))

    def traced():
        return [node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()]

    bare = traced()
    optimizer = AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    count = len(optimizer.alpha_history)
    assert traced() == bare
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    with pytest.raises(AttributeError, match=r"call optimizer\.detach\(\) first"):
        torch.jit.script(model)
    optimizer.detach()
    assert torch.equal(torch.jit.script(model)(x), model(x))
    assert len(optimizer.alpha_history) == count


@pytest.mark.parametrize("variance", ["sampled", "exact"])
def test_a_hook_of_the_users_on_the_output_runs_once_a_step(variance):
    """Losses are followed back to the outputs of the model, which would run it, too."""
    torch.manual_seed(0)
    model, loss_fn, ran = Keeps(), nn.CrossEntropyLoss(), []
    guided = AlphaGuided(torch.optim.AdamW(model.parameters()), model, loss_fn, variance=variance)
    for _ in range(4):
        guided.zero_grad()
        output = model(torch.randn(N, 5))
        output.register_hook(lambda gradient: ran.append(gradient.shape))
        loss_fn(output, torch.arange(N) % 3).backward()
        guided.step()
    assert ran == [(N, 3)] * 4
    assert guided.alpha_history[-1].information == "full"
