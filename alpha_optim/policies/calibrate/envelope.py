"""What the rate held is multiplied by: nothing during the search, a ramp behind it, the decay in the end."""

from __future__ import annotations

from alpha_optim.alpha.states import Remembers
from alpha_optim.user_warning import warn_user

RAMP, SHORTEST_RAMP = 20, 10
"""The rate held grows linearly from a tenth in a 20th of the run, at least 10 steps: the best trial ended at a rate of
almost 0, where the loss is curved more. So it does where a task has changed: what the optimizer remembers belongs to
another loss."""


class Envelope(Remembers, names={"found_at": "done_at"}):
    """The factor of the rate held, by progress: steps executed, and calls that the guard did not execute.

    Attributes:
        total_steps: Steps of the whole run.
        anneal: Whether the rate falls to 0 in the end.
        found_at: Progress after the search.
        skipped: Calls that the guard did not execute.
    """

    found_at: int
    skipped: int
    _ramp_at: int | None  # progress at which a ramp began
    _warned: bool

    def __init__(self, total_steps: int, anneal: bool) -> None:
        """Start within the search."""
        self.total_steps, self.anneal = total_steps, anneal
        self.found_at = self.skipped = 0
        self._ramp_at, self._warned = None, False

    def search_ended(self, iteration: int) -> None:
        """The search ended with an iteration."""
        self.found_at = iteration + 1 + self.skipped

    def ramp_from(self, progress: int | None) -> None:
        """Grow from a tenth, from there on; None: not any more."""
        self._ramp_at = progress

    def falls_from(self, stands_from: int) -> int:
        """Progress at which the decay begins, for a loss that no longer falls from an iteration on."""
        return max(self.found_at, stands_from + self.skipped)

    def factor(self, progress: int, stands_from: int) -> float:
        """The factor.

        Args:
            progress: Where the run is.
            stands_from: Iteration from which the loss no longer falls.
        """
        if self.anneal and progress > self.total_steps and not self._warned:
            self._warned = True
            warn_user(f"more steps than total_steps={self.total_steps}: the last learning rate is held")
        return self._ramped(progress) * self._annealed(progress, self.falls_from(stands_from))

    def _ramped(self, progress: int) -> float:
        if self._ramp_at is None:
            return 1.0
        length = max(SHORTEST_RAMP, self.total_steps // RAMP)
        return min(1.0, max(0.1, 0.1 + 0.9 * (progress - self._ramp_at) / length))

    def _annealed(self, progress: int, begin: int) -> float:
        """Fall linearly from 1 at ``begin`` to 0."""
        if not self.anneal:
            return 1.0
        left = self.total_steps - min(progress, self.total_steps - 1)
        return min(1.0, left / max(1, self.total_steps - begin))
