"""The best point of a search, to return to.

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

from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.steer.point import Point

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

    def __init__(self, on_host: bool = False) -> None:
        """Start with nothing kept; see `Point`."""
        self.point = Point(on_host)
        self._level: Level | None = None  # of the good window
        self._first: float | None = None  # loss before the first step
        self._lost_before = False  # whether the last window had lost all progress
        self._losses: list[float] = []  # of the window in progress
        self._returns = 0

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self.point)

    def forget(self) -> None:
        """Free it, and forget the window in progress."""
        self.point.forget()
        self._level, self._first, self._lost_before, self._losses, self._returns = None, None, False, [], 0

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

    def note(
        self, loss: float, error: float, params: Sequence[Tensor], model: nn.Module | None, optimizer: Optimizer | None
    ) -> None:
        """Take note of an accepted point; the first is the good point until a window is complete.

        Args:
            loss: Its mini-batch loss.
            error: Standard error of that, nan if not known.
            params: The parameters.
            model: The model whose buffers belong to the point.
            optimizer: The optimizer, if it keeps weights of its own.
        """
        if self._level is None:
            self._first = loss
            self._set_level(loss, 0.1 * abs(loss) if math.isnan(error) else error)
            self.point.keep(params, model, optimizer)
        self._losses.append(loss)

    def close_window(
        self, params: Sequence[Tensor], model: nn.Module | None, optimizer: Optimizer | None, trusted: bool = True
    ) -> None:
        """If the window is complete and the best so far, what was reached becomes the good point.

        Args:
            params: The parameters.
            model: The model whose buffers belong to the point.
            optimizer: The optimizer, if it keeps weights of its own.
            trusted: Whether they may become the good point.
        """
        if len(self._losses) < WINDOW:
            return
        assert self._level is not None
        if self._close(trusted and statistics.fmean(self._losses) < self._level.mean):
            self.point.keep(params, model, optimizer)

    def _close(self, keep: bool) -> bool:
        """Begin the next window, perhaps with the level of this one; returns whether that was so."""
        mean = statistics.fmean(self._losses)
        self._lost_before = self._lost(mean)
        if keep:
            self._set_level(mean, statistics.stdev(self._losses))
            self._returns = 0
        self._losses = []
        return keep

    def go_back(self, params: Sequence[Tensor], model: nn.Module | None, counts: bool = True) -> bool:
        """Put the good point back, bit for bit; returns whether it could be.

        Args:
            params: The parameters.
            model: The model whose buffers belong to the point.
            counts: Whether that counts against the patience.
        """
        self._returns += counts
        self._lost_before, self._losses = False, []
        return self.point.restore(params, model)

    def accept(self, params: Sequence[Tensor], model: nn.Module | None, optimizer: Optimizer | None) -> bool:
        """Whether patience is over; then the point reached becomes the good point."""
        if self._returns < PATIENCE:
            return False
        self._close(keep=True)
        self.point.keep(params, model, optimizer)
        return True

    def levels(self) -> tuple[float, float]:
        """Loss of the good point and of the window in progress."""
        if self._level is None or not self._losses:
            return math.nan, math.nan
        return self._level.mean, statistics.fmean(self._losses)

    def _set_level(self, mean: float, deviation: float) -> None:
        """Keep what the loss was."""
        self._level = Level(mean, max(deviation, 0.02 * abs(mean)))

    def state_dict(self) -> dict[str, Any]:
        """Return everything; tensors are copies."""
        return {
            "point": self.point.state_dict() if self.point else None,
            "level": None if self._level is None else list(self._level),
            "first": self._first,
            "lost_before": self._lost_before,
            "losses": list(self._losses),
            "returns": self._returns,
        }

    def load_state_dict(
        self, state: dict[str, Any], params: Sequence[Tensor], model: nn.Module | None, optimizer: Optimizer | None
    ) -> None:
        """Take over a state that fits these tensors."""
        self.forget()
        if state["point"] is None or not self.point.load_state_dict(state["point"], params, model, optimizer):
            return
        self._level = None if state["level"] is None else Level(*state["level"])
        self._first, self._losses = state["first"], list(state["losses"])
        self._lost_before, self._returns = bool(state["lost_before"]), int(state["returns"])
