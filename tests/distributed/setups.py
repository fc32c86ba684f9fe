"""Models, data and loops that run on one process or on several; rank r of R gets every R-th sample."""

import contextlib
import math
import pathlib
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from alpha_optim.distributed import Sum
from alpha_optim.observe.random_state import untouched
from alpha_optim.slopes import forward_mode, repetition

FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp = pytest.mark.skipif(not FSDP_ON_CPU, reason="fully_shard runs on CPUs from torch 2.7 on")
BATCH = 24
TRUTH = torch.randn(5, 3, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.5),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


class Branches(nn.Module):
    """Two ways to the output, of which a call takes one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other, self.head = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x, other=False):
        return self.head(torch.tanh(self.other(x) if other else self.one(x)))


class ReturnsLoss(nn.Module):
    """A model in the manner of Transformers; divides by the number of targets it is told, if it is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x, labels, num_items_in_batch=None):
        logits = self.body(x)
        if num_items_in_batch is None:
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}
        return {"loss": functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch}


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(step, dtype=torch.float64, total=BATCH):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x @ TRUTH).argmax(1)


def of_rank(step, rank, size, **kwargs):
    x, y = batch(step, **kwargs)
    return x[rank::size], y[rank::size]


NUMBERS = (
    "alpha", "alpha_std", "step_length", "loss_start", "loss_end", "slope_start", "slope_end", "loss_variance_start",
    "loss_variance_end", "slope_variance_start", "slope_variance_end", "samples_start", "samples_end",
)  # fmt: skip


def record(optimizer):
    """What was measured, as plain values by iteration."""
    return {
        m.iteration: (str(m.information), [float(getattr(m, name)) for name in NUMBERS])
        for m in optimizer.alpha_history
    }


def wrapped(model, size, **kwargs):
    return DistributedDataParallel(model, **kwargs) if size > 1 else model


def plain(
    rank, size, optimizer="adamw", backend="auto", variance="exact", given="ddp", dtype=torch.float64, total=BATCH
):
    """The textbook loop; ``given`` says what AlphaGuided gets, and who averages the gradients."""
    model, loss_fn = mlp(dtype), nn.CrossEntropyLoss()
    net = wrapped(model, size) if given != "by hand" else model
    to_give = {"ddp": net, "inner": model, "by hand": model, "nothing": None}[given]
    guided = AlphaGuided(
        OPTIMIZERS[optimizer](model.parameters()),
        to_give,
        None if to_give is None else loss_fn,
        backend=backend,
        variance=variance,
    )
    for step in range(7):
        x, y = of_rank(step, rank, size, dtype=dtype, total=total)
        guided.zero_grad()
        loss_fn(net(x), y).backward()
        if given == "by hand" and size > 1:
            for param in model.parameters():
                torch.distributed.all_reduce(param.grad)
                param.grad /= size
        guided.step()
    return record(guided)


def way(rank, size, name, variance="exact"):
    """A loop with something special; in one process, the same passes over all samples."""
    model = Branches().double()
    options = {
        "bucket view": {"gradient_as_bucket_view": True},
        "static graph": {"static_graph": True},
        "unused": {"find_unused_parameters": True},
        "unused on one rank": {"find_unused_parameters": True},
    }.get(name, {})
    if "unused" not in name:
        model.other = None
    net, loss_fn = wrapped(model, size, **options), nn.CrossEntropyLoss()
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), net, loss_fn, variance=variance)

    def sent(x, y, share=1.0, **kwargs):
        (share * loss_fn(net(x, **kwargs), y)).backward()

    for step in range(7):
        guided.zero_grad()
        x, y = of_rank(step, rank, size)
        every = batch(step)
        parts = [(every[0][r::2], every[1][r::2]) for r in range(2)]
        if name == "accumulation":
            for half in range(2):
                mine = slice(half * len(x) // 2, (half + 1) * len(x) // 2)
                quiet = net.no_sync() if size > 1 and half == 0 else contextlib.nullcontext()
                if size > 1:
                    with quiet:
                        sent(x[mine], y[mine], 0.5)
                else:
                    for part in parts:
                        third = slice(half * len(part[0]) // 2, (half + 1) * len(part[0]) // 2)
                        sent(part[0][third], part[1][third], 0.25)
        elif name == "unequal batches":
            cut = 17
            if size > 1:
                sent(*((t[:cut], t[cut:])[rank] for t in every))
            else:  # the mean of the ranks' means
                sent(every[0][:cut], every[1][:cut], 0.5)
                sent(every[0][cut:], every[1][cut:], 0.5)
        elif name == "unused on one rank":
            if size > 1:
                sent(x, y, other=rank == 1)
            else:
                sent(*parts[0], 0.5)
                sent(*parts[1], 0.5, other=True)
        elif name == "a rank without data":
            if size > 1 and rank == 1:
                (net(x[:0]).sum() * 0.0).backward()
            elif size > 1:
                sent(x, y)
            else:
                sent(*parts[0], 0.5)
        elif name == "functional":
            guided.backward(functional.cross_entropy(net(x), y, reduction="none"))
        else:
            scale = 1024.0 if name == "scaled" else 1.0
            sent(x, y, scale)
            if name == "scaled":
                for param in model.parameters():
                    if param.grad is not None:
                        param.grad.div_(scale)
            if name == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        guided.step()
    return record(guided)


WAYS = (
    "bucket view", "static graph", "unused", "unused on one rank", "accumulation", "unequal batches",
    "a rank without data", "functional", "scaled", "clipped",
)  # fmt: skip


def returns_loss(rank, size, variance="exact"):
    model = ReturnsLoss().double()
    net = wrapped(model, size)
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), net, variance=variance)
    for step in range(7):
        guided.zero_grad()
        net(*of_rank(step, rank, size))["loss"].backward()
        guided.step()
    return record(guided)


def unrepeatable_dropout(rank, size, unseen):
    """Dropout of which a repetition drops other units, as fused attention on a GPU; ``unseen``: a term of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 3))
    loss_fn, net = nn.CrossEntropyLoss(), wrapped(model, size)
    torch.manual_seed(1 + rank)
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), net, loss_fn, backend="layerwise")

    def others(call, replay, seed):
        return untouched(call.random.own, 1000 + (seed or 0))

    with (
        mock.patch.object(repetition, "_random_numbers", others),
        mock.patch.object(forward_mode.ForwardMode, "_may_draw_others", return_value=True),
    ):
        for step in range(8):
            x, y = of_rank(step, rank, size, dtype=torch.float32, total=64)
            guided.zero_grad()
            (loss_fn(net(x), y) + unseen * sum(p.sum() for p in model.parameters())).backward()
            guided.step()
            list(guided.alpha_history)  # sums over ranks are compared when they are read
        return record(guided)


def shares_of_one_mean(rank, size, how):
    """Losses divided by the targets of all ranks, as the Trainer does it; multiplied, since gradients are averaged."""
    model = ReturnsLoss().double()
    net = wrapped(model, size)
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), net, variance="exact")
    for step in range(5):
        guided.zero_grad()
        loss = net(*of_rank(step, rank, size), num_items_in_batch=torch.tensor(float(BATCH)))["loss"]
        if how == "in place":
            loss *= size
        else:
            loss = loss * size
        loss.backward()
        guided.step()
    return record(guided)


def one_bad_batch(rank, size):
    """A batch that is not finite in the middle; what was known of variances stays."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    net = wrapped(model, size)
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), net, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    for step in range(9):
        x, y = of_rank(step, rank, size, total=16)
        guided.zero_grad()
        loss_fn(net(x * math.nan if step == 4 else x), y).backward()
        guided.step()
        scheduler.step()
    return record(guided)


def steps_that_wait(rank, size):
    """Of 40 steps that are only watched, those in which a sum over ranks is read that was begun in the same step."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    net, waiting, begun, step = wrapped(model, size), [], {}, 0
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), net, loss_fn)
    begin, read = Sum.__init__, Sum.read

    def noted(self, *args):
        begun[id(self)] = step
        begin(self, *args)

    def reads(self):
        if begun[id(self)] == step:
            waiting.append(step)
        return read(self)

    with mock.patch.object(Sum, "__init__", noted), mock.patch.object(Sum, "read", reads):
        for step in range(40):
            x, y = of_rank(step, rank, size)
            guided.zero_grad()
            loss_fn(net(x), y).backward()
            guided.step()
    return waiting


def uneven_threads(rank, size):
    """Sums of float32 in another order on every rank."""
    torch.set_num_threads(1 + rank)
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(5, 512), nn.Tanh(), nn.Linear(512, 512), nn.Linear(512, 3)), nn.MSELoss()
    net = wrapped(model, size)
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-3), net, loss_fn)
    scheduler = AlphaScheduler(guided)
    for step in range(12):
        x, _ = of_rank(step, rank, size, dtype=torch.float32)
        guided.zero_grad()
        loss_fn(net(x), x[:, :3]).backward()
        guided.step()
        scheduler.step()
    torch.set_num_threads(1)
    return record(guided)


def said(function, *args):
    """What a function returns, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    here = pathlib.Path(__file__).parent  # warnings point at the line of the user, who is we
    return result, [str(entry.message) for entry in caught if here in pathlib.Path(entry.filename).parents]
