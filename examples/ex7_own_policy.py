"""Two policies of your own: a function, and a class with a memory that goes into checkpoints.

python -m examples.ex7_own_policy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaMeasurement, AlphaScheduler
from examples.data import digits, shuffled_batches

STEPS, BATCH = 300, 64


def careful(measurement: AlphaMeasurement) -> float:
    """A third off after a step that went clearly too far, else a little more."""
    too_far = measurement.alpha - 2 * measurement.alpha_std > 0.5
    return 0.67 if too_far else 1.01


class Patient:
    """The same for the mean over some steps, so that one noisy measurement changes nothing."""

    def __init__(self, steps: int = 10) -> None:
        self.steps = steps
        self._alphas: list[float] = []

    def __call__(self, measurement: AlphaMeasurement) -> float:
        self._alphas.append(measurement.alpha)
        if len(self._alphas) < self.steps:
            return 1.0
        mean, self._alphas = sum(self._alphas) / self.steps, []
        return 0.67 if mean > 0.3 else 1.1

    def state_dict(self) -> dict[str, Any]:
        return {"alphas": list(self._alphas)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._alphas = list(state["alphas"])


def main() -> None:
    data, loss_fn = digits(), nn.CrossEntropyLoss()
    for policy in (careful, Patient()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=3.0), model, loss_fn)
        scheduler = AlphaScheduler(optimizer, policy, max_lr=10.0)
        for index in shuffled_batches(data, BATCH, STEPS, seed=0):
            optimizer.zero_grad()
            loss_fn(model(data.x_train[index]), data.y_train[index]).backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            accuracy = float((model(data.x_test).argmax(1) == data.y_test).float().mean())
        name = getattr(policy, "__name__", type(policy).__name__)
        print(f"{name}: lr 3 -> {optimizer.param_groups[0]['lr']:.3g}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
