"""The range test: what it finds, and that nothing is left of it."""

import copy
import itertools
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from alpha_optim import AlphaGuided, AlphaScheduler, find_lr
from tests.test_transparency import equal_states


class Net(nn.Module):
    """With buffers, dropout and attributes that a forward pass changes."""

    def __init__(self, wide=32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Dropout(0.1), nn.Linear(wide, 3)
        )
        self.calls, self.seen = 0, []

    def forward(self, x, labels=None):
        self.calls += 1
        self.seen.append(float(x.mean()))
        logits = self.layers(x)
        return logits if labels is None else {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def data(count=512):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 10, generator=generator)
    return x, (x @ torch.randn(10, 3, generator=generator)).argmax(1)


def make_loader(**kwargs):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=32, shuffle=True, **kwargs)


def make(kind=torch.optim.AdamW, lr=1e-3):
    torch.manual_seed(0)
    model = Net()
    return model, kind(model.parameters(), lr=lr)


def everything(model, optimizer, loader):
    """All that has to be as before."""
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "groups": [sorted(group) for group in optimizer.param_groups],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "attributes": (model.calls, list(model.seen)),
        "training": [module.training for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        "loader": None if loader.generator is None else loader.generator.get_state(),
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def train_a_little(model, optimizer):
    for x, y in zip(data()[0].split(32)[:3], data()[1].split(32)[:3], strict=True):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.compatibility("find_lr", "everything bit for bit as before, also after an exception and Ctrl-C")
@pytest.mark.parametrize("interrupted", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("trained", [False, True])
def test_nothing_is_left_of_it(interrupted, trained):
    model, optimizer = make()
    if trained:
        train_a_little(model, optimizer)
    model.layers[1].eval()
    gradients = [param.grad for param in model.parameters()]
    loader = make_loader(generator=torch.Generator().manual_seed(5))
    before = everything(model, optimizer, loader)
    calls = 0

    def loss_fn(output, y):
        nonlocal calls
        calls += 1
        random.random()
        np.random.rand()  # noqa: NPY002
        if calls == 20 and interrupted is not None:
            raise interrupted("stop")
        return functional.cross_entropy(output, y)

    if interrupted is None:
        find_lr(model, optimizer, loader, loss_fn)
        assert calls >= 50
    else:
        with pytest.raises(interrupted, match="stop"):
            find_lr(model, optimizer, loader, loss_fn)
    after = everything(model, optimizer, loader)
    for name, value in before.items():
        assert equal_states(value, after[name]) if isinstance(value, dict) else repr(value) == repr(after[name]), name
    assert all(param.grad is gradient for param, gradient in zip(model.parameters(), gradients, strict=True))
    AlphaScheduler(AlphaGuided(optimizer, model), total_steps=200)  # nothing of the test is in the way


def rate_that_trains_best(kind, rates):
    """By the loss after 150 steps of linear decay."""

    def loss_at(lr):
        model, optimizer = make(kind, lr)
        batches = [batch for _ in range(10) for batch in make_loader(generator=torch.Generator().manual_seed(1))]
        for step, (x, y) in enumerate(batches[:150]):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / 150)
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(functional.cross_entropy(model.eval()(data()[0]), data()[1]))
        return loss if math.isfinite(loss) else math.inf

    return min(rates, key=loss_at)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_it_finds_a_rate_near_the_best(kind):
    best = rate_that_trains_best(kind, [10.0**k for k in (-4, -3, -2, -1, 0, 1)])
    model, optimizer = make(kind)
    finding = find_lr(model, optimizer, make_loader(), nn.CrossEntropyLoss())
    assert finding.lr is not None
    assert 0.1 <= finding.lr / best <= 10.0
    assert f"learning rate {finding.lr:.2g}" in str(finding)
    rates = [m.lr[0] for m in finding.history]
    assert rates[0] == pytest.approx(1e-8)
    assert all(later > earlier for earlier, later in itertools.pairwise(rates))


WAYS = {
    "loss function": (lambda x, y: (x, y), nn.CrossEntropyLoss(), "full"),
    "a function": (lambda x, y: (x, y), functional.cross_entropy, "slopes+variances"),
    "losses of samples": (
        lambda x, y: (x, y),
        lambda out, y: functional.cross_entropy(out, y, reduction="none"),
        "full",
    ),
    "returned loss, by keyword": (lambda x, y: {"x": x, "labels": y}, None, "full"),
    "returned loss, by position": (lambda x, y: (x, y), None, "full"),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_of_writing_a_loss(name):
    batch, loss_fn, information = WAYS[name]
    model, optimizer = make()
    loader = [batch(x, y) for x, y in zip(data()[0].split(32), data()[1].split(32), strict=True)]
    finding = find_lr(model, optimizer, loader, loss_fn)
    assert information in {m.information.value for m in finding.history[3:]}
    assert all(math.isfinite(m.loss_start) for m in finding.history[:20])
    assert finding.lr is not None


def test_groups_keep_their_ratios():
    torch.manual_seed(0)
    model = Net()
    groups = [{"params": model.layers[0].parameters()}, {"params": model.layers[4].parameters(), "lr": 1e-4}]
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    finding = find_lr(model, optimizer, make_loader(), nn.CrossEntropyLoss())
    assert all(m.lr[1] == pytest.approx(0.1 * m.lr[0]) for m in finding.history)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]


def test_it_says_when_it_cannot_tell():
    model, optimizer = make()
    noise = [(torch.randn(8, 10), torch.randint(0, 3, (8,))) for _ in range(10)]
    finding = find_lr(model, optimizer, noise, nn.CrossEntropyLoss(), highest=1e-5)
    assert finding.lr is None
    assert str(finding).startswith("no learning rate found: the loss did not surely fall and rise again")


def test_the_picture_marks_the_rate():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model, optimizer = make()
    finding = find_lr(model, optimizer, make_loader(), nn.CrossEntropyLoss())
    loss, alpha = finding.plot().axes
    assert loss.get_xscale() == "log"
    assert any(f"suggested: {finding.lr:.2g}" in text.get_text() for text in alpha.get_legend().get_texts())


def test_bad_input():
    model, optimizer = make()
    loader, loss_fn = make_loader(), nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="can be used only once"):
        find_lr(model, optimizer, iter(loader), loss_fn)
    with pytest.raises(TypeError, match="takes the bare optimizer"):
        find_lr(model, AlphaGuided(optimizer, model), loader, loss_fn)
    with pytest.raises(ValueError, match="at least 40 steps"):
        find_lr(model, optimizer, loader, loss_fn, steps=10)
    with pytest.raises(ValueError, match="gave no batch"):
        find_lr(model, optimizer, [], loss_fn)
    with pytest.raises(ValueError, match="rates must climb"):
        find_lr(model, optimizer, loader, loss_fn, lowest=1.0, highest=0.1)
    with pytest.raises(TypeError, match=r"pairs \(input, target\)"):
        find_lr(model, optimizer, [torch.randn(4, 10)], loss_fn)
    with pytest.raises(TypeError, match="the model returned no loss"):
        find_lr(model, optimizer, [torch.randn(4, 10)])
    with pytest.raises(ValueError, match="needs a learning rate above 0"):
        find_lr(model, torch.optim.SGD(model.parameters(), lr=0.0), loader, loss_fn)


class Stream(torch.utils.data.IterableDataset):
    """Goes on where it stopped, and draws from generators of its own."""

    def __init__(self):
        self.position, self.torchs = 0, torch.Generator().manual_seed(1)
        self.pythons, self.numpys = random.Random(2), np.random.RandomState(3)

    def __iter__(self):
        for _ in range(320):
            self.position += 1
            shift = self.pythons.random() + self.numpys.rand()
            x = torch.randn(8, generator=self.torchs) + shift
            yield x, int(self.position % 3)


class Epochs(torch.utils.data.Sampler):
    """Another order in every epoch, by Python's own generator."""

    def __init__(self, count):
        self.count, self.epoch, self.dice = count, 0, random.Random(4)

    def __len__(self):
        return self.count

    def __iter__(self):
        self.epoch += 1
        order = list(range(self.count))
        self.dice.shuffle(order)
        return iter(order)


class Numbered:
    """A loader of one's own that can say where it is, as torchdata's can."""

    def __init__(self):
        self.place = [0]

    def state_dict(self):
        return {"place": self.place[0]}

    def load_state_dict(self, state):
        self.place = [state["place"]]

    def __iter__(self):
        for _ in range(20):
            self.place[0] += 1
            yield torch.randn(16, 8, generator=torch.Generator().manual_seed(self.place[0])), torch.arange(16) % 3


def first_batches(loader, count=3):
    return [x.clone() for (x, _), _ in zip(loader, range(count), strict=False)]


@pytest.mark.parametrize("kind", ["stream", "sampler", "persistent workers", "numbered"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_loader_goes_on_as_if_nothing_had_been(kind):
    def make_one():
        inputs, targets = torch.randn(320, 8, generator=torch.Generator().manual_seed(0)), torch.arange(320) % 3
        pairs = torch.utils.data.TensorDataset(inputs, targets)
        if kind == "stream":
            return torch.utils.data.DataLoader(Stream(), batch_size=16)
        if kind == "sampler":
            return torch.utils.data.DataLoader(pairs, batch_size=16, sampler=Epochs(320))
        if kind == "numbered":
            return Numbered()
        return torch.utils.data.DataLoader(
            pairs, batch_size=16, shuffle=True, num_workers=1, persistent_workers=True,
            generator=torch.Generator().manual_seed(6),
        )  # fmt: skip

    untouched, tested = make_one(), make_one()
    model = nn.Linear(8, 3)
    find_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), tested, nn.CrossEntropyLoss())
    for expected, found in zip(first_batches(untouched), first_batches(tested), strict=True):
        assert torch.equal(expected, found)


def test_a_second_ctrl_c_while_everything_is_put_back_waits(monkeypatch):
    """Somebody presses Ctrl-C twice: once in the test, once while parameters are written."""
    model, optimizer = make()
    before = copy.deepcopy(model.state_dict())
    loader, calls = make_loader(), 0
    original = torch.Tensor.copy_

    def impatient(tensor, *args, **kwargs):
        nonlocal calls
        if calls == 20:
            calls += 1
            os.kill(os.getpid(), signal.SIGINT)
        return original(tensor, *args, **kwargs)

    def loss_fn(output, y):
        nonlocal calls
        calls += 1
        if calls == 20:
            monkeypatch.setattr(torch.Tensor, "copy_", impatient)
            raise KeyboardInterrupt
        return functional.cross_entropy(output, y)

    with pytest.raises(KeyboardInterrupt):
        find_lr(model, optimizer, loader, loss_fn)
    monkeypatch.undo()
    assert calls == 21
    assert equal_states(before, model.state_dict())
    assert not optimizer.state


def test_batches_of_any_form_with_the_loss_said():
    model = nn.Linear(8, 3)
    batches = [{"x": torch.randn(16, 8), "y": torch.arange(16) % 3} for _ in range(20)]

    def loss_of_batch(model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    finding = find_lr(model, optimizer, batches, loss_of_batch=loss_of_batch)
    assert len(finding.history) > 20
    assert finding.history[-1].information != "slopes"
    with pytest.raises(ValueError, match="loss_fn or loss_of_batch, not both"):
        find_lr(model, optimizer, batches, nn.CrossEntropyLoss(), loss_of_batch=loss_of_batch)
    with pytest.raises(TypeError, match=r"pairs .* loss_of_batch=lambda model, batch"):
        find_lr(model, optimizer, batches, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="LBFGS evaluates a closure several times"):
        find_lr(model, torch.optim.LBFGS(model.parameters()), batches, loss_of_batch=loss_of_batch)


@pytest.mark.filterwarnings("ignore:no slopes of single samples:UserWarning")
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_loss_that_calls_parts_of_the_model_only(kind):
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)

    def loss_of_batch(model, batch):
        return functional.cross_entropy(model[2](model[1](model[0](batch[0]))), batch[1])

    assert len(find_lr(model, optimizer, make_loader(), loss_of_batch=loss_of_batch).history) > 20


def test_data_are_not_copied(monkeypatch):
    """What a data set holds in a dictionary or a list of arrays stays the one there is."""

    class Shards(torch.utils.data.Dataset):
        def __init__(self):
            self.data = {"x": torch.randn(5000, 8)}
            self.arrays = [np.random.default_rng(0).normal(size=(5000, 8))]

        def __len__(self):
            return 5000

        def __getitem__(self, place):
            return self.data["x"][place], place % 3

    copied = []
    original = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, *a, **k: copied.append(t.numel()) or original(t, *a, **k))
    loader = torch.utils.data.DataLoader(torch.utils.data.ConcatDataset([Shards(), Shards()]), batch_size=32)
    model = nn.Linear(8, 3)
    find_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, nn.CrossEntropyLoss())
    assert max(copied) < 5000


class Drawing(Numbered):
    """Asked where it is, it makes an iterator, and draws a seed for it, as torchdata's does."""

    def state_dict(self):
        torch.rand(1)
        return super().state_dict()

    def load_state_dict(self, state):
        torch.rand(1)
        super().load_state_dict(state)


def test_a_loader_that_draws_when_it_is_asked_moves_no_random_number():
    model, before = nn.Linear(8, 3), torch.get_rng_state()
    find_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), Drawing(), nn.CrossEntropyLoss())
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_in_another_order_are_refused_by_name():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        TypeError, match=r"the order is find_lr\(model, optimizer, loader, loss_fn\), got SGD and Linear"
    ):
        find_lr(optimizer, model, [(torch.ones(4, 2), torch.ones(4, 1))], nn.MSELoss())
