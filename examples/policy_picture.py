"""A small language model from three absurd or ordinary rates: how its rate is found, and where training ends.

python -m examples.policy_picture                 # docs/policy.png; three runs of 600 steps, about three minutes
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from alpha_optim import AlphaGuided, AlphaScheduler, CalibrateThenAnneal
from alpha_optim.report.plots import COLOURS
from examples.benchmarks.problems import PROBLEMS
from examples.benchmarks.rate_free import batches

RATES = (1e-6, 1e-3, 10.0)
WINDOW = 20


def run(rate: float) -> tuple[list[float], list[float], int]:
    """Train the study's language model with AdamW; losses, learning rates, and the step at which the rate was found."""
    problem = PROBLEMS["text transformer"]
    torch.manual_seed(0)
    model, loss_fn = problem.build(), problem.loss_fn()
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=rate), model, loss_fn, every=None)
    policy = CalibrateThenAnneal(problem.steps)
    scheduler = AlphaScheduler(optimizer, policy)
    losses, rates, over = [], [], 0
    for x, y in tqdm(batches(problem, 0), total=problem.steps, desc=f"from {rate:g}", leave=False, disable=None):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        over = over or (len(losses) if policy.calibrated else 0)
    print(f"from {rate:g}: mean loss of the last {WINDOW} steps {np.mean(losses[-WINDOW:]):.3f}")
    for iteration, text in policy.story:
        print(f"  iteration {iteration}: {text}")
    return losses, rates, over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/policy.png"), help="where the picture goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for colour, rate in zip(COLOURS, RATES, strict=False):
        losses, rates, over = run(rate)
        smooth = np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")
        top.semilogy(rates, color=colour, lw=1.3, label=f"from {rate:g}")
        top.axvline(over, color=colour, lw=0.8, ls=":")
        bottom.plot(range(WINDOW - 1, len(losses)), smooth, color=colour, lw=1.3)
    _label(top, bottom)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(f"Picture: {args.out}")


def _label(top: Any, bottom: Any) -> None:
    top.set_ylabel("learning rate")
    top.set_ylim(1e-8, None)
    top.legend(fontsize=8, loc="lower right", title="initial rate")
    top.set_title("jump, climb, trials, then (dotted) held and annealed", fontsize=10)
    bottom.set_ylabel(f"loss, mean of {WINDOW} steps")
    bottom.set_xlabel("iteration")
    for axis in (top, bottom):
        axis.grid(alpha=0.25)


if __name__ == "__main__":
    main()
