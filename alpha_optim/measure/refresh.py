"""When the variances over samples are measured anew, and what they were the last time.

``variance="exact"`` measures them at every watched iteration. ``"sampled"`` takes few samples, and only
as often as that costs about `SHARE` of training. In the first iterations, in which variances change quickly, they
are measured more often: the gap doubles with every refresh.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from alpha_optim.observe.numbers import Number, saved

Role = Literal["start", "end"]

SHARE = 0.01
"""Share of the training time that variances may take."""
LONGEST = 512
"""Iterations after which variances are measured anew in any case."""


def interval(cost: float) -> int:
    """Iterations between two refreshes that cost so many training steps each, both ends together."""
    return max(1, min(LONGEST, math.ceil(cost / SHARE)))


def finite_or(value: Number, before: Number | None) -> Number:
    """A variance, or the last one where it is not finite: one bad batch must not stand for those that follow."""
    if before is None:
        return value
    if isinstance(value, Tensor):
        return torch.where(
            torch.isfinite(value), value, torch.as_tensor(before, dtype=value.dtype, device=value.device)
        )
    return value if math.isfinite(value) else before


class Variances:
    """Remembers the variances of one sample's slope at both ends of a step, and of one sample's loss."""

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
        self._in_vain: set[str] = set()
        self._counts: dict[str, int] = {}
        self._slopes: dict[str, Number] = {}
        self._samples = 0
        self.of_loss: Number | None = None

    @property
    def samples(self) -> int:
        """Number of samples of the batch they were measured on."""
        return self._samples

    def due(self, role: Role, iteration: int, cost: float) -> bool:
        """Whether the variance at this end of a step is to be measured in this iteration.

        Args:
            role: Which end.
            iteration: The iteration.
            cost: What both ends cost, in training steps.
        """
        if not self.sampled or role not in self._last or role in self._in_vain:
            return True
        gap = min(2 ** min(self._counts[role] - 1, 30), interval(cost))
        return not 0 <= iteration - self._last[role] < gap

    def measured(self, role: Role, iteration: int, variance: Number | None, samples: int) -> None:
        """Take note of a measurement of a batch of ``samples``; None: it could not be had."""
        self.looked(role, iteration, samples)
        self.found(role, variance)

    def looked(self, role: Role, iteration: int, samples: int) -> None:
        """Take note of an attempt to measure a batch of ``samples``."""
        self._last[role], self._samples = iteration, samples
        self._counts[role] = self._counts.get(role, 0) + 1

    def found(self, role: Role, variance: Number | None) -> None:
        """Take note of what came of it; None: it could not be had."""
        self._in_vain.discard(role)
        before = self._slopes.pop(role, None)
        if variance is not None:
            self._slopes[role] = finite_or(variance, before)

    def missed(self) -> None:
        """An attempt told nothing, and not for good: measure in the next iteration; what is known stands.

        Both ends, since what the end of a step takes over is found out at the start of one.
        """
        self._in_vain.update(("start", "end"))

    def look_again(self, role: Role) -> None:
        """The last attempt told nothing, since no parameter moved: measure in the next iteration."""
        if role not in self._slopes:
            self._in_vain.add(role)

    def saw_loss(self, variance: Number | None) -> None:
        """Take note of the variance of one sample's loss; None: it could not be had."""
        self.of_loss = None if variance is None else finite_or(variance, self.of_loss)

    def of_slope(self, role: Role) -> Number | None:
        """The variance of one sample's slope at one end as it was the last time."""
        return self._slopes.get(role)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {
            "last": dict(self._last),
            "counts": dict(self._counts),
            "slopes": {role: saved(value) for role, value in self._slopes.items()},
            "loss": saved(self.of_loss),
            "samples": self._samples,
            "in_vain": sorted(self._in_vain),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._last = {str(role): int(value) for role, value in state["last"].items()}
        self._counts = {str(role): int(value) for role, value in state["counts"].items()}
        self._slopes = dict(state["slopes"])
        self._in_vain = set(state.get("in_vain", ()))
        self.of_loss, self._samples = state["loss"], int(state["samples"])
