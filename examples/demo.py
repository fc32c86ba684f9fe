"""Train from three initial learning rates, with and without alpha, and show what alpha said and did."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from alpha_optim import AlphaGuided
from alpha_optim.report.plots import plot_history
from examples.data import Data, load
from examples.training import Run, train

RATES = (1e-6, 1e-2, 10.0)
BATCH = 64


def make_model(data: Data) -> nn.Module:
    torch.manual_seed(0)
    pixels = data.x_train[0].numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 10))


def run(data: Data, lr: float, steps: int, guided: bool) -> Run:
    model = make_model(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return train(data, model, optimizer, BATCH, steps, guided)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="'digits', or a folder with the four Fashion-MNIST files")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps per run")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="where the picture goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load(args.data)
    steps = args.steps or max(600, 2 * len(data.y_train) // BATCH)
    print(f"{data.name}: SGD with momentum 0.9, batch {BATCH}, {steps} steps, linear decay to 0\n")
    print(f"{'initial rate':>12} {'bare':>8} {'with alpha':>11} {'rate found':>11} {'taken back':>11}")
    shown = None
    for lr in RATES:
        bare = run(data, lr, steps, guided=False)
        with_alpha = run(data, lr, steps, guided=True)
        optimizer = with_alpha.optimizer
        assert isinstance(optimizer, AlphaGuided)
        shown = shown or (lr, optimizer, with_alpha.phases)
        found = max(m.lr[0] for m in optimizer.alpha_history[steps // 4 :])
        taken_back = sum(event.restored for event in optimizer.guard_events)
        print(f"{lr:12g} {bare.accuracy:8.1%} {with_alpha.accuracy:11.1%} {found:11.2g} {taken_back:11d}")
    assert shown is not None
    lr, optimizer, phases = shown
    history = optimizer.alpha_history
    first, half = 30, len(history) // 2
    print(f"\nWhat alpha said in the run from {lr:g}:")
    print(f"  {np.nanmean(history.alphas[:first]):+.2f} over the first {first} steps")
    print(f"  {history.windowed(half).alpha:+.2f} over the second half of the run")
    print(f"  at the end {optimizer.diagnose()}")
    title = f"{data.name}, initial learning rate {lr:g}"
    figure = plot_history(history, optimizer.guard_events, phases=phases, title=title)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    main()
