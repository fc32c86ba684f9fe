"""By how much the rates fall after steps that were taken back, and how they come back."""

from __future__ import annotations

from alpha_optim.alpha.records import GuardEvent, GuardReason
from alpha_optim.alpha.states import Remembers
from alpha_optim.steer.guard import Guard

LOWER_ONCE = 0.5
LOWER_AGAIN = 0.1
SOON = 10
"""A step taken back lowers the rates by `LOWER_ONCE`; within `SOON` iterations of the last by `LOWER_AGAIN`."""
PROBATION, GROWS = 200, 1.02
"""So many steps after the last explosion the rates grow to what they were, by this factor a step: it may have been an
accident."""
ALIKE = 3.0
"""Two explosions are alike whose losses rose by amounts within this factor."""


class ExplosionCuts(Remembers):
    """Answers with factors for the scale of the rates."""

    _last_event: int  # iteration of the last explosion
    _last_rise: float = 0.0  # of the loss, in it
    _last_cut: float = 1.0  # by what it has lowered the rates; with those before it, if all were broken batches
    _last_broken: bool = False  # whether it was batches that are not finite
    _owed: float = 1.0  # by what the rates are going to grow again
    _soon: int = 0  # explosions so far of which each came soon after the last

    def __init__(self) -> None:
        """Begin without any."""
        self._last_event = -SOON - 1

    def taken_back(self, event: GuardEvent, decides: bool, guard: Guard | None) -> float:
        """What a step that was taken back multiplies the rates by.

        An explosion at a rate that an earlier one has lowered, long after it and as high as it, came from the data (two
        hard batches in a row): what was lowered is given back, and rises of that size are not looked at for a while.

        Args:
            event: What the guard did.
            decides: Whether the policy decides on the scale; then nothing is owed.
            guard: Told of rises that came from the data.
        """
        cut, broken = self._cut(event, decides, guard), event.reason is not GuardReason.LOSS_ROSE
        self._last_cut = cut * (self._last_cut if broken and self._last_broken else 1.0)
        self._last_event, self._last_broken = event.iteration, broken
        return cut

    def _cut(self, event: GuardEvent, decides: bool, guard: Guard | None) -> float:
        again = event.iteration - self._last_event <= SOON
        rise, last_rise = event.loss_after - event.loss_before, self._last_rise
        self._last_rise = rise
        if decides:
            return LOWER_AGAIN if again else LOWER_ONCE
        self._soon = self._soon + 1 if again else 0
        if again:
            # Two may have been an accident, too; where it goes on the rate is too high.
            self._owed = self._owed / LOWER_AGAIN if self._soon == 1 else 1.0
            return LOWER_AGAIN
        alike = last_rise > 0.0 and last_rise / ALIKE < rise < last_rise * ALIKE  # not where one is nan
        if self._owed > 1.0 and alike:
            owed, self._owed = self._owed, 1.0
            if guard is not None:
                guard.came_from_data(rise)
            return owed
        self._owed /= LOWER_ONCE
        return LOWER_ONCE

    def without_effect(self) -> float:
        """What undoes the last cut, which had no effect; all cuts for broken batches, if it was one of them."""
        cut, self._last_cut, self._last_event = min(1.0, self._last_cut), 1.0, -SOON - 1
        self._owed = max(1.0, self._owed * cut)
        return 1.0 / cut

    def give_back(self, iteration: int) -> float:
        """What the rates grow by in a step long after the last explosion; 1 if nothing is owed."""
        if self._owed <= 1.0 or iteration - self._last_event <= PROBATION:
            return 1.0
        factor = min(self._owed, GROWS)
        self._owed /= factor
        return factor
