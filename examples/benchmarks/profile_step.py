"""Where the time of a measured step goes: operations of plain and measured steps side by side.

Both run under torch's profiler, taking turns for as many steps as variances of slopes stay. The table holds
what an operation takes in the measured step beyond the plain one, the median over five rounds. The profiler
makes every operation a few microseconds longer, so the shares are to be read, not the sum.

    python -m examples.benchmarks.profile_step                 # the cases that miss their target
    python -m examples.benchmarks.profile_step --save          # kept, for docs/benchmarks.md
    python -m examples.benchmarks.profile_step --case MLP AdamW default
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from alpha_optim.measure.refresh import interval
from examples.benchmarks.cost import Step, make
from examples.benchmarks.models import MODELS
from examples.benchmarks.report import profile_tables
from examples.benchmarks.tables import RESULTS

CASES = (
    ("MLP", "SGD", "default"),
    ("MLP", "AdamW", "default"),
    ("MLP", "SGD", "exact"),
    ("CNN", "momentum", "default"),
    ("CNN", "AdamW", "exact"),
    ("ResNet", "momentum", "exact"),
)
KEPT = 8
ROUNDS = 5
BATCH = 128
PYTHON = "Python, hooks, dispatch"
"""Time of a step in which no operation ran."""


def watched(step: Step, x: Tensor, y: Tensor, count: int) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds and calls per step of every operation; what is left of the time as `PYTHON`."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        begin = time.perf_counter()
        for _ in range(count):
            step(x, y)
        whole = 1e3 * (time.perf_counter() - begin) / count
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in record.key_averages():
        if event.key.startswith("aten::"):
            spent[event.key] += event.self_cpu_time_total / 1e3 / count
            calls[event.key] += event.count / count
    spent[PYTHON] = whole - sum(spent.values())
    return spent, calls


def compare(model: str, optimizer: str, variant: str) -> dict[str, Any]:
    """What a variant adds to a plain step, operation by operation."""
    x, y = MODELS[model].batch(BATCH)
    plain, measured = make("plain", model, optimizer), make(variant, model, optimizer)
    count = interval(BATCH) if variant == "default" else 6
    # Variances are measured more often at first: the gap grows by one each time.
    warm = interval(BATCH) ** 2 // 2 + 10 if variant == "default" else 3
    for step in (plain, measured):
        for _ in range(warm):
            step(x, y)
    pairs = [(watched(plain, x, y, count), watched(measured, x, y, count)) for _ in range(ROUNDS)]
    names = {name for pair in pairs for spent, _ in pair for name in spent}
    added = [[name, *(median(pair[1][k][name] - pair[0][k][name] for pair in pairs) for k in (0, 1))] for name in names]
    added.sort(key=lambda entry: -abs(entry[1]))
    case = {"model": model, "optimizer": optimizer, "variant": variant, "batch": BATCH}
    plain_ms = median(sum(pair[0][0].values()) for pair in pairs)
    return {**case, "plain_ms": plain_ms, "added": added[:KEPT]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=3, metavar=("MODEL", "OPTIMIZER", "VARIANT"), help="only this one")
    parser.add_argument("--save", action="store_true", help="keep the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = [compare(*case) for case in ([args.case] if args.case else CASES)]
    print(profile_tables(results))
    if args.save:
        (RESULTS / "profile.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
