"""Find the rate in the first steps of a run, then hold and anneal it.

Where losses are measured they find the rate (`loss_search`), else alpha does (`knee_search`). Afterwards it is
held and corrected (`held_rate`). Annealing begins where the loss no longer falls, in the middle of the run at
the latest.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent, GuardReason
from alpha_optim.alpha.window import rises_of
from alpha_optim.policies.calibrate import loss_search
from alpha_optim.policies.calibrate.held_rate import HeldRate
from alpha_optim.policies.calibrate.knee_search import KneeSearch
from alpha_optim.policies.calibrate.loss_search import LossSearch
from alpha_optim.user_warning import warn_user

LOG = logging.getLogger(__name__)
FEWEST = 100
"""Calibration takes at least this many steps, or a fifth of shorter runs."""
SPARSE = 10
"""After the calibration every so many steps are measured, if the policy decides (``every=None``)."""
BELOW_FOUND = math.log(0.8)
"""Held for a while, the log rate is so much less than the one found, which is good for a rate that falls from
the start."""
RAMP = 20
SHORTEST_RAMP = 10
"""After the calibration the rate grows linearly from a tenth in a 20th of the run, at least 10 steps:
optimizers start anew."""


class CalibrateThenAnneal:
    """Climbs until the loss rises, returns, sets the rate, holds it and anneals it linearly to 0."""

    keeps_scale = True

    def __init__(
        self,
        total_steps: int,
        *,
        calibrate: float = 0.1,
        boost: float | None = None,
        anneal: bool = True,
    ) -> None:
        """Set the horizon.

        Args:
            total_steps: Number of optimizer steps of the whole run.
            calibrate: Share of the run for the calibration, in (0, 1); at least 100 steps where the run
                is long enough for that. With losses it may take up to twice as long.
            boost: What the rate found is multiplied by, a factor >= 1; None: by the batch size, 1 for 32
                samples, 1.5 for 128, with losses also down to 0.66 for 8.
            anneal: Whether to anneal linearly to 0 once the loss no longer falls, from the middle of the
                run on at the latest (not if a schedule does).

        Raises:
            ValueError: If an argument is out of range.
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
        if not 0.0 < calibrate < 1.0:
            raise ValueError(f"calibrate must lie strictly between 0 and 1, got {calibrate}")
        if boost is not None and not boost >= 1.0:
            raise ValueError(f"boost must be >= 1, got {boost}")
        self.total_steps, self.boost, self.anneal = total_steps, boost, anneal
        self.calibration_steps = max(int(calibrate * total_steps), min(FEWEST, total_steps // 5))
        self._warned = False
        self._search: LossSearch | KneeSearch | None = None
        self._by_loss = self.calibration_steps >= loss_search.SHORTEST
        knee = KneeSearch(self.calibration_steps, boost)
        # The envelope until the search begins.
        self._start = loss_search.START if self._by_loss else math.exp(knee.start)
        self._ramp = False  # whether the rate grows after the calibration
        self._given: float | None = None  # learning rate of the first group at scale 1
        self._scale = 0.0  # log of the product of all factors, the guard's included
        self._done = False
        self._done_at = 0  # progress after the calibration
        self._ramp_at = 0  # where the ramp begins
        self._skipped = 0  # calls that the guard did not execute
        self._held = HeldRate(total_steps)
        self._undo: dict[str, Any] | None = None  # the state before a step was taken back last

    @property
    def calibrated(self) -> bool:
        """Whether the calibration is over and the rate found."""
        return self._done

    def __repr__(self) -> str:
        """Say where it is, and what led to the rate; rates are those of the first param group before any schedule."""
        search = self._search
        if self._done:
            seen = search.seen if isinstance(search, LossSearch) else {}
            why = "; ".join(f"{name} at {self._rate(where)}" for name, where in seen.items())
            doubt = search.doubt if isinstance(search, LossSearch) else ""
            found = (
                f"holds {self._rate(self._held.found)} since {doubt}"
                if doubt
                else f"found {self._rate(self._held.found)}"
            )
            state = f"{found} at step {self._done_at}" + (f" ({why})" if why else "")
            if self._held.position != self._held.found:
                word = "lowered" if self._held.position < self._held.found else "raised"
                state += f", {word} to {self._rate(self._held.position)}"
        elif search is None:
            state = "nothing measured yet"
        else:
            state = f"searching the learning rate, at {self._rate(self._scale)}"
        return f"CalibrateThenAnneal({self.total_steps} steps: {state})"

    def _rate(self, position: float) -> str:
        """A log scale as the learning rate of the first param group, for messages."""
        if self._given is None:
            return f"{math.exp(position):.3g} times the rate given"
        return f"{self._given * math.exp(position):.3g}"

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return the factor for this measurement."""
        n = measurement.iteration
        self._held.saw_batch(measurement.samples_start)
        if self._given is None and self._search is None and measurement.lr and measurement.lr[0] > 0.0:
            self._given = measurement.lr[0] / self._start
        if self._done:
            return self._hold(n, measurement.loss_start)
        if self._search is None and not self._begin(measurement):
            self._done = n + 2 >= self.calibration_steps
            return 1.0
        assert self._search is not None
        self._search.see(measurement)
        self._conclude(n + 2)
        return self._move_to(self._held.position if self._done else self._search.position)

    def _begin(self, measurement: AlphaMeasurement) -> bool:
        """Choose how to search; False while nothing is known to search with."""
        loss = measurement.loss_start
        if self._by_loss and math.isfinite(loss):
            self._search = LossSearch(self.calibration_steps, self.boost)
            return True
        knee = KneeSearch(self.calibration_steps, self.boost)
        self._start = math.exp(knee.start)
        if rises_of(measurement) is None:
            return False
        LOG.warning(
            "%s: alpha alone steers, and the result depends on the initial learning rate",
            "no losses are measured (give AlphaGuided a loss_fn)" if self._by_loss else
            f"total_steps={self.total_steps} is too short for a search by the loss (100 are needed)",
        )  # fmt: skip
        self._search = knee
        return True

    def _conclude(self, iteration: int) -> None:
        """Take over what the search has found, once it has."""
        if self._search is None or not self._search.done:
            return
        self._done, found, level = True, self._search.position, None
        self._done_at = self._ramp_at = iteration + self._skipped
        if isinstance(self._search, LossSearch):
            found += BELOW_FOUND if self.anneal and not self._search.doubt else 0.0
            self._ramp = self._search.wants_return
            level = None if self._search.trace is None else self._search.trace.best
        self._held.begin(found, level)
        LOG.info("%r", self)

    def _move_to(self, position: float) -> float:
        """Factor that brings the scale there."""
        change, self._scale = position - self._scale, position
        return math.exp(change)

    def give_up(self, iteration: int) -> float:
        """End the search and keep the rate given; return the factor that brings the scale back to it."""
        if self._done:
            return 1.0
        self._done, self._done_at = True, iteration + self._skipped
        self._held.begin(0.0, None)
        LOG.info("the search for the rate was given up: the rate given is held")
        return self._move_to(0.0)

    def on_step(self, iteration: int, loss: float) -> float:
        """Return the factor for a step that was made, and the loss it was made from."""
        if isinstance(self._search, LossSearch) and self._search.wants_return:
            self._held.starts_after(iteration)
            return 1.0
        return self._hold(iteration, loss) if self._done else 1.0

    def _hold(self, iteration: int, loss: float) -> float:
        """The factor after the calibration."""
        highest = self._search.highest if isinstance(self._search, LossSearch) else math.inf
        return self._move_to(self._held.after_step(self._scale, iteration, loss, highest))

    def wants(self, iteration: int) -> bool:
        """Whether to measure: every step of the calibration, one in `SPARSE` afterwards."""
        return not self._done or iteration % SPARSE == 0

    def wants_return(self) -> bool:
        """Whether to go back to the best point so far, asked after every measurement; once per climb."""
        if not isinstance(self._search, LossSearch):
            return False
        wanted, self._search.wants_return = self._search.wants_return, False
        return wanted

    def trusts_point(self) -> bool:
        """Whether the points reached may become the best one: not those of the fast climb past the knee."""
        return not isinstance(self._search, LossSearch) or self._search.trusts_point

    def searches(self, iteration: int) -> bool:
        """Whether the calibration is under way, or about to begin; not for ever if measurements cease."""
        over = self._search.over_by if isinstance(self._search, LossSearch) else self.calibration_steps
        return not self._done and iteration < over

    def envelope(self, iteration: int) -> float:
        """Return a low start until the first measurement, then 1, and in the end fall linearly to 0."""
        if iteration > self.total_steps and not self._warned:
            self._warned = True
            warn_user(f"more steps than total_steps={self.total_steps}: the last learning rate is held")
        if isinstance(self._search, LossSearch) or (self._done and self._search is None):
            falls_from = max(self._done_at, self._held.stands_from + self._skipped)
            return self._ramped(iteration) * self._annealed(iteration, falls_from) if self._done else 1.0
        if iteration < self.calibration_steps:
            return self._start if self._search is None and not self._done else 1.0
        # The calibration is over, but perhaps no alpha has come since to say so.
        late = 1.0 if self._done or self._search is None else self._search.shortfall
        return late * self._annealed(iteration, self.calibration_steps)

    def _ramped(self, iteration: int) -> float:
        """Grow from a tenth to 1 where the optimizer's state starts anew: after the calibration or a change of task."""
        if not self._ramp:
            return 1.0
        length = max(SHORTEST_RAMP, self.total_steps // RAMP)
        return min(1.0, max(0.1, 0.1 + 0.9 * (iteration - self._ramp_at) / length))

    def _annealed(self, iteration: int, begin: int) -> float:
        """Fall linearly from 1 at ``begin`` to 0."""
        if not self.anneal:
            return 1.0
        left = self.total_steps - min(iteration, self.total_steps - 1)
        return min(1.0, left / max(1, self.total_steps - begin))

    def on_event(self, event: GuardEvent) -> None:
        """A step was taken back and the rate lowered, or that was of no effect and is undone."""
        self._skipped += event.skipped
        if event.reason is GuardReason.NO_EFFECT:
            if self._undo is not None:
                skipped = self._skipped
                self._set(self._undo)
                self._skipped = skipped
            self._undo = None
            self._held.level_accepted()
            if self._done and math.isfinite(event.loss_after):  # what the optimizer remembers belongs to another loss
                self._ramp, self._ramp_at = True, event.iteration + self._skipped
            return
        if not event.restored or event.reason is GuardReason.POLICY_RETURNED:
            return
        self._undo = self._remembered()
        self._scale += math.log(event.scale_factor)
        self._held.taken_back(event.iteration, held=self._done)
        if not self._done and self._search is not None:
            self._search.taken_back(event)
            self._conclude(event.iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered of the calibration."""
        return {**self._remembered(), "undo": self._undo}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a calibration."""
        self._set(state)
        self._undo = state.get("undo")

    def _remembered(self) -> dict[str, Any]:
        search = self._search
        return {
            "search": None if search is None else search.state_dict(),
            "by_loss": isinstance(search, LossSearch),
            "start": self._start,
            "given": self._given,
            "ramp": self._ramp,
            "scale": self._scale,
            "done": self._done,
            "done_at": self._done_at,
            "total_steps": self.total_steps,
            "ramp_at": self._ramp_at,
            "skipped": self._skipped,
            "held": self._held.state_dict(),
            "warned": self._warned,
        }

    def _set(self, state: dict[str, Any]) -> None:
        self._search = None
        if state["search"] is not None:
            kind = LossSearch if state["by_loss"] else KneeSearch
            self._search = kind(self.calibration_steps, self.boost)
            self._search.load_state_dict(state["search"])
        self._start, self._scale = float(state["start"]), float(state["scale"])
        self._ramp, self._given = bool(state["ramp"]), state.get("given")
        self._done, self._done_at = bool(state["done"]), int(state["done_at"])
        self._ramp_at, self._skipped = int(state.get("ramp_at", self._done_at)), int(state.get("skipped", 0))
        self._held.load_state_dict(state["held"])
        if int(state.get("total_steps", self.total_steps)) != self.total_steps:
            self._held.plan_anew(int(state["total_steps"]))
        self._warned = bool(state["warned"])
