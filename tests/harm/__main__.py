"""Print the table: `make harm`."""

from __future__ import annotations

import argparse

import torch

from tests.harm.judge import SEEDS, SITUATIONS, STEPS, judge, table

if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Does steering make a run worse?")
    parser.add_argument("--only", nargs="+", help="parts of names of situations")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--hold", action="store_true", help="without total_steps")
    options = parser.parse_args()
    wanted = [s for s in SITUATIONS if not options.only or any(part in s.name for part in options.only)]
    print(table([judge(s, options.seeds, options.steps, not options.hold) for s in wanted]))
