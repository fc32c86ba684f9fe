"""A point to return to when the loss has drifted up over many steps.

Single steps of small batches may each look harmless while the run diverges: per-sample losses of an
exploding network scatter as widely as they rise. So the loss is also watched in windows of `WINDOW`
steps. The best window so far is the good point. A window whose mean lies more than `DRIFT` usual
batch-to-batch deviations above it has diverged, whatever single steps say; so has one that lost `LOST` of
all progress since the first step, the second time in a row that this is more than `DRIFT` standard errors
of a window's mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alpha_optim.observe.step_direction import copied

WINDOW = 10
DRIFT = 8.0
LOST = 0.9
PATIENCE = 10
"""After so many returns without progress in between the higher loss is accepted as the new level."""


class Level(NamedTuple):
    """Mean loss and batch-to-batch deviation of a window."""

    mean: float
    deviation: float


class GoodPoint:
    """Parameters and buffers of the best window so far, and the window in progress."""

    def __init__(self) -> None:
        """Start with nothing kept."""
        self.tensors: list[Tensor] = []
        self._level: Level | None = None  # of the good window
        self._first: float | None = None  # loss before the first step
        self._lost_before = False  # whether the last window had lost all progress
        self._losses: list[float] = []  # of the window in progress
        self._returns = 0

    def drifted(self) -> bool:
        """Whether the window in progress is complete and has diverged."""
        if len(self._losses) < WINDOW or self._level is None:
            return False
        mean = statistics.fmean(self._losses)
        far = mean > self._level.mean + DRIFT * self._level.deviation
        return far or (self._lost_before and self._lost(mean))

    def _lost(self, mean: float) -> bool:
        """Whether a window of this mean lost almost all progress."""
        assert self._level is not None
        assert self._first is not None
        rise, progress = mean - self._level.mean, self._first - self._level.mean
        certain = DRIFT / math.sqrt(WINDOW) * self._level.deviation
        # Where there was no progress yet there is none to lose.
        return rise > LOST * progress and rise > certain and progress > certain

    def note(self, loss: float, error: float, state: Sequence[Tensor]) -> None:
        """Take note of an accepted point; the first is the good point until a window is complete.

        Args:
            loss: Its mini-batch loss.
            error: Standard error of that, nan if not known.
            state: Parameters and buffers.
        """
        if self._level is None:
            self._first = loss
            self._set_level(loss, 0.1 * abs(loss) if math.isnan(error) else error, state)
        self._losses.append(loss)

    def close_window(self, state: Sequence[Tensor], trusted: bool = True) -> None:
        """If the window is complete and the best so far, what was reached becomes the good point.

        Args:
            state: Parameters and buffers.
            trusted: Whether they may become the good point.
        """
        if len(self._losses) >= WINDOW:
            assert self._level is not None
            self._close(state, trusted and statistics.fmean(self._losses) < self._level.mean)

    def _close(self, state: Sequence[Tensor], keep: bool) -> None:
        """Begin the next window, perhaps with what was reached as the good point."""
        mean = statistics.fmean(self._losses)
        self._lost_before = self._lost(mean)
        if keep:
            self._set_level(mean, statistics.stdev(self._losses), state)
            self._returns = 0
        self._losses = []

    @torch.no_grad()
    def go_back(self, state: Sequence[Tensor], counts: bool = True) -> None:
        """Put the good point back, bit for bit; whether that counts against the patience."""
        self._returns += counts
        self._lost_before, self._losses = False, []
        for now, kept in zip(state, self.tensors, strict=True):
            now.copy_(kept)

    def accept(self, state: Sequence[Tensor]) -> bool:
        """Whether patience is over; then the point reached becomes the good point."""
        if self._returns < PATIENCE:
            return False
        self._close(state, keep=True)
        return True

    def levels(self) -> tuple[float, float]:
        """Loss of the good point and of the window in progress."""
        if self._level is None or not self._losses:
            return math.nan, math.nan
        return self._level.mean, statistics.fmean(self._losses)

    @torch.no_grad()
    def _set_level(self, mean: float, deviation: float, state: Sequence[Tensor]) -> None:
        """Keep parameters and buffers, and what their loss was."""
        self._level = Level(mean, max(deviation, 0.02 * abs(mean)))
        self.tensors = copied(self.tensors, state)

    def state_dict(self) -> dict[str, Any]:
        """Return everything; tensors are copies."""
        return {
            "tensors": [tensor.clone() for tensor in self.tensors],
            "level": None if self._level is None else list(self._level),
            "first": self._first,
            "lost_before": self._lost_before,
            "losses": list(self._losses),
            "returns": self._returns,
        }

    def load_state_dict(self, state: dict[str, Any], like: Sequence[Tensor]) -> None:
        """Take over a state; tensors move to where ``like`` is."""
        if len(state["tensors"]) != len(like):
            return
        self.tensors = [kept.to(now.device) for kept, now in zip(state["tensors"], like, strict=True)]
        self._level = None if state["level"] is None else Level(*state["level"])
        self._first, self._losses = state["first"], list(state["losses"])
        self._lost_before, self._returns = bool(state["lost_before"]), int(state["returns"])
