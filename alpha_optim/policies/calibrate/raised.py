"""A rate that was raised is watched step by step: where much of what was learned is lost it is taken back at once."""

from __future__ import annotations

import math
import statistics

from alpha_optim.alpha.loss_level import Level, surely_above
from alpha_optim.alpha.states import Remembers
from alpha_optim.policies.calibrate.climb import LOST

LOOK = 5
"""The last so many losses are compared with those before the rate was raised."""


class Raised(Remembers):
    """Whether the loss surely loses half of all progress within a window after the rate was raised.

    A window of the loss says so as well, but it is a 20th of the run: long enough to lose all. That the loss rises a
    little is the noise of longer steps, and good for the run.

    Attributes:
        before: The log rate held before; None if none was raised, or that is over.
    """

    before: float | None
    _level: Level  # of the losses before
    _start: float  # the loss from which all progress counts; infinite if it is not known
    _most: float  # how high the losses may lie
    _steps: int  # for so many it is watched
    _losses: list[float]  # since then

    def __init__(self) -> None:
        """Nothing was raised."""
        self._level, self._steps = Level(math.inf, 0.0, 0), 0
        self._start = self._most = math.inf
        self.end()

    def progress_from(self, level: Level | None) -> None:
        """All progress counts from there; None: it is not known from where."""
        self._start = math.inf if level is None else level.mean

    def begin(self, before: float, level: Level, steps: int) -> None:
        """A rate was raised.

        Args:
            before: The log rate held before.
            level: The losses at it.
            steps: For so many losses it is watched.
        """
        self.before, self._level, self._steps, self._losses = before, level, steps, []
        progress = max(0.0, self._start - level.mean) if math.isfinite(self._start) else 0.0
        self._most = level.mean + LOST * progress

    def end(self) -> None:
        """It is over: the rate was taken back, or is another one."""
        self.before, self._losses = None, []

    def loses(self, loss: float) -> bool:
        """Whether too much is surely lost, with the loss of one more step."""
        if self.before is None:
            return False
        self._losses.append(loss)
        last = Level(statistics.fmean(self._losses[-LOOK:]), self._level.deviation, LOOK)
        above = len(self._losses) >= LOOK and last.mean > self._most
        above = above and surely_above(last, self._level, self._steps, self._level.count - 1)
        if not above and len(self._losses) >= self._steps:
            self.end()
        return above
