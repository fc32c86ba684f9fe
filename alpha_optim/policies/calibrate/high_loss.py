"""What to do about a loss that stays higher than it was: lower the rate, unless that has no effect."""

from __future__ import annotations

import math
from enum import Enum

from alpha_optim.alpha.states import Remembers
from alpha_optim.policies.calibrate.loss_watch import Seen

SURE = 1.0
"""The loss comes down when it lies so many standard errors below that of the last window."""
MOST = 3
"""After so many times without effect the rate is no longer lowered, and given back."""


class Remedy(Enum):
    """What to do about it."""

    NONE = "none"
    LOWER = "lower"
    GIVE_BACK = "give back"


class HighLoss(Remembers):
    """Whether lowering the rate helps against a loss that is too high."""

    _high: tuple[float, float] | None = None  # mean and error of the last window, if it was too high
    _helpless: int = 0  # times in a row that the rate was lowered without effect
    _before: float = 0.0  # the log rate before them
    gave_up: bool = False

    def judge(self, seen: Seen, position: float) -> Remedy:
        """Say what to do after a window.

        Args:
            seen: What it said, its mean known.
            position: The log rate held.
        """
        better = self._high is None or self._high[0] - seen.mean > SURE * math.hypot(self._high[1], seen.error)
        if better:
            self._helpless = 0
        recovers, self._high = self._high is not None and better, (seen.mean, seen.error) if seen.high else None
        if not seen.high or recovers or self.gave_up:
            return Remedy.NONE
        if self._helpless >= MOST:
            self.gave_up = True
            return Remedy.GIVE_BACK
        self._before = position if self._helpless == 0 else self._before
        self._helpless += 1
        return Remedy.LOWER

    def given_back(self, position: float) -> float:
        """The log rate from before it was lowered without effect; ``position`` if it was not."""
        return self._before if self._helpless else position

    def accepted(self) -> None:
        """The level is accepted, since the rate is not what it comes from; no rate is lowered for it any more."""
        self.forget()
        self.gave_up = True

    def forget(self) -> None:
        """This rise was not the rate's; another one may be."""
        self._high, self._helpless = None, 0
