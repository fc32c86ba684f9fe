"""The rate after the calibration: held, and corrected by what steps and their losses say.

Up while windows of the loss (`loss_watch`) fall fast, which they can only do at a rate that is not too high, and where
they rest on a `plateau` from the beginning; down by half where they stay above what the calibration had reached, and
for a while after a step was taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alpha_optim.alpha.loss_level import Level
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.states import Remembers
from alpha_optim.alpha.window import rises_of
from alpha_optim.policies.calibrate.high_loss import HighLoss, Remedy
from alpha_optim.policies.calibrate.loss_watch import LossWatch, Seen
from alpha_optim.policies.calibrate.phase import Ended
from alpha_optim.policies.calibrate.plateau import Plateau
from alpha_optim.policies.calibrate.raised import Raised
from alpha_optim.policies.calibrate.usual_batch import UsualBatch

REGROWS = 0.25
"""Change of the log rate per step on the way back to the one held."""
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


class HeldRate(Remembers):
    """The log of the scale to hold, from the calibration on."""

    found: float  # by the calibration
    position: float  # the same, corrected since
    now: float  # the log rate in force, lower for a while after a step was taken back
    highest: float  # how high it may be raised
    stands_from: int  # iteration from which the loss no longer falls
    _lowered: bool
    _taken_back: int  # iteration at which a step was taken back last
    _newest: int  # iteration of the newest step seen
    _watch: LossWatch
    _plateau: Plateau
    _raised: Raised

    def __init__(self, total_steps: int) -> None:
        """Start with nothing found."""
        self.total_steps = total_steps
        self.found = self.position = self.now = self.highest = 0.0
        self.limit = math.inf  # how high any rate may be
        self.stands_from = int(STANDS_BY * total_steps)
        self._lowered = False
        self.said: list[str] = []  # what was done and is not told yet, rates as in `After.text`
        self._watch, self._plateau, self._raised = LossWatch(total_steps), Plateau(), Raised()
        self._high_loss, self.batch = HighLoss(), UsualBatch()
        self._taken_back, self._newest = -CALM - 1, -1

    def begin(self, found: float, level: Level | None, highest: float, ended: Ended | None = None) -> None:
        """Hold what was found.

        Args:
            found: The log rate.
            level: The losses must not rise above it; None: they are not looked at.
            highest: How high the log rate may be raised.
            ended: How the best trial of the search ended; None if there was none.
        """
        self.found = self.position = self.now = min(found, self.limit)
        self.highest = max(self.found, min(highest, self.limit))
        self.batch.rate_found()
        self._watch.level = level
        self._raised.progress_from(level)
        self._plateau.begin(ended)

    def plan_anew(self, before: int) -> None:
        """The run has another length than the ``before`` it was planned for."""
        if self.stands_from == int(STANDS_BY * before):  # else the loss was seen to stand
            self.stands_from = int(STANDS_BY * self.total_steps)

    @property
    def target(self) -> float:
        """The log rate to hold for batches of the usual size: less where they became much smaller."""
        return self.position - self.batch.too_small_by

    def starts_after(self, iteration: int) -> None:
        """Ignore losses up to this iteration, which were made before the return to the best point."""
        self._watch.starts_after(iteration)

    def measured(self, measurement: AlphaMeasurement) -> None:
        """Take note of the size of the batch, and of where the step went."""
        self.batch.saw(measurement.samples_start)
        rises = rises_of(measurement)
        if rises is not None:
            self._watch.stepped(rises[1])

    def after_step(self, iteration: int, loss: float) -> None:
        """Hear of a step and its loss.

        The guard lowers the rate by much, for safety; once all is calm, most of that is taken back.

        Args:
            iteration: Iteration of the step; it may be told twice, once without its loss.
            loss: Mini-batch loss that it was made from, nan if not known.
        """
        again, self._newest = iteration <= self._newest, max(iteration, self._newest)
        lost = math.isfinite(loss) and iteration > self._watch.newest and self._raised.loses(loss)
        seen = self._watch.see(loss, iteration)
        if lost:
            seen = None
            self._watch.settle()  # the losses of these steps say nothing about the rate from before
            self._lower()
            text = "half of all progress was lost since the rate was raised"
            self.said.append(f"{text}: {{{self.position}}} from before is held again")
        if seen is not None:
            self._correct(seen, iteration + 1)
        calm = iteration - self._taken_back > CALM
        if self.now > self.target:
            self.now = self.target
        elif calm and not again:
            self.now = min(self.target, self.now + REGROWS)

    def _correct(self, seen: Seen, iteration: int) -> None:
        """Change the rate by what a window of losses said; it acts from this iteration on."""
        if seen.by_itself:
            self._begin_anew()
            self._high_loss.forget()
            self.said.append(f"the loss rises, and not by the steps made: {{{self.position}}} is held")
            return
        if not math.isnan(seen.mean) and not seen.unclear:
            self._do(self._high_loss.judge(seen, self.position))
        grows = iteration < min(self.stands_from, GROWS * self.total_steps)
        grows = grows and not self._lowered and not self._high_loss.gave_up
        higher = self._plateau.higher(seen, self.position) if grows and self.position < self.limit else None
        if higher is not None:
            self._raise(higher, seen)
            self.said.append(
                f"the loss rests where the best trial ended: the rate held is raised to {{{self.position}}}"
            )
        elif seen.stands:
            self.stands_from = min(self.stands_from, iteration)
        elif grows and seen.falls and self.position < self.highest:
            self._raise(min(self.position + GROWTH, self.highest), seen)
            self.said.append(f"the loss falls fast: the rate held is raised to {{{self.position}}}")

    def _raise(self, higher: float, seen: Seen) -> None:
        """Hold a higher rate, after a window of losses."""
        self._raised.begin(self.position, seen.level, self._watch.length)
        self.position = min(higher, self.limit)

    def _do(self, remedy: Remedy) -> None:
        """Lower the rate where the loss stays higher than it was, and give it back where that has no effect."""
        if remedy is Remedy.GIVE_BACK:
            self.position = self._high_loss.given_back(self.position)
            self.said.append(f"the loss stays as high at lower rates: {{{self.position}}} from before is held again")
        elif remedy is Remedy.LOWER:
            self._lower()
            self.said.append(f"the loss is higher than it was: the rate held is lowered to {{{self.position}}}")

    def _lower(self) -> None:
        """The rate was too high: lower it, or take back what it was raised by, on a plateau or just now."""
        before = self._raised.before if self._plateau.before is None else self._plateau.before
        self._plateau.before = None
        self._raised.end()
        self.position = self.position + LOWERED if before is None else before
        self._lowered = True

    def level_accepted(self) -> None:
        """The loss rose, and not by the rate: what was lowered for it is given back, and no more is."""
        self._begin_anew()
        self._high_loss.accepted()

    def _begin_anew(self) -> None:
        """Losses so far say nothing about those to come."""
        self._watch.begin_anew()
        self._raised.end()
        self.position = self._high_loss.given_back(self.position)

    def taken_back(self, iteration: int, cut: float) -> None:
        """A step was taken back and the log rate changed by ``cut``: it was too high, once per bad stretch."""
        self.now += cut
        if iteration - self._taken_back > CALM:
            if self._plateau.before is not None:  # the loss of these steps says nothing about the rate from before
                self._watch.settle()
            self._lower()
            self.said.append(f"a step was taken back: the rate held is lowered to {{{self.position}}}")
        self._taken_back = iteration

    def rate(self) -> dict[str, Any]:
        """The rate, as plain values, for `rate_is`."""
        return {"position": self.position, "now": self.now, "lowered": self._lowered}

    def rate_is(self, before: Mapping[str, Any]) -> None:
        """Hold the rate from before some steps were taken back."""
        self.position, self.now = float(before["position"]), float(before["now"])
        self._lowered = bool(before["lowered"])
        self._raised.end()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as plain values."""
        return {**super().state_dict(), **self._high_loss.state_dict(), **self.batch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; versions before knew of no plateau, and raised no rate for it."""
        super().load_state_dict({"plateau": Plateau().state_dict(), "raised": Raised().state_dict(), **state})
        self._high_loss.load_state_dict(state)
        self.batch.load_state_dict(state)
