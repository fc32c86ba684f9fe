"""The comparison with Cockpit: cases, deviations, and the table that `make parity` prints."""

from __future__ import annotations

import argparse
import itertools
import math
import sys

import torch

from alpha_optim import AlphaGuided, AlphaStatus
from tests.problems import MODELS, OPTIMIZERS, make_problem
from tests.reference.cockpit_run import run_cockpit
from tests.reference.exact_fit import exact_alpha

QUANTITIES = (
    "step_length",
    "loss_start",
    "loss_end",
    "slope_start",
    "slope_end",
    "loss_variance_start",
    "loss_variance_end",
    "slope_variance_start",
    "slope_variance_end",
)
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SIZES = (2, 8, 64)
EVERY = (1, 3)
STEPS = 10
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}

CASES = list(itertools.product(MODELS, OPTIMIZERS, RATES, SIZES, EVERY))
SHORT = [case for index, case in enumerate(CASES) if index % 13 == 0]
"""A diagonal through the table, in which every value of every axis occurs."""


def backends(optimizer):
    return ("backpack", "layerwise", "cached") if optimizer == "sgd" else ("layerwise", "cached")


def run_ours(problem, optimizer, lr, sizes, every, backend, dtype):
    model, loss_fn, batches = make_problem(problem, sizes, dtype)
    guided = AlphaGuided(
        OPTIMIZERS[optimizer](model.parameters(), lr),
        model,
        loss_fn,
        every=every,
        backend=backend,
        variance="exact",
    )
    for x, y in batches:
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    return {m.iteration: m for m in guided.alpha_history}


def diverged(measured, dtype):
    """Whether a measurement is not finite, or larger than the root of the largest number."""
    limit = math.sqrt(torch.finfo(dtype).max)
    return measured.status is AlphaStatus.NOT_FINITE or any(abs(getattr(measured, name)) > limit for name in QUANTITIES)


def rounding(name, row, dtype):
    """What a variance of numbers of this precision cannot tell: their mean carries an error of eps |mean|."""
    if "variance" not in name:
        return 0.0
    mean = abs(row[name.replace("_variance", "")])
    return 8 * torch.finfo(dtype).eps * mean * math.sqrt(2.0 * row[name])


def deviation(ours, theirs, scale):
    """|ours - theirs| in units of |theirs| plus its standard error."""
    if ours == theirs or (math.isnan(ours) and math.isnan(theirs)):
        return 0.0
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return math.inf
    return abs(ours - theirs) / (scale or 1.0)


def compare(problem, optimizer, lr, size, every, backend, dtype=torch.float64):
    """Largest deviation of every quantity over the iterations of one case."""
    sizes = [size] * STEPS
    model, loss_fn, batches = make_problem(problem, sizes, dtype)
    theirs = run_cockpit(model, loss_fn, OPTIMIZERS[optimizer](model.parameters(), lr), batches, every)
    ours = run_ours(problem, optimizer, lr, sizes, every, backend, dtype)
    assert sorted(ours) == sorted(theirs), (sorted(ours), sorted(theirs))
    worst = dict.fromkeys((*QUANTITIES, "alpha"), 0.0)
    for iteration, row in theirs.items():
        measured = ours[iteration]
        if not all(math.isfinite(row[name]) for name in QUANTITIES):
            # The run has diverged past what their precision can square; ours sums in float64.
            worst["alpha"] = max(worst["alpha"], 0.0 if diverged(measured, dtype) else math.inf)
            continue
        for name in QUANTITIES:
            value = getattr(measured, name)
            if abs(value - row[name]) <= rounding(name, row, dtype):
                continue
            error = standard_error(name, row, size)
            worst[name] = max(worst[name], deviation(value, row[name], abs(row[name]) + error))
        worst["alpha"] = max(worst["alpha"], alpha_deviation(measured, row))
    return worst


def standard_error(name, row, size):
    """Standard error of the mean (losses, slopes) or of the variance (normal theory) of a batch."""
    if name == "step_length":
        return 0.0
    if "variance" in name:
        return row[name] * math.sqrt(2.0 / (size - 1))
    kind, point = name.split("_")
    return math.sqrt(row[f"{kind}_variance_{point}"] / size)


def alpha_deviation(measured, row):
    """Deviation of alpha from Cockpit's; its None and -1 are told apart by our status.

    Where Cockpit's own float64 solution of its system is off, the exact rational one decides.
    """
    if row["step_length"] == 0.0:
        return 0.0 if measured.status is AlphaStatus.NO_STEP and row["alpha"] == measured.alpha else math.inf
    theirs, spread = row["alpha"], measured.alpha_std if math.isfinite(measured.alpha_std) else 0.0
    if theirs is not None:
        found = deviation(measured.alpha, theirs, abs(theirs) + spread)
        if found <= TOLERANCE[torch.float64]:
            return found
    exact = exact_alpha(
        row["step_length"],
        *[[row[f"{name}_start"], row[f"{name}_end"]] for name in ("loss", "slope", "loss_variance", "slope_variance")],
    )
    if exact is None:
        return 0.0 if measured.status is AlphaStatus.DEGENERATE else math.inf
    return deviation(measured.alpha, exact, abs(exact) + spread)


def main():
    parser = argparse.ArgumentParser(description="Compare with Cockpit, case by case.")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--short", action="store_true", help="only the cases of the test suite")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"largest deviation over {STEPS} iterations, in units of |x| + standard error ({args.dtype})")
    print(f"{'case':58} {'nine quantities':>16} {'alpha':>10}")
    failed = count = 0
    overall = [0.0, 0.0]
    for problem, optimizer, lr, size, every in SHORT if args.short else CASES:
        for backend in backends(optimizer):
            worst = compare(problem, optimizer, lr, size, every, backend, dtype)
            alpha = worst.pop("alpha")
            observed = max(worst.values())
            overall = [max(overall[0], observed), max(overall[1], alpha)]
            good = max(observed, alpha) <= TOLERANCE[dtype]
            failed, count = failed + (not good), count + 1
            label = f"{problem} {optimizer} lr={lr:g} N={size} every={every} {backend}"
            print(f"{label:58} {observed:16.1e} {alpha:10.1e}{'' if good else '   <-- too large'}", flush=True)
    print(f"{count} cases, {failed} beyond {TOLERANCE[dtype]:g}")
    print(f"largest deviation: {overall[0]:.1e}, of alpha: {overall[1]:.1e}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
