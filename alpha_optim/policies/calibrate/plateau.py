"""A loss that rests as soon as the search is over: is the rate too low to leave a plateau?

Short trials that all end on a plateau say nothing about the rate that leaves it, and of equal rates the lower one is
held. (A language model soon knows how often letters are, and may need hundreds of steps to learn anything of their
order.) Such a run can be told: at the rate held the loss stays where the best trial ended, two windows in a row. It
does not fall; and it does not lie above, though the rate of that trial had fallen to 0, so that it is not the noise
of the steps that keeps it up. Then higher rates are tried, in place, as long as the loss does not surely rise.
"""

from __future__ import annotations

import math

from alpha_optim.alpha.states import Remembers
from alpha_optim.policies.calibrate.loss_watch import Seen
from alpha_optim.policies.calibrate.phase import Ended
from alpha_optim.policies.calibrate.trials import EQUAL, STEP

RESOLVED = 0.05
"""A loss is only said to rest where a fall by this share of all progress so far would be seen: slow progress of small
batches cannot be told from none."""
LEFT = 1.0
"""... and where at least so many times all progress so far is left: later a loss that rests has most likely arrived,
and higher rates only fit a small data set further."""


class Plateau(Remembers):
    """Whether the loss rests where the best trial ended, and the rates that are tried against that.

    Attributes:
        before: The log rate held before it was raised last; None if it was not, or is no longer of interest.
    """

    before: float | None = None
    _ended: Ended | None = None
    _last: float | None = None  # mean of the window before

    def begin(self, ended: Ended | None) -> None:
        """A search is over.

        Args:
            ended: How its best trial ended; None if there was none.
        """
        self.before, self._ended, self._last = None, ended, None

    def higher(self, seen: Seen, position: float) -> float | None:
        """The log rate to try; None: go on with the one held.

        Args:
            seen: What a window of losses said.
            position: The log rate held.
        """
        last, self._last = self._last, None if math.isnan(seen.mean) else seen.mean
        ended = self._ended
        if ended is None or last is None or self._last is None:
            return None
        noise = math.hypot(ended.error, seen.error)
        progress = ended.start - seen.mean
        resolved = EQUAL * noise <= RESOLVED * progress
        early = abs(seen.mean) >= LEFT * progress
        there = max(abs(seen.mean - ended.mean), abs(last - ended.mean)) <= EQUAL * noise
        rests = there and last - seen.mean <= EQUAL * math.sqrt(2.0) * seen.error
        if not (resolved and early and rests and position + STEP < ended.worse_from - STEP / 2.0):
            return None
        self.before = position
        return position + STEP
