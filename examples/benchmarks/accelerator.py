"""What alpha costs on an accelerator: runs with and without it in turn, in blocks of steps between which nobody waits.

    python -m examples.benchmarks.accelerator --device cuda     # a table on the screen

A block of steps is timed from one synchronisation to the next, as a training loop that reads nothing runs. Memory is
what the allocator holds between steps and at most, in multiples of the parameters.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from alpha_optim import AlphaGuided
from examples.benchmarks import models
from examples.benchmarks.cost import OURS, plain
from examples.benchmarks.models import MODELS, OPTIMIZERS
from examples.benchmarks.tables import RESULTS

SECONDS = 0.2
"""How long a block of plain steps takes."""
ROUNDS = 6
WARM = 30
VARIANTS = {name: options for name, options in OURS.items() if name != "layerwise"}


class Case(NamedTuple):
    """Something to train.

    Attributes:
        task: The model, and what goes in.
        samples: Samples of a batch.
        optimizer: The optimizer.
        autocast: Whether it runs in bf16.
        exact: Whether all samples are tried at every step, too.
    """

    task: models.Case
    samples: int
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    autocast: bool = False
    exact: bool = True


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


WIDE = models.Case(lambda: models.resnet(128), (3, 32, 32), 10)
LARGE = models.Case(lambda: models.GPT(50304, 1024, 768, 12, 12), (1024,), 50304, tokens=True)
CASES = {
    "MLP, SGD, batch 128": Case(MODELS["MLP"], 128, OPTIMIZERS["SGD"]),
    "MLP, AdamW, batch 128": Case(MODELS["MLP"], 128, OPTIMIZERS["AdamW"]),
    "CNN, momentum, batch 128": Case(MODELS["CNN"], 128, OPTIMIZERS["momentum"]),
    "ResNet (4x wide), momentum, batch 256": Case(WIDE, 256, OPTIMIZERS["momentum"]),
    "ViT, AdamW, batch 256": Case(MODELS["ViT"], 256, OPTIMIZERS["AdamW"]),
    "GPT 10 M, AdamW, batch 32": Case(MODELS["GPT"], 32, OPTIMIZERS["AdamW"]),
    "GPT 10 M, fused AdamW, batch 64, bf16": Case(MODELS["GPT"], 64, fused, autocast=True),
    "GPT 124 M, fused AdamW, batch 16, bf16": Case(LARGE, 16, fused, autocast=True, exact=False),
}


class Trained:
    """A model in training, with its variant of the optimizer; None: the plain one."""

    def __init__(self, case: Case, options: dict[str, Any] | None, device: str) -> None:
        torch.manual_seed(0)
        model = case.task.build().to(device)
        x, y = (tensor.to(device) for tensor in case.task.batch(case.samples))
        step = plain(
            model,
            case.optimizer(model),
            case.autocast,
            guided=options is not None,
            **({} if options is None else options),
        )
        self.step = partial(step, x, y)
        self.optimizer: Any = step.optimizer  # type: ignore[attr-defined] # - see `plain`

    def seconds(self, steps: int) -> float:
        """Time of some steps, from one synchronisation to the next."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    def launched(self, steps: int) -> float:
        """Time until some steps are under way, nothing waited for at their end."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        taken = (time.perf_counter() - begin) / steps
        torch.cuda.synchronize()
        return taken

    def as_in_a_long_run(self) -> None:
        """Measure variances anew as rarely as after many steps."""
        if isinstance(self.optimizer, AlphaGuided):
            self.optimizer._session.pairing.variances._counts = dict.fromkeys(("start", "end"), 99)


def syncs(trained: Trained, steps: int = 60) -> tuple[float, dict[str, int]]:
    """How often a step waits for the device, and where."""
    found: dict[str, int] = {}

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "alpha_optim" in frame.filename]
            place = " < ".join(f"{Path(frame.filename).stem}:{frame.lineno}" for frame in frames[:-4:-1]) or "elsewhere"
            found[place] = found.get(place, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment] # - put back by the context
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            trained.step()
        torch.cuda.set_sync_debug_mode("default")
    return sum(found.values()) / steps, found


def memory(case: Case, options: dict[str, Any] | None, device: str) -> tuple[float, float]:
    """Bytes held between steps, and at most, by a variant alone."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trained = Trained(case, options, device)
    for _ in range(4):
        trained.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    trained.as_in_a_long_run()
    for _ in range(6):
        trained.step()
    trained.optimizer.zero_grad()
    return float(torch.cuda.memory_allocated() - before), float(torch.cuda.max_memory_allocated() - before)


def measure(name: str, device: str, variants: list[str], long: float) -> dict[str, Any]:
    """Ratios to plain steps, and memory."""
    case = CASES[name]
    result: dict[str, Any] = {
        "case": name,
        "device": torch.cuda.get_device_name(),
        "ratio": {},
        "memory": {},
        "syncs": {},
    }
    result["torch"] = torch.__version__
    size = 4.0 * sum(param.numel() for param in case.task.build().parameters())
    chosen: dict[str, Any] = {v: VARIANTS[v] for v in variants if v != "exact" or case.exact}
    memory(case, None, device)  # libraries take their work space
    held, most = memory(case, None, device)
    for variant, options in chosen.items():
        mine, peak = memory(case, options, device)
        result["memory"][variant] = ((mine - held) / size, (peak - most) / size)
    runs = {variant: Trained(case, options, device) for variant, options in {"plain": None, **chosen}.items()}
    for variant, run in runs.items():
        for _ in range(WARM):
            run.step()
        if variant != "plain":
            result["syncs"][variant] = syncs(run, 30)
        run.as_in_a_long_run()
    once = min(runs["plain"].seconds(5) for _ in range(3))
    block = max(4, round(long / once))
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    for _ in range(ROUNDS):
        for variant, run in runs.items():
            times[variant].append(run.seconds(block))
    result["plain_ms"] = 1e3 * statistics.median(times["plain"])
    result["launch_ms"] = 1e3 * runs["plain"].launched(10)
    for variant in chosen:
        result["ratio"][variant] = statistics.median(
            mine / plain for mine, plain in zip(times[variant], times["plain"], strict=True)
        )
        guided = runs[variant].optimizer
        result.setdefault("information", {})[variant] = [str(m.information) for m in guided.alpha_history][-1:]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--waits", action="store_true", help="say where steps wait for the device")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "accelerator.jsonl")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in CASES:
        if args.only not in name:
            continue
        result = measure(name, args.device, args.variants, args.seconds)
        found = result.pop("syncs")
        result["waits"] = {variant: count for variant, (count, _) in found.items()}
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{name:42} {result['plain_ms']:7.2f} ms (launch {result['launch_ms']:.2f})")
        for variant in result["ratio"]:
            held, peak = result["memory"][variant]
            count, places = found[variant]
            print(
                f"    {variant:10} {result['ratio'][variant]:.3f}   memory {held:+.2f} P, peak {peak:+.2f} P   "
                f"waits {count:.2f} {result['information'][variant]}",
                flush=True,
            )
            if args.waits:
                print("".join(f"        {times:4} {place}\n" for place, times in places.items()), end="")


if __name__ == "__main__":
    main()
