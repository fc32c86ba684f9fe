"""What alpha costs: training steps with and without it, interleaved in one process, as ratios.

A few steps of the plain loop and a few of a variant take turns; a ratio is that of the sums over a block, and
the median over all blocks is reported. A block is as long as variances of slopes stay, so that each has its
share of measuring them anew. Beside the ratio stands a floor: multiplications that a variant adds to
those of a plain step, plus the time that its passes over the parameters take at the memory bandwidth of this
machine.

    python -m examples.benchmarks.cost              # a table on the screen
    python -m examples.benchmarks.cost --models ResNet --optimizers momentum    # other cases
    python -m examples.benchmarks.cost --all        # every case and docs/benchmarks.md, within an hour
    python -m examples.benchmarks.report            # docs/benchmarks.md from the results that are kept
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from alpha_optim.measure.refresh import interval
from alpha_optim.policies.calibrate.calibrate_then_anneal import SPARSE
from examples.benchmarks import report
from examples.benchmarks.models import MODELS, OPTIMIZERS
from examples.benchmarks.tables import RESULTS

Step = Callable[[Tensor, Tensor], None]
OURS: dict[str, dict[str, Any]] = {
    "gradients": {"backend": "gradients"},
    "default": {},
    "every=10": {"every": 10},
    "steered": {"every": None, "steered": True},
    "exact": {"variance": "exact"},
    "layerwise": {"backend": "layerwise"},
}
REFERENCES = ("cached", "Cockpit", "vmap")
SECONDS = 0.15
"""How long plain and measured steps take turns, in seconds of plain steps."""
WARM_UP = 200
"""Steps before anything is timed, with batches of two."""
SLOW = 0.3
"""Plain steps of so many seconds are timed in three pairs of blocks."""
PASSES = {"SGD": 3, "momentum": 5, "AdamW": 10}
"""How often the numbers of a parameter are read or written for a measured step: a product with the previous
gradient and a norm; with the buffer at both ends and a norm; a copy, a difference, a norm, two products."""
GUARD_PASSES = 4
"""The same for the guard at every step: norms of gradients and parameters, a copy."""


class Calibrated(Hold):
    """`CalibrateThenAnneal` once it has found the rate: a measurement now and then."""

    def wants(self, iteration: int) -> bool:
        return iteration % SPARSE == 0


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Step:
    """A training step; with options that of `AlphaGuided`."""
    loss_fn, scheduler = nn.CrossEntropyLoss(), None
    steered = options.pop("steered", False)
    if options.pop("guided", False):
        optimizer = AlphaGuided(optimizer, model, loss_fn, **options)

    made = 0

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal scheduler, made
        made += 1
        if steered and made == WARM_UP + 1:
            # Not before: its guard would see the loss of other batches, and take steps back for ever.
            scheduler = AlphaScheduler(optimizer, Calibrated())
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    return step


def cockpit(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """A training step that Cockpit watches."""
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.quantities import Alpha
    from cockpit.utils import schedules

    loss_fn, each = extend(nn.CrossEntropyLoss()), nn.CrossEntropyLoss(reduction="none")
    extend(model)
    watcher = Cockpit(model.parameters(), quantities=[Alpha(schedules.linear(1))])
    count = 0

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal count
        optimizer.zero_grad()
        output = model(x)
        loss = loss_fn(output, y)
        losses = each(output.detach(), y)
        info = {"batch_size": len(y), "individual_losses": losses, "loss": loss, "optimizer": optimizer}
        with watcher(count, info=info):
            loss.backward()
        optimizer.step()
        count += 1

    return step


def vmap(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """A training step and, beside it, gradients of single samples by ``torch.func.vmap``."""
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss_of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (x.unsqueeze(0),))
        return nn.functional.cross_entropy(output, y.unsqueeze(0))

    gradients = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
    train = plain(model, optimizer)

    def step(x: Tensor, y: Tensor) -> None:
        gradients(params, x, y)
        train(x, y)

    return step


def make(variant: str, model: str, optimizer: str) -> Step:
    """Build a fresh model and the step of a variant."""
    torch.manual_seed(0)
    net = MODELS[model].build()
    base = OPTIMIZERS[optimizer](net)
    if variant == "Cockpit":
        return cockpit(net, base)
    if variant == "vmap":
        return vmap(net, base)
    options = {"backend": "cached", "variance": "exact"} if variant == "cached" else OURS.get(variant, {})
    return plain(net, base, guided=variant != "plain", **options)


def runs(variant: str, model: str, optimizer: str) -> bool:
    """Whether a reference runs on a case, and is worth its time there."""
    if variant == "layerwise":  # elsewhere it is the default
        return optimizer == "SGD" and model in ("MLP", "CNN")
    if variant == "Cockpit":
        return model in ("MLP", "CNN") and importlib.util.find_spec("cockpit") is not None
    return model in ("MLP", "CNN") if variant in REFERENCES else True


def warm_up(step: Step, model: str, batch: int) -> None:
    """Pass the first iterations, in which variances are measured more often, with batches of two."""
    x, y = MODELS[model].batch(2)
    for _ in range(WARM_UP):
        step(x, y)
    x, y = MODELS[model].batch(batch)
    for _ in range(2):
        step(x, y)


def seconds(step: Step, x: Tensor, y: Tensor, count: int) -> float:
    """Time of one step, averaged over a block."""
    begin = time.perf_counter()
    for _ in range(count):
        step(x, y)
    return (time.perf_counter() - begin) / count


def measure(model: str, optimizer: str, batch: int, rounds: int, references: bool) -> dict[str, Any]:
    """Ratios to the plain step of every variant, and floors of ours."""
    x, y = MODELS[model].batch(batch)
    base = make("plain", model, optimizer)
    warm_up(base, model, batch)
    names = [*OURS, *(REFERENCES if references else ())]
    result: dict[str, Any] = {"model": model, "optimizer": optimizer, "batch": batch, "ratio": {}, "floor": {}}
    label = f"{model}, {optimizer}, batch {batch}"
    times: list[float] = []
    for name in tqdm(names, desc=label, leave=False, disable=None):
        if not runs(name, model, optimizer):
            continue
        ours = name in OURS
        step = make(name, model, optimizer)
        if ours:
            warm_up(step, model, batch)
        once = seconds(base, x, y, 3)
        count, ratios = block(name, batch, once), []
        for _ in range((rounds if once < SLOW else 3) if ours else 2):
            alone, measured = side_by_side(base, step, x, y, count, max(1, math.ceil(SECONDS / once)))
            ratios.append(measured / alone)
            times.append(alone / count)
        result["ratio"][name] = statistics.median(ratios)
        del step
    result["plain_ms"] = 1e3 * statistics.median(times)
    result["floor"] = floors(model, optimizer, batch, result["plain_ms"] / 1e3)
    return result


def side_by_side(base: Step, step: Step, x: Tensor, y: Tensor, count: int, at_a_time: int) -> tuple[float, float]:
    """Seconds of a block without and with alpha, a few steps of each in turn: what disturbs, disturbs both."""
    alone = measured = 0.0
    for begin in range(0, count, at_a_time):
        few = min(at_a_time, count - begin)
        alone += few * seconds(base, x, y, few)
        measured += few * seconds(step, x, y, few)
    return alone, measured


def block(variant: str, batch: int, plain_seconds: float) -> int:
    """Steps in a block: enough for a steady figure and for its share of measuring variances anew."""
    if variant in REFERENCES:
        return 1
    if variant in ("default", "layerwise"):
        return interval(batch)
    steps = min(interval(batch), math.ceil(4.0 * SECONDS / plain_seconds))
    return 10 * math.ceil(steps / 10) if variant in ("every=10", "steered") else max(2, steps)


def multiplications(step: Step, x: Tensor, y: Tensor) -> int:
    """Operations of matrix products and convolutions in one step."""
    with FlopCounterMode(display=False) as counter:
        step(x, y)
    return int(counter.get_total_flops())


def floors(model: str, optimizer: str, batch: int, plain_seconds: float) -> dict[str, float]:
    """What must be paid for: counted multiplications and bytes."""
    x, y = MODELS[model].batch(batch)
    alone = multiplications(make("plain", model, optimizer), x, y)
    exact = make("exact", model, optimizer)
    exact(x, y)
    exact(x, y)
    all_samples = multiplications(exact, x, y) - alone
    size = sum(param.numel() for param in MODELS[model].build().parameters())
    one_pass = 4.0 * size / bandwidth() / plain_seconds
    passes = PASSES[optimizer] * one_pass
    share = min(1.0, 16 / batch) / interval(batch)
    sampled = make("default", model, optimizer)
    sampled(x, y)
    sampled(x, y)
    few = (multiplications(sampled, x, y) - alone) / interval(batch)
    few = min(few, share * all_samples) if optimizer != "SGD" else few
    return {
        "gradients": 1.0 + passes,
        "default": 1.0 + passes + few / alone,
        "steered": 1.0 + GUARD_PASSES * one_pass + (passes + few / alone) / SPARSE,
        "exact": 1.0 + passes + all_samples / alone,
    }


def bandwidth() -> float:
    """Bytes per second that one thread reads from memory."""
    a, b = torch.randn(1 << 22), torch.randn(1 << 22)
    torch.dot(a, b)
    best = min(_timed(lambda: torch.dot(a, b)) for _ in range(10))
    return 8.0 * a.numel() / best


def _timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def peak_memory(variant: str, model: str, optimizer: str, batch: int) -> float:
    """Peak memory of a process that makes some steps, in bytes."""
    command = [
        sys.executable,
        "-m",
        "examples.benchmarks.cost",
        "--peak",
        variant,
        model,
        optimizer,
        str(batch),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def report_peak(variant: str, model: str, optimizer: str, batch: int) -> None:
    step = make(variant, model, optimizer)
    x, y = MODELS[model].batch(batch)
    for _ in range(6):
        step(x, y)
    print(own_peak())


def own_peak() -> float:
    """Peak memory of this process in bytes; getrusage would count that of the process it was started from."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["MLP", "CNN"], choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=["SGD", "AdamW"], choices=list(OPTIMIZERS))
    parser.add_argument("--batch", nargs="+", type=int, default=[128])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of blocks per variant")
    parser.add_argument("--references", action="store_true", help="also Cockpit, cached and vmap")
    parser.add_argument("--all", action="store_true", help="every case, kept; then peak memory and the report")
    parser.add_argument("--peak", nargs=4, metavar=("VARIANT", "MODEL", "OPTIMIZER", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.peak:
        report_peak(args.peak[0], args.peak[1], args.peak[2], int(args.peak[3]))
        return
    if args.all:
        args.models, args.optimizers, args.batch = list(MODELS), list(OPTIMIZERS), [128, 32]
        args.references = True
    columns = [*OURS, *(REFERENCES if args.references else ())]
    print("time of a training step as a multiple of the plain step (in brackets: the floor), one CPU thread")
    print(f"{'':32}{'plain':>9} " + "".join(f"{name:>16}" for name in columns))
    for case in itertools.product(args.models, args.optimizers, args.batch):  # the last result of a case counts
        result = measure(*case, args.rounds, args.references)
        print(f"{'{}, {}, batch {}'.format(*case):32}{result['plain_ms']:6.0f} ms " + row(result, columns))
        sys.stdout.flush()
        if args.all:
            append(RESULTS / "cost.jsonl", result)
    if args.all:
        memory()
        report.write()


def append(path: Path, result: dict[str, Any]) -> None:
    """Add a raw result to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def memory() -> None:
    """Measure the peak memory of some cases, each in a process of its own."""
    for model, optimizer in itertools.product(("MLP", "transformer"), ("SGD", "AdamW")):
        size = 4 * sum(param.numel() for param in MODELS[model].build().parameters())
        alone = peak_memory("plain", model, optimizer, 32)
        for variant in ("default", "exact", "cached"):
            extra = (peak_memory(variant, model, optimizer, 32) - alone) / size
            case = {"model": model, "optimizer": optimizer, "batch": 32, "variant": variant}
            append(RESULTS / "memory.jsonl", {**case, "extra": extra})


def row(result: dict[str, Any], columns: list[str]) -> str:
    """The ratios of one case, with floors where there are any."""
    cells = []
    for name in columns:
        ratio, floor = result["ratio"].get(name), result["floor"].get(name)
        text = "-" if ratio is None else f"{ratio:.2f}" if floor is None else f"{ratio:.2f} ({floor:.2f})"
        cells.append(f"{text:>16}")
    return "".join(cells)


if __name__ == "__main__":
    main()
