"""When the variances of the slopes are measured anew, and what they were the last time.

``variance="exact"`` measures them at every watched iteration. ``"sampled"`` takes few samples, and only
as often as that costs about `SHARE` of a training step: two linearisations of n of N samples are about
two thirds of n / N training steps. In the first iterations, in which variances change quickly, they are
measured more often: the gap grows by one with every refresh.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from alpha_optim.observe.scalars import Scalar
from alpha_optim.slopes.base import SAMPLES

Role = Literal["start", "end"]

SHARE = 0.005
LONGEST = 64
"""Iterations after which variances are measured anew in any case."""


def interval(samples: int) -> int:
    """Iterations between two refreshes at a batch size."""
    share = min(1.0, SAMPLES / max(samples, 1))
    return min(LONGEST, math.ceil(2.0 / 3.0 * share / SHARE))


class Refresh:
    """Remembers the variances of one sample's slope at both ends of a step."""

    def __init__(self, sampled: bool) -> None:
        """Start with nothing known.

        Args:
            sampled: Whether they are to be measured now and then only.
        """
        self.sampled = sampled
        self.forget()

    def forget(self) -> None:
        """Forget everything, as when the parameters are others."""
        self._last: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._variances: dict[str, Scalar] = {}
        self._samples = 0

    def due(self, role: Role, iteration: int) -> bool:
        """Whether the variance at this end of a step is to be measured in this iteration."""
        if not self.sampled or role not in self._last:
            return True
        gap = min(self._counts[role], interval(self._samples))
        return not 0 <= iteration - self._last[role] < gap

    def measured(self, role: Role, iteration: int, variance: Scalar | None, samples: int) -> None:
        """Take note of a measurement of a batch of ``samples``; None: it could not be had."""
        self._last[role], self._samples = iteration, samples
        self._counts[role] = self._counts.get(role, 0) + 1
        self._variances.pop(role, None)
        if variance is not None:
            self._variances[role] = variance

    def variance(self, role: Role) -> Scalar | None:
        """The variance as it was the last time."""
        return self._variances.get(role)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {
            "last": dict(self._last),
            "counts": dict(self._counts),
            "variances": dict(self._variances),
            "samples": self._samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._last = {str(role): int(value) for role, value in state["last"].items()}
        self._counts = {str(role): int(value) for role, value in state["counts"].items()}
        self._variances = dict(state["variances"])
        self._samples = int(state["samples"])
