"""The training loop of the examples: torch's own, with a fixed rate that decays or with alpha."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.data import Data, shuffled_batches


class Run(NamedTuple):
    """What a run gave.

    Attributes:
        accuracy: Test accuracy, from 0 to 1.
        rates: Learning rate after every step.
        optimizer: The optimizer.
        phases: Iterations at which the phases of the search for the rate began, with their names.
    """

    accuracy: float
    rates: list[float]
    optimizer: torch.optim.Optimizer
    phases: tuple[tuple[int, str], ...]


def train(data: Data, model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, steps: int, guided: bool) -> Run:
    """Train a classifier with cross entropy and measure its test accuracy.

    Args:
        data: Training and test set.
        model: The model.
        optimizer: Its bare optimizer.
        batch: Samples per mini-batch.
        steps: Optimizer steps.
        guided: Whether alpha finds the rate; else the given one decays linearly to 0.
    """
    loss_fn, lr = nn.CrossEntropyLoss(), optimizer.param_groups[0]["lr"]
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if guided:
        optimizer = AlphaGuided(optimizer, model, loss_fn)
        scheduler = AlphaScheduler(optimizer, total_steps=steps)
    else:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(0.0, 1.0 - n / steps))
    rates = []
    label = f"{'with alpha' if guided else 'bare      '}  lr={lr:<6g}"
    for index in tqdm(shuffled_batches(data, batch, steps, seed=0), desc=label, leave=False, disable=None):
        optimizer.zero_grad()
        loss_fn(model(data.x_train[index]), data.y_train[index]).backward()
        optimizer.step()
        scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    with torch.no_grad():
        accuracy = float((model(data.x_test).argmax(1) == data.y_test).float().mean())
    phases = scheduler.policy.phases if isinstance(scheduler, AlphaScheduler) else ()  # type: ignore[attr-defined] # - it searches
    return Run(accuracy, rates, optimizer, phases)
