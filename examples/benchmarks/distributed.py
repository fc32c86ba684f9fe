"""What talking to other processes costs: steps under DistributedDataParallel, in turn, in one run, as ratios.

Every variant is a model of its own; they make one step each in turn, so that whatever the machine does meets all alike.
"alone" is the same measurement with every process by itself, wrong as alpha but as much work: what "together" takes
beyond it is the price of the all-reduce. All-reduces are counted as torch makes them, without those of the gradients.

    torchrun --nproc-per-node=2 -m examples.benchmarks.distributed
    torchrun --nproc-per-node=2 -m examples.benchmarks.distributed --models CNN MLP --batch 32
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from alpha_optim.distributed import Ranks
from examples.benchmarks.models import MODELS, OPTIMIZERS, Case
from examples.benchmarks.tables import RESULTS, table

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha, alone": {"every": 1, "alone": True},
    "alpha": {"every": 1},
    "alpha, every=10": {"every": 10},
    "guard, alone": {"every": lambda n: False, "guarded": True, "alone": True},
    "guard": {"every": lambda n: False, "guarded": True},
    "alpha and guard": {"every": 1, "guarded": True},
}
WARM_UP = 70
"""Steps before the clock runs: by then variances are measured as rarely as in a long run."""


class Counted:
    """Counts the all-reduces that `Ranks` asks for."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        self._sum = Ranks.sum

    def __enter__(self) -> Counted:
        counted = self

        def sum_(ranks: Ranks, numbers: Tensor) -> Tensor:
            counted.calls += 1
            counted.bytes += numbers.numel() * numbers.element_size()
            return counted._sum(ranks, numbers)

        Ranks.sum = sum_  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        Ranks.sum = self._sum  # type: ignore[method-assign]


class Loop:
    """One variant."""

    def __init__(self, case: Case, optimizer: str, variant: dict[str, Any], batch: int) -> None:
        torch.manual_seed(0)
        model = case.build()
        self.loss_fn = nn.CrossEntropyLoss()
        self.model = DistributedDataParallel(model)
        self.optimizer: Any = OPTIMIZERS[optimizer](model)
        self.scheduler: AlphaScheduler | None = None
        self.x, self.y = case.batch(batch)
        self.tokens = case.tokens
        self.times: list[float] = []
        if variant:
            self.optimizer = AlphaGuided(self.optimizer, self.model, self.loss_fn, every=variant["every"])
            self.optimizer._session.processes.separate = variant.get("alone", False)
            if variant.get("guarded"):
                self.scheduler = AlphaScheduler(self.optimizer, Hold())
            self.optimizer._session.begin()

    def step(self) -> None:
        """One training step, timed."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        output = self.model(self.x)
        if self.tokens:
            output = output.flatten(0, 1)
        self.loss_fn(output, self.y.flatten()).backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.times.append(time.perf_counter() - begin)


def measure(name: str, optimizer: str, batch: int, seconds: float) -> dict[str, Any]:
    """All variants of one case."""
    loops = {variant: Loop(MODELS[name], optimizer, options, batch) for variant, options in VARIANTS.items()}
    for _ in range(WARM_UP):
        for loop in loops.values():
            loop.step()
    plain = statistics.median(loops["plain"].times)
    counts = [round(max(20, seconds / plain))]
    torch.distributed.broadcast_object_list(counts)
    talk = {}
    for variant, loop in loops.items():  # counted over 20 steps, not timed
        with Counted() as counted:
            for _ in range(20):
                loop.step()
        talk[variant] = (counted.calls / 20, counted.bytes / 20)
        loop.times.clear()
    for _ in range(counts[0]):
        for loop in loops.values():
            loop.step()
    middle = {variant: statistics.median(loop.times) for variant, loop in loops.items()}
    found: dict[str, Any] = {"model": name, "optimizer": optimizer, "batch": batch, "plain": middle["plain"]}
    found["size"] = torch.distributed.get_world_size()
    for variant, value in middle.items():
        found[variant + " ratio"] = value / middle["plain"]
        found[variant + " calls"], found[variant + " bytes"] = talk[variant]
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """A markdown table."""
    header = ["model, optimizer, batch per process", "processes", "plain DDP"]
    header += ["α alone", "α together", "α, every=10", "guard alone", "guard together", "both", "all-reduce", "bytes"]
    lines = []
    for row in rows:
        ratios = [f"{row[variant + ' ratio']:.3f}" for variant in VARIANTS if variant != "plain"]
        line = [f"{row['model']}, {row['optimizer']}, {row['batch']}", str(row["size"]), f"{row['plain'] * 1e3:.3g} ms"]
        talk = [f"{row['alpha and guard calls']:.2f} a step", f"{row['alpha and guard bytes']:.0f} a step"]
        lines.append([*line, *ratios, *talk])
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["CNN", "MLP", "ResNet", "small"], choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=["SGD", "AdamW"], choices=list(OPTIMIZERS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of plain steps, for every case")
    parser.add_argument("--save", action="store_true", help="keep the raw results for docs/scaling.md")
    args = parser.parse_args()
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rows = [
        measure(model, optimizer, args.batch, args.seconds) for model in args.models for optimizer in args.optimizers
    ]
    if torch.distributed.get_rank() == 0:
        print(report(rows))
        if args.save:
            (RESULTS / "distributed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
