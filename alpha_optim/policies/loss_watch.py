"""After the calibration: is the held rate at least as good as what the calibration had seen?"""

from __future__ import annotations

import math
from typing import Any

from alpha_optim.policies.loss_trace import Level, level_of

SHARE = 20
SHORTEST = 20
"""A window is a 20th of the run, at least 20 steps."""
FEWEST = 3
"""Losses in a window, where steps are measured now and then."""
SETTLES = 1
"""So many windows after a change are not judged: the loss needs time to come down."""
SURE = 3.0
MOST = 3
"""After so many windows that were too high without a better one in between their loss is accepted."""


class LossWatch:
    """Windows of the loss against the best level so far."""

    def __init__(self, total_steps: int) -> None:
        """Start without a level; nothing is judged before there is one."""
        self.length = max(SHORTEST, total_steps // SHARE)
        self.level: Level | None = None
        self._losses: list[float] = []
        self._begin: int | None = None  # iteration of the window's first loss
        self._windows = 0
        self._high = 0

    def too_high(self, loss: float, iteration: int) -> bool:
        """Add the loss of an iteration; whether a window is complete and surely lies above the best level."""
        if self.level is None:
            return False
        self._begin = iteration if self._begin is None else self._begin
        self._losses.append(loss)
        count = len(self._losses)
        if iteration - self._begin + 1 < self.length or count < FEWEST:
            return False
        mean, best = math.fsum(self._losses) / count, self.level
        self._losses, self._begin = [], None
        self._windows += 1
        if mean < best.mean:
            self.level, self._high = best._replace(mean=mean), 0
        error = best.deviation * math.sqrt(1.0 / count + 1.0 / best.count)
        above = self._windows > SETTLES and mean - best.mean > SURE * error
        if above:
            self._windows = 0
            self._high += 1
            if self._high >= MOST:
                self.level, self._high = best._replace(mean=mean), 0
        return above

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        level = None if self.level is None else list(self.level)
        return {
            "level": level,
            "losses": list(self._losses),
            "begin": self._begin,
            "windows": self._windows,
            "high": self._high,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.level = level_of(state["level"])
        self._losses, self._windows = list(map(float, state["losses"])), int(state["windows"])
        self._high, self._begin = int(state["high"]), state["begin"]
