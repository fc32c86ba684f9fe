"""Training without a learning rate search: test accuracy from initial rates far off, against a tuned rate.

For every base optimizer: a grid of rates with linear decay to 0 (the best one is "tuned", chosen by test
accuracy, which flatters it), and AlphaGuided with AlphaScheduler(total_steps=...) from three initial rates.
Two epochs of Fashion-MNIST (Debian's dataset-fashion-mnist, or --data), one seed, one CPU thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from examples.data import Data, load
from examples.training import train

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.LazyLinear(256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(10),
    ),
}
BASES: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "SGD momentum 0.9": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "SGD": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
}
GRID = {
    "Adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "SGD momentum 0.9": (1e-2, 3e-2, 1e-1, 2e-1),
    "SGD": (3e-2, 1e-1, 3e-1, 6e-1),
}


def run(
    data: Data, model_name: str, base: str, lr: float, batch: int, epochs: int, guided: bool
) -> tuple[float, float]:
    """Train once; return test accuracy in % and the highest rate after the calibration."""
    torch.manual_seed(0)
    model = MODELS[model_name]()
    model(data.x_test[:1])  # lazy layers take their shape
    steps = epochs * (len(data.y_train) // batch)
    done = train(data, model, BASES[base](model, lr), batch, steps, guided)
    return 100 * done.accuracy, max(done.rates[steps // 5 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with the four Fashion-MNIST files")
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--initial", type=float, nargs="+", default=[1e-6, 1e-2, 1.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load(args.data)
    print(f"{data.name}, {args.model}, batch {args.batch}, {args.epochs} epochs: test accuracy in % (rate)")
    heads = "".join(f"{f'from {lr:g}':>16}" for lr in args.initial)
    print(f"{'base':18}{'tuned':>16}{heads}")
    for base in BASES:
        rest = (data, args.model, base)
        tuned = max((run(*rest, lr, args.batch, args.epochs, False)[0], lr) for lr in GRID[base])
        found = [run(*rest, lr, args.batch, args.epochs, True) for lr in args.initial]
        cells = "".join(f"{f'{accuracy:.1f} ({rate:.2g})':>16}" for accuracy, rate in [tuned, *found])
        print(f"{base:18}{cells}", flush=True)


if __name__ == "__main__":
    main()
