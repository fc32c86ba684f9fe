"""Tries many random cases, hostile numbers and faults, and prints what was lost.

python -m tests.trust                       # 2,000 cases of each kind, 20 kills: about twenty minutes
python -m tests.trust --cases 20000 --kills 100
python -m tests.trust --seed 7              # other cases; every failure prints the case that shows it
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, given, strategies

from tests.trust import anywhere, faults, growth, numbers
from tests.trust.cases import cases
from tests.trust.test_fuzz import check_resumed, check_steered, check_watched


def tried(check, count, seed, *further):
    """How many random cases were tried, and how many were lost: the first one that fails ends it.

    ``further`` are strategies for what the check takes beside the case.
    """
    seen = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    @given(strategies.tuples(cases(), *further))
    def each(drawn):
        nonlocal seen
        seen += 1
        check(*drawn)

    try:
        each()
    except Exception:
        traceback.print_exc()
        return seen, 1
    return seen, 0


def all_of(checks):
    """How many named checks were made, and how many failed."""
    lost = 0
    for name, check in checks:
        try:
            check()
        except Exception:  # noqa: PERF203 - each is counted
            print(f"lost: {name}", file=sys.stderr)
            traceback.print_exc()
            lost += 1
    return len(checks), lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="random cases of each kind")
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed and resumed")
    parser.add_argument("--steps", type=int, default=5000, help="length of the long runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("alpha_optim").setLevel(logging.CRITICAL)  # thousands of searches that come to nothing
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "random cases, watched: bit for bit, numbers against one backward pass per sample": lambda: tried(
                check_watched, args.cases, args.seed
            ),
            "random cases, steered: no exception, nothing that is not finite": lambda: tried(
                check_steered, args.cases, args.seed
            ),
            "random cases, saved somewhere, built anew and resumed: bit for bit": lambda: tried(
                check_resumed, args.cases, args.seed, strategies.floats(0.0, 1.0)
            ),
            "hostile numbers": lambda: all_of(numbers.checks()),
            "files cut off, changed or foreign": lambda: all_of(faults.file_checks(Path(folder))),
            "Ctrl-C at any line of the package": lambda: all_of(anywhere.interrupt_checks(args.cases // 4, args.seed)),
            "no memory at any operation of the package": lambda: all_of(
                anywhere.starve_checks(args.cases // 4, args.seed)
            ),
            "histories of 1,000,000 measurements: memory": lambda: all_of(
                [("history", functools.partial(growth.a_history_is_bounded, 1_000_000))]
            ),
            f"runs of {args.steps:,} steps: what grows but the history": lambda: all_of(
                [
                    (f"{name}, {steered}", functools.partial(growth.nothing_grows, args.steps, name, steered))
                    for name in ("SGD", "AdamW")
                    for steered in (False, True)
                ]
            ),
            "runs killed at any moment and resumed, bit for bit": lambda: all_of(
                faults.kill_checks(Path(folder), args.kills, args.seed)
            ),
        }
        print(f"seed {args.seed}\n\n| what | tried | lost | minutes |\n|---|---:|---:|---:|")
        worst = 0
        for name, part in parts.items():
            begin = time.monotonic()
            count, lost = part()
            worst = max(worst, lost)
            print(f"| {name} | {count:,} | {lost} | {(time.monotonic() - begin) / 60:.1f} |", flush=True)
    return min(1, worst)


if __name__ == "__main__":
    sys.exit(main())
