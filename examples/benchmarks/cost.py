"""What alpha costs: training steps with and without it, in turn, in one process, as ratios.

Steps of several kinds make a run: those in which variances over samples stand, those in which they are measured anew,
those in which that is checked, and with `every` those that are not measured. Each kind is timed beside plain steps; the
medians are put together by how often each kind comes in a long run ("default", ...) and in its first 100 steps. Beside
the ratio stands a floor: multiplications that a variant adds to those of a plain step, plus the time that its passes
over the parameters take at the memory bandwidth of this machine.

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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from alpha_optim.measure.refresh import SHARE, interval
from alpha_optim.policies.calibrate.calibrate_then_anneal import SPARSE
from alpha_optim.slopes.forward_mode import CHECK_AGAIN
from examples.benchmarks import report
from examples.benchmarks.models import MODELS, OPTIMIZERS
from examples.benchmarks.tables import RESULTS

Step = Callable[[Tensor, Tensor], None]
OURS: dict[str, dict[str, Any]] = {
    "default": {},
    "gradients": {"backend": "gradients"},
    "every=10": {"every": 10},
    "steered": {"every": None, "steered": True},
    "guard": {"every": lambda n: False, "steered": True},
    "exact": {"variance": "exact"},
    "layerwise": {"backend": "layerwise"},
}
REFERENCES = ("cached", "Cockpit", "vmap")
SECONDS = 1.5
"""How long each kind of step is timed, in seconds of plain steps."""
FEWEST, MOST = 3, 200
"""Steps of one kind that are timed."""
SLOW, SKIPPED = 0.4, ("gradients", "every=10", "steered", "guard")
"""Plain steps of so many seconds are timed with these variants left out: they add less than the default."""
FIRST = 100
"""The first steps of a run, in which variances are measured more often."""
PASSES = {"SGD": 3, "momentum": 9, "AdamW": 9}
"""How often the numbers of a parameter are read or written for a measured step: a product with the previous gradient
and a norm; a copy, a difference and two products with it from the cache, one product at the end."""
GUARD_PASSES = 4
"""The same for the guard at every step: norms of gradients and parameters, a copy."""


ALL = [
    *itertools.product(("MLP", "CNN"), ("SGD", "momentum", "AdamW"), (128, 32)),
    *itertools.product(("MLP 1500-700",), ("SGD", "momentum", "AdamW"), (96,)),
    *itertools.product(("small",), ("SGD", "AdamW"), (32,)),
    ("0.5 ms", "SGD", 64),
    ("0.5 ms", "AdamW", 32),
    *itertools.product(("ResNet",), ("SGD", "momentum", "AdamW"), (32,)),
    *itertools.product(("transformer",), ("SGD", "AdamW"), (32,)),
    ("ViT", "AdamW", 32),
    ("GPT", "AdamW", 8),
    ("GPT", "AdamW", 32),
]
"""The cases of docs/benchmarks.md."""


class Calibrated(Hold):
    """`CalibrateThenAnneal` once it has found the rate: a measurement now and then."""

    def wants(self, iteration: int) -> bool:
        return iteration % SPARSE == 0


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, autocast: bool = False, **options: Any) -> Step:
    """A training step, in bf16 or not; with options that of `AlphaGuided`, which is its attribute ``optimizer``."""
    loss_fn, scheduler = nn.CrossEntropyLoss(), None
    steered = options.pop("steered", False)
    if options.pop("guided", False):
        optimizer = AlphaGuided(optimizer, model, loss_fn, **options)
        if steered:
            scheduler = AlphaScheduler(optimizer, Calibrated())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext():
            output = model(x)
            loss = loss_fn(output.flatten(0, y.dim() - 1), y.flatten())
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    step.optimizer = optimizer  # type: ignore[attr-defined] # - for those who want to know
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


def seconds(step: Step, x: Tensor, y: Tensor) -> float:
    """Time of one step."""
    begin = time.perf_counter()
    step(x, y)
    return time.perf_counter() - begin


def kind_of(optimizer: AlphaGuided) -> str:
    """What the coming step is going to do."""
    task = optimizer._session.pairing.iteration.task
    if task.due:
        return "check" if task.checks else "due"
    return "pair" if task.in_pair else "free"


def measure_anew(optimizer: AlphaGuided, check: bool) -> None:
    """Have variances measured at both ends of the next step, and checked."""
    session = optimizer._session
    session.pairing.variances._last.clear()
    backend = session.plan._built.get(session.plan.choice.name)
    for known in (getattr(backend, "_forward", None), getattr(getattr(backend, "_check", None), "_forward", None)):
        if known is not None and check:
            known._signature = None
    session.begin()


def kinds(base: Step, step: Step, x: Tensor, y: Tensor, exact: bool) -> tuple[dict[str, float], float]:
    """Ratio of every kind of step to plain ones, and seconds of a plain step."""
    optimizer: AlphaGuided = step.optimizer  # type: ignore[attr-defined] # - see `plain`
    times: dict[str, list[float]] = {}
    alone: list[float] = []

    def both() -> None:
        kind = kind_of(optimizer)
        alone.append(seconds(base, x, y))
        times.setdefault(kind, []).append(seconds(step, x, y))

    for _ in range(2):
        base(x, y)
    for _ in range(3):  # the first is a check and loads what it needs
        step(x, y)
    once = min(seconds(base, x, y) for _ in range(3))
    count = max(FEWEST, min(MOST, round(SECONDS / once)))
    variances = optimizer._session.pairing.variances
    variances._counts = dict.fromkeys(("start", "end"), 99)  # as in a long run
    block = min(8, count)
    for round_ in range(max(2, count // 8)):
        for _ in range(block):
            both()
        if not exact:
            measure_anew(optimizer, check=round_ % 4 == 0)
            for _ in range(2 if optimizer._session.plan.every == 1 else 12):
                both()
            variances._counts = dict.fromkeys(("start", "end"), 99)
    plain_seconds = statistics.median(alone)
    return {kind: statistics.median(values) / plain_seconds for kind, values in times.items()}, plain_seconds


def put_together(variant: str, ratio: dict[str, float], optimizer: AlphaGuided) -> tuple[float, float]:
    """Ratio of a long run and of its first steps, from those of its kinds of steps."""
    session = optimizer._session
    variances, backend = session.pairing.variances, session.plan.backend()
    gap = interval(backend.cost(variances.samples))
    hot, due = ratio.get("pair", ratio.get("due", 1.0)), ratio.get("due", ratio.get("check", 1.0))
    check = ratio.get("check", due)
    if variant == "exact":
        return due, due
    if variant == "guard":
        return ratio["free"], ratio["free"]
    every = 10 if variant in ("every=10", "steered") else 1
    gap = every * math.ceil(gap / every)
    measured = 2.0 / every if every > 1 else 1.0
    usual = measured * hot + (1.0 - measured) * ratio.get("free", 1.0)
    long = usual + 2.0 / gap * (due - hot) + (check - due) / (CHECK_AGAIN * gap)
    refreshes = sum(1 for k in range(FIRST) if k in itertools.accumulate(min(2**n, gap) for n in range(FIRST)))
    first = usual + ((2.0 * refreshes + 2.0) * (due - hot) + check - due) / FIRST
    return long, first


def measure(model: str, optimizer: str, batch: int, references: bool) -> dict[str, Any]:
    """Ratios to the plain step of every variant, and floors of ours."""
    x, y = MODELS[model].batch(batch)
    base = make("plain", model, optimizer)
    names = [*OURS, *(REFERENCES if references else ())]
    result: dict[str, Any] = {"model": model, "optimizer": optimizer, "batch": batch, "ratio": {}, "floor": {}}
    times: list[float] = []
    for name in tqdm(names, desc=f"{model}, {optimizer}, batch {batch}", leave=False, disable=None):
        if not runs(name, model, optimizer) or (name in SKIPPED and times and statistics.median(times) > SLOW):
            continue
        step = make(name, model, optimizer)
        if name in OURS:
            ratio, once = kinds(base, step, x, y, name == "exact")
            guided: AlphaGuided = step.optimizer  # type: ignore[attr-defined] # - see `plain`
            result["ratio"][name], first = put_together(name, ratio, guided)
            if name == "default":
                result["ratio"]["first 100"] = first
                result["kinds"] = ratio
                result["information"] = str(guided.alpha_history[-1].information)
            times.append(once)
        else:
            step(x, y)
            pairs = [(seconds(base, x, y), seconds(step, x, y)) for _ in range(FEWEST)]
            result["ratio"][name] = statistics.median(measured / alone for alone, measured in pairs)
        del step
    result["plain_ms"] = 1e3 * statistics.median(times)
    result["floor"] = floors(model, optimizer, batch, result["plain_ms"] / 1e3)
    return result


def multiplications(step: Step, x: Tensor, y: Tensor) -> int:
    """Operations of matrix products and convolutions in one step."""
    with FlopCounterMode(display=False) as counter:
        step(x, y)
    return int(counter.get_total_flops())


def floors(model: str, optimizer: str, batch: int, plain_seconds: float) -> dict[str, float]:
    """What must be paid for: counted multiplications and bytes."""
    x, y = MODELS[model].batch(batch)
    alone = multiplications(make("plain", model, optimizer), x, y)
    size = sum(param.numel() for param in MODELS[model].build().parameters())
    one_pass = 4.0 * size / bandwidth() / plain_seconds
    passes = PASSES[optimizer] * one_pass
    few = SHARE  # by construction
    exact = make("exact", model, optimizer)
    for _ in range(2):
        exact(x, y)
    all_samples = multiplications(exact, x, y) - alone
    return {
        "gradients": 1.0 + passes,
        "default": 1.0 + passes + few,
        "steered": 1.0 + GUARD_PASSES * one_pass + (passes + few) / SPARSE,
        "guard": 1.0 + GUARD_PASSES * one_pass,
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
    parser.add_argument("--references", action="store_true", help="also Cockpit, cached and vmap")
    parser.add_argument("--all", action="store_true", help="every case, kept; then peak memory and the report")
    parser.add_argument("--peak", nargs=4, metavar=("VARIANT", "MODEL", "OPTIMIZER", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.peak:
        report_peak(args.peak[0], args.peak[1], args.peak[2], int(args.peak[3]))
        return
    cases = list(itertools.product(args.models, args.optimizers, args.batch))
    if args.all:
        cases, args.references = ALL, True
    columns = [*OURS, "first 100", *(REFERENCES if args.references else ())]
    print("time of a training step as a multiple of the plain step (in brackets: the floor), one CPU thread")
    print(f"{'':32}{'plain':>9} " + "".join(f"{name:>16}" for name in columns))
    for case in cases:  # the last result of a case counts
        result = measure(*case, args.references)
        print(f"{'{}, {}, batch {}'.format(*case):32}{result['plain_ms']:6.1f} ms " + row(result, columns))
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
