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


def iterate(guided, net, loss_fn, x, y, scheduler=None):
    """One iteration of the textbook loop."""
    guided.zero_grad()
    loss_fn(net(x), y).backward()
    guided.step()
    if scheduler is not None:
        scheduler.step()


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
        iterate(guided, net, loss_fn, x * math.nan if step == 4 else x, y, scheduler)
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
            iterate(guided, net, loss_fn, x, y)
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
        iterate(guided, net, loss_fn, x, x[:, :3], scheduler)
    torch.set_num_threads(1)
    return record(guided)


def unseen_term(rank, size, optimizer, sampled, returns):
    """A penalty that no loss function sees, read at the end; what was known of each step."""
    model, loss_fn = (ReturnsLoss().double() if returns else mlp()), nn.CrossEntropyLoss()
    net = wrapped(model, size)
    variance = "sampled" if sampled else "exact"
    guided = AlphaGuided(
        OPTIMIZERS[optimizer](model.parameters()), net, None if returns else loss_fn, variance=variance
    )
    for step in range(20):
        x, y = of_rank(step, rank, size, total=64)
        guided.zero_grad()
        loss = net(x, y)["loss"] if returns else loss_fn(net(x), y)
        (loss + sum(param.square().sum() for param in model.parameters())).backward()
        guided.step()
    return [information for information, _ in record(guided).values()]


def unequal(rank, size, counts):
    """Batches of unequal size, or micro-batches in one process: sampled variances over those of all samples."""
    found = []
    for variance in ("sampled", "exact"):
        model, loss_fn = mlp(), nn.CrossEntropyLoss()
        net = wrapped(model, size)
        guided = AlphaGuided(OPTIMIZERS["momentum"](model.parameters()), net, loss_fn, variance=variance)
        for step in range(34):
            parts = [part.split(list(counts)) for part in batch(step, total=sum(counts))]
            guided.zero_grad()
            for part in [rank] if size > 1 else range(len(counts)):
                x, y = parts[0][part], parts[1][part]
                (loss_fn(net(x), y) * (1.0 if size > 1 else 1.0 / len(counts))).backward()
            guided.step()
        ends = [m.slope_variance_end for m in guided.alpha_history]
        found.append(ends)
    anew = [n for n in range(1, len(ends)) if found[0][n] != found[0][n - 1]]
    return [found[0][n] / found[1][n] for n in anew]


def micro_batches(rank, size, view):
    """Two passes a step without ``no_sync``; DDP moves the gradients into other tensors between them."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    net = wrapped(model, size, **({"gradient_as_bucket_view": view} if size > 1 else {}))
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), net, loss_fn, variance="exact")
    for step in range(4):
        x, y = batch(step)
        guided.zero_grad()
        for part in (slice(0, 12), slice(12, None)):
            (loss_fn(net(x[part][rank::size]), y[part][rank::size]) / 2).backward()
        guided.step()
    return record(guided)


def apart_later(rank, size):
    """Ten steps together, then every process by itself; read at the end."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    net = wrapped(model, size)
    guided = AlphaGuided(OPTIMIZERS["sgd"](model.parameters()), net, loss_fn)
    for step in range(30):
        x, y = of_rank(step, rank, size)
        with contextlib.nullcontext() if step < 10 else net.no_sync():
            iterate(guided, net, loss_fn, x, y)
    return len(record(guided)), guided.alpha_history.dropped


def averaged_now_and_then(rank, size, period):
    """Every rank makes steps of its own, and models are averaged; the error of a scheduler."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    guided = AlphaGuided(OPTIMIZERS["sgd"](model.parameters()), model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    try:
        for step in range(3 * period):
            x, y = of_rank(step, rank, size)
            iterate(guided, model, loss_fn, x, y, scheduler)
            if (step + 1) % period == 0:
                with torch.no_grad():
                    for param in model.parameters():
                        torch.distributed.all_reduce(param)
                        param /= size
    except ValueError as error:
        return str(error)
    return None


def loaded_on_one_rank(rank, size):
    """Rank 0 goes on from a state of its optimizer, the others begin."""
    errors = []
    for steered in (False, True):
        state = None
        for _ in range(2):
            model, loss_fn = mlp(), nn.CrossEntropyLoss()
            net = wrapped(model, size)
            guided = AlphaGuided(OPTIMIZERS["sgd"](model.parameters()), net, loss_fn)
            scheduler = AlphaScheduler(guided, Hold()) if steered else None
            if state is not None and rank == 0:
                guided.load_state_dict(state)
            try:
                for step in range(4):
                    x, y = of_rank(step, rank, size)
                    iterate(guided, net, loss_fn, x, y, scheduler)
            except RuntimeError as error:
                errors.append(str(error))
            state = guided.state_dict()
    return errors


def out_of_data(rank, size):
    """Losses handed over of a batch that is empty on the last rank at one step."""
    model = mlp()
    net = wrapped(model, size)
    guided = AlphaGuided(OPTIMIZERS["sgd"](model.parameters()), net, variance="exact")
    for step in range(6):
        x, y = of_rank(step, rank, size)
        if step == 3:
            x, y = batch(step, total=BATCH // size)
            x, y = (x, y) if rank == 0 else (x[:0], y[:0])
        guided.zero_grad()
        guided.backward(functional.cross_entropy(net(x), y, reduction="none"))
        guided.step()
    return record(guided)


def said(function, *args):
    """What a function returns, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    here = pathlib.Path(__file__).parent  # warnings point at the line of the user, who is we
    return result, [str(entry.message) for entry in caught if here in pathlib.Path(entry.filename).parents]
