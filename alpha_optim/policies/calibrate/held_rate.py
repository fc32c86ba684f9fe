"""The rate after the calibration: held, and corrected by what steps and their losses say.

Up while windows of the loss (`loss_watch`) fall fast, which they can only do at a rate that is not too high;
down by half where they stay above what the calibration had reached, and for a while after a step was taken
back.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from alpha_optim.alpha.loss_trace import Level
from alpha_optim.policies.calibrate.knee_search import FASTEST
from alpha_optim.policies.calibrate.loss_watch import LossWatch, Seen

LOG = logging.getLogger(__name__)
LOWERED = math.log(0.5)
"""Change of the log rate for every stretch in which steps had to be taken back, and for every window in which
the loss was too high."""
CALM = 10
"""After so many steps of which none was taken back the rate returns towards the one held."""
STANDS_BY = 0.5
"""Whatever the loss does, it is taken to stand after this share of the run."""
GROWTH = math.log(1.5)
"""Change of the log rate after a window in which the loss fell fast, ..."""
GROWS = 0.4
"""... as long as less than this share of the run is over and nothing has lowered the rate."""


class HeldRate:
    """The log of the scale to hold, from the calibration on."""

    def __init__(self, total_steps: int) -> None:
        """Start with nothing found."""
        self.total_steps = total_steps
        self.found = 0.0  # by the calibration
        self.position = 0.0  # the same, corrected since
        self.stands_from = int(STANDS_BY * total_steps)  # iteration from which the loss no longer falls
        self._watch = LossWatch(total_steps)
        self._lowered = False
        self._taken_back = -CALM - 1  # iteration at which a step was taken back last
        self._newest = -1  # iteration of the newest step seen

    def __str__(self) -> str:
        """Say what the rate was raised or lowered to, as a multiple of the initial one, if it was."""
        if self.position == self.found:
            return ""
        return f"{'lowered' if self.position < self.found else 'raised'} to {math.exp(self.position):.3g}"

    def begin(self, found: float, level: Level | None) -> None:
        """Hold what was found; ``level`` is the best one of the losses so far."""
        self.found = self.position = found
        self._watch.level = level

    def starts_after(self, iteration: int) -> None:
        """Losses up to this iteration, from before a return to the best point, are none of the rate held."""
        self._watch.newest = iteration

    def after_step(self, scale: float, iteration: int, loss: float, highest: float) -> float:
        """Return the log scale to go to after a step.

        The guard lowers the scale by much, for safety; once all is calm, most of that is taken back.

        Args:
            scale: The log scale now.
            iteration: Iteration of the step; it may be told twice, once without its loss.
            loss: Mini-batch loss that it was made from, nan if not known.
            highest: How high the log scale may be raised.
        """
        again, self._newest = iteration <= self._newest, max(iteration, self._newest)
        seen = self._watch.see(loss, iteration)
        if seen is not None:
            self._correct(seen, iteration + 1, highest)
        if scale > self.position:
            return self.position
        calm = iteration - self._taken_back > CALM
        return min(self.position, scale + FASTEST) if calm and not again else scale

    def _correct(self, seen: Seen, iteration: int, highest: float) -> None:
        """Change the rate by what a window of losses said; it acts from this iteration on."""
        if seen.high:
            self._lower()
            LOG.info("the loss is higher than it was: rate held %s", self)
        grows_until = min(self.stands_from, GROWS * self.total_steps)
        if seen.stands:
            self.stands_from = min(self.stands_from, iteration)
        elif seen.falls and not self._lowered and iteration < grows_until and self.position < highest:
            self.position = min(self.position + GROWTH, highest)
            LOG.info("the loss falls fast: rate held %s", self)

    def _lower(self) -> None:
        """The rate was too high."""
        self.position += LOWERED
        self._lowered = True

    def taken_back(self, iteration: int, held: bool) -> None:
        """A step was taken back: if the rate was being held it was too high, once per bad stretch."""
        if held and iteration - self._taken_back > CALM:
            self._lower()
        self._taken_back = iteration

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "found": self.found,
            "position": self.position,
            "stands_from": self.stands_from,
            "watch": self._watch.state_dict(),
            "lowered": self._lowered,
            "taken_back": self._taken_back,
            "newest": self._newest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.found, self.position = float(state["found"]), float(state["position"])
        self.stands_from = int(state["stands_from"])
        self._watch.load_state_dict(state["watch"])
        self._lowered, self._taken_back = bool(state["lowered"]), int(state["taken_back"])
        self._newest = int(state["newest"])
