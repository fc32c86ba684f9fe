"""What alpha costs: training steps with and without it, interleaved in one process, as ratios.

Two models on random data (the cost does not depend on the data), batch 128, one thread. Every block of
steps of the plain loop is followed by one of each variant; medians over the blocks are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from alpha_optim import AlphaGuided, AlphaScheduler

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-1024-1024-10": (
        lambda: nn.Sequential(
            nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        ),
        (784,),
    ),
    "CNN 32-64-256-10": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3136, 256),
            nn.ReLU(),
            nn.Linear(256, 10),
        ),
        (1, 28, 28),
    ),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}
Step = Callable[[], None]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Step:
    loss_fn = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    return step


def guided(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    schedule: bool = False,
    **options: object,
) -> Step:
    loss_fn = nn.CrossEntropyLoss()
    wrapped = AlphaGuided(optimizer, model, loss_fn, **options)  # type: ignore[arg-type] # - checked at run time
    scheduler = AlphaScheduler(wrapped, lambda measurement: 1.0) if schedule else None

    def step() -> None:
        wrapped.zero_grad()
        loss_fn(model(x), y).backward()
        wrapped.step()
        if scheduler is not None:
            scheduler.step()

    return step


def cockpit(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Step:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from backpack import extend
        from cockpit import Cockpit
        from cockpit.quantities import Alpha
        from cockpit.utils import schedules
    loss_fn, each = extend(nn.CrossEntropyLoss()), nn.CrossEntropyLoss(reduction="none")
    extend(model)
    watcher = Cockpit(model.parameters(), quantities=[Alpha(schedules.linear(1))])
    count = 0

    def step() -> None:
        nonlocal count
        optimizer.zero_grad()
        output = model(x)
        loss = loss_fn(output, y)
        losses = each(output.detach(), y)
        info = {"batch_size": len(y), "individual_losses": losses, "loss": loss, "optimizer": optimizer}
        with watcher(count, info=info):
            loss.backward()
        optimizer.step()
        count += 1

    return step


VARIANTS: dict[str, Callable[..., Step]] = {
    "plain": plain,
    "gradients": lambda *given: guided(*given, backend="gradients"),
    "default": guided,
    "default, every=10": lambda *given: guided(*given, every=10),
    "exact": lambda *given: guided(*given, variance="exact"),
    "default + scheduler": lambda *given: guided(*given, schedule=True),
    "Cockpit": cockpit,
}


def measure(model: str, optimizer: str, batch: int, blocks: int) -> dict[str, float]:
    """Median time of a step of every variant, divided by that of the plain one."""
    build, shape = MODELS[model]
    torch.manual_seed(0)
    x, y = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    steps: dict[str, Step] = {}
    for name, make in VARIANTS.items():
        if name == "Cockpit" and importlib.util.find_spec("cockpit") is None:
            continue
        net = build()
        steps[name] = make(net, OPTIMIZERS[optimizer](net), x, y)
    times: dict[str, list[float]] = {name: [] for name in steps}
    label = f"{model}, {optimizer}"
    for block in tqdm(range(blocks + 1), desc=label, leave=False, disable=None):
        for name, step in steps.items():
            # Blocks of ten steps, so that every=10 is measured whole; Cockpit is too slow for that.
            count = 1 if name == "Cockpit" else 10
            begin = time.perf_counter()
            for _ in range(count):
                step()
            if block:  # the first block warms up
                times[name].append((time.perf_counter() - begin) / count)
    base = statistics.median(times["plain"])
    return {name: statistics.median(values) / base for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=5, help="blocks of ten steps per variant")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"time per training step as a multiple of the plain step, batch {args.batch}, one CPU thread")
    print(f"{'':29}" + "".join(f"{name:>21}" for name in VARIANTS))
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            ratios = measure(model, optimizer, args.batch, args.blocks)
            cells = "".join(f"{ratios[name]:21.2f}" if name in ratios else f"{'-':>21}" for name in VARIANTS)
            print(f"{model + ', ' + optimizer:29}" + cells, flush=True)


if __name__ == "__main__":
    main()
