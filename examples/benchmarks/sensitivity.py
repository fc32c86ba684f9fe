"""What becomes of the search when one of its constants is halved or doubled.

Every variation is a copy of the package with one line added, tried on four small problems with two optimizers
from three initial rates: 24 runs, compared with the tuned rates of the study. What is there is not run again.

    python -m examples.benchmarks.sensitivity            # over an hour on one core
    python -m examples.benchmarks.sensitivity --table    # print what was kept
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.benchmarks.rate_free import SEEDS, Case, kept, run
from examples.benchmarks.rate_report import shortfalls
from examples.benchmarks.tables import table

RESULTS = Path(__file__).parent / "results" / "sensitivity.jsonl"
ROOT = Path(__file__).parents[2]
SEARCH = Path("alpha_optim", "policies", "calibrate")
PROBLEMS, BASES, INITIAL = (
    ("digits MLP", "regression", "noisy quadratic", "digits BatchNorm"),
    ("momentum", "AdamW"),
    (1e-6, 1e-2, 100.0),
)
CONSTANTS = {
    "jump": ("START", "PROMISE", "LONGEST_JUMP", "BLIND_JUMP"),
    "climb": ("PACE", "WINDOW", "LOST", "ALPHAS", "FURTHER", "SOON"),
    "settings": ("SHARE", "FEW", "MOST_SHARE", "BUDGET", "MOST_TRIALS", "LONGEST_CLIMB", "SLOWEST"),
    "trials": ("STEP", "BELOW_KNEE", "GROWS", "FEWEST_SCORED", "SHARE_SCORED", "EQUAL", "LOOK"),
    "calibrate_then_anneal": ("BELOW_FOUND",),
    "envelope": ("RAMP",),
    "held_rate": ("REGROWS", "LOWERED", "CALM", "STANDS_BY", "GROWTH", "GROWS"),
    "high_loss": ("SURE", "MOST"),
    "usual_batch": ("LATEST",),
    "loss_watch": ("SHARE", "FEWEST", "FEWEST_TREND", "SURE", "COUNTED", "STANDING"),
}
"""Those that a run of 600 to 1,000 steps meets, by file; a constant that is a logarithm is a power of the rate."""
FACTORS = (0.5, 2.0)


def changed(source: str, name: str, factor: float) -> str:
    """The source of a module in which a constant is multiplied right behind its line; whole numbers stay whole."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(part, ast.Name) and part.id == name for target in node.targets for part in ast.walk(target)
        ):
            new = f"{name} = max(1, round({name} * {factor})) if isinstance({name}, int) else {name} * {factor}\n"
            lines.insert(node.end_lineno or node.lineno, new)
            return "".join(lines)
    raise ValueError(f"there is no constant {name}")


def short(file: str, name: str, factor: float) -> list[list[float]]:
    """Points by which the runs of every pair fall short of tuned's mean, with one constant changed."""
    with tempfile.TemporaryDirectory() as folder:
        for package in ("alpha_optim", "examples"):
            shutil.copytree(ROOT / package, Path(folder, package), ignore=shutil.ignore_patterns("__pycache__"))
        if name:
            path = Path(folder) / SEARCH / f"{file}.py"
            path.write_text(changed(path.read_text(), name, factor))
        command = [sys.executable, "-W", "ignore", "-m", "examples.benchmarks.sensitivity", "--runs"]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        pairs: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
        return pairs


def all_runs() -> list[list[float]]:
    """The runs, with the package as it is."""
    warnings.simplefilter("ignore")
    rows = [row for row in kept() if row["method"] == "tuned" and (row["problem"] in PROBLEMS and row["base"] in BASES)]
    for problem, base in itertools.product(PROBLEMS, BASES):
        rows += [run(Case(problem, "alpha", base, lr, seed)) for lr, seed in zip(INITIAL, SEEDS, strict=True)]
    return shortfalls(rows, list(PROBLEMS), "alpha")


def report(rows: list[dict[str, Any]]) -> str:
    """The table: mean shortfall, and that of the worst runs of pairs, for halved and doubled."""
    found = {(row["file"], row["name"], row["factor"]): row["pairs"] for row in rows}

    def written(pairs: list[list[float]] | None) -> str:
        if pairs is None:
            return ""
        every = list(itertools.chain(*pairs))
        return f"{statistics.fmean(every):.2f}, {statistics.fmean(map(max, pairs)):.2f}"

    lines = [["as it is", "", written(found.get(("", "", 1.0))), ""]]
    lines += [
        [f"`{name}`", f"`{file}`", *(written(found.get((file, name, factor))) for factor in FACTORS)]
        for file, names in CONSTANTS.items()
        for name in names
    ]
    return table(["constant", "in", "halved: mean, worst of pairs", "doubled"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--runs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.runs:
        print(json.dumps(all_runs()))
        return
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["file"], row["name"], row["factor"]) for row in rows}
    wanted = [("", "", 1.0)]
    wanted += [(file, name, f) for file, names in CONSTANTS.items() for name in names for f in FACTORS]
    for file, name, factor in tqdm([] if args.table else [case for case in wanted if case not in done], disable=None):
        rows.append({"file": file, "name": name, "factor": factor, "pairs": short(file, name, factor)})
        with RESULTS.open("a") as out:
            out.write(json.dumps(rows[-1]) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
