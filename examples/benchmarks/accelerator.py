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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.benchmarks.cost import Calibrated
from examples.benchmarks.models import GPT, MODELS, Residual
from examples.benchmarks.tables import RESULTS

SECONDS = 0.2
"""How long a block of plain steps takes."""
ROUNDS = 6
WARM = 30
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "gradients": {"backend": "gradients"},
    "every=10": {"every": 10},
    "steered": {"every": None, "steered": True},
    "guard": {"every": lambda n: False, "steered": True},
    "exact": {"variance": "exact"},
}
Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


class Case(NamedTuple):
    """Something to train."""

    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    optimizer: Optimizers
    autocast: bool = False
    exact: bool = False


def images(samples: int, classes: int, *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(samples, *shape), torch.randint(0, classes, (samples,)))


def tokens(samples: int, length: int, vocabulary: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (
        torch.randint(0, vocabulary, (samples, length)),
        torch.randint(0, vocabulary, (samples, length)),
    )


def resnet() -> nn.Module:
    """The ResNet of the other table, four times as wide."""
    return nn.Sequential(
        nn.Conv2d(3, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        Residual(128, 128, 1), Residual(128, 256, 2), Residual(256, 512, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


CASES = {
    "MLP, SGD, batch 128": Case(MODELS["MLP"].build, images(128, 10, 784), sgd, exact=True),
    "MLP, AdamW, batch 128": Case(MODELS["MLP"].build, images(128, 10, 784), adamw, exact=True),
    "CNN, momentum, batch 128": Case(MODELS["CNN"].build, images(128, 10, 1, 28, 28), momentum, exact=True),
    "ResNet (4x wide), momentum, batch 256": Case(resnet, images(256, 10, 3, 32, 32), momentum, exact=True),
    "ViT, AdamW, batch 256": Case(MODELS["ViT"].build, images(256, 10, 3, 32, 32), adamw, exact=True),
    "GPT 10 M, AdamW, batch 32": Case(GPT, tokens(32, 128, 8192), adamw, exact=True),
    "GPT 10 M, fused AdamW, batch 64, bf16": Case(GPT, tokens(64, 128, 8192), fused, autocast=True, exact=True),
    "GPT 124 M, fused AdamW, batch 16, bf16": Case(
        lambda: GPT(50304, 1024, 768, 12, 12), tokens(16, 1024, 50304), fused, autocast=True
    ),
}


class Trained:
    """A model in training, with its variant of the optimizer."""

    def __init__(self, case: Case, options: dict[str, Any] | None, device: str) -> None:
        torch.manual_seed(0)
        self.model = case.build().to(device)
        self.x, self.y = (t.to(device) for t in case.batch())
        self.device, self.autocast = device, case.autocast
        self.loss_fn, self.scheduler = nn.CrossEntropyLoss(), None
        self.optimizer: Any = case.optimizer(self.model)
        if options is not None:
            options = dict(options)
            steered = options.pop("steered", False)
            self.optimizer = AlphaGuided(self.optimizer, self.model, self.loss_fn, **options)
            if steered:
                self.scheduler = AlphaScheduler(self.optimizer, Calibrated())

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            output = self.model(self.x)
            loss = self.loss_fn(output.flatten(0, self.y.dim() - 1), self.y.flatten())
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

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
    size = 4.0 * sum(param.numel() for param in case.build().parameters())
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
