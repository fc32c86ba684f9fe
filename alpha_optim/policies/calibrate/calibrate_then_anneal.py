"""Find the rate in the first steps of a run, then hold and anneal it.

Four phases: `jump` to where a step promises a small decrease, `climb` until the loss has risen, short annealed `trials`
from one point, and, from the end of the best of them, the rate found is held, corrected (`held_rate`) and annealed.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from typing import Any

from alpha_optim.alpha.loss_level import Level
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import AlphaStatus, GuardEvent, GuardReason
from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.policies.base import Decision, Place, whole
from alpha_optim.policies.calibrate.climb import Climb
from alpha_optim.policies.calibrate.envelope import Envelope
from alpha_optim.policies.calibrate.held_rate import HeldRate
from alpha_optim.policies.calibrate.jump import Jump
from alpha_optim.policies.calibrate.loss_watch import UNKNOWN
from alpha_optim.policies.calibrate.phase import CUT_SHORT, After, Phase
from alpha_optim.policies.calibrate.settings import HIGHEST, SHORTEST_RUN, Settings, trial_length
from alpha_optim.policies.calibrate.trials import Trials

LOG = logging.getLogger(__name__)
SPARSE = 10
"""Where alpha is not needed every so many steps are measured, if the policy decides (``every=None``)."""
BELOW_FOUND = math.log(2.0 / 3.0)
"""Trials find the peak of a rate that falls from the beginning, and is half of it in the mean. Held for half of the run
and then annealed it would be three quarters: so it is held at two thirds."""
KEPT = "the rate given is kept"
_PHASES: dict[str, Any] = {"jump": Jump, "climb": Climb, "trials": Trials}
_RATE = re.compile(r"\{([^}]*)\}")


class CalibrateThenAnneal:
    """Finds a rate by short trials that leave nothing behind, holds it and anneals it linearly to 0.

    Args:
        total_steps: Number of optimizer steps of the whole run, those of the search among them.
        anneal: Whether to anneal linearly to 0 once the loss no longer falls, from the middle of the run on at the
            latest (not if a schedule does).
        around: Whether to look only within a factor of ten of the rate given.
        trial_steps: Steps of a trial, at least 10; default: 4 % of runs of up to 2,500 steps, but at least 24 or
            6 %, whichever are fewer; less of longer ones.
    """

    def __init__(
        self, total_steps: int, *, anneal: bool = True, around: bool = False, trial_steps: int | None = None
    ) -> None:
        """Set the horizon.

        Raises:
            TypeError: If ``anneal`` or ``around`` is neither True nor False.
            ValueError: If an argument is out of range.
        """
        total_steps = whole("total_steps", total_steps, 1)
        trial_steps = None if trial_steps is None else whole("trial_steps", trial_steps, 10)
        for name, flag in (("anneal", anneal), ("around", around)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        if trial_steps is not None and trial_steps > max(10, total_steps // 4):
            raise ValueError(
                f"trial_steps must be at least 10 and at most a quarter of total_steps={total_steps}, got {trial_steps}"
            )
        self.around = around
        self._envelope = Envelope(total_steps, anneal)
        self._story: list[tuple[int, str]] = []
        self._phases: list[tuple[int, str]] = []
        settings = Settings(total_steps, trial_steps or trial_length(total_steps), around)
        self._phase = None if total_steps < SHORTEST_RUN else _first_phase(settings)
        self._held = HeldRate(total_steps)
        self._given: float | None = None  # learning rate of the first group at scale 1, when the search began
        self._now: float | None = None  # and now, which is kept where none is found; others may have written it
        self._since = 0  # measurements of earlier iterations belong to another trial
        self._begun = False  # whether the start of the search is kept
        self._keep: Place | None = None
        self._restore: Place | None = None
        # The held rate before a step was taken back last, or before the first of several for broken batches.
        self._undo: dict[str, Any] | None = None
        if self._phase is None:
            self._tell(0, f"total_steps={total_steps} is too short for a search: {KEPT}", logging.WARNING)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._envelope.total_steps

    @property
    def anneal(self) -> bool:
        """Whether the rate falls to 0 in the end."""
        return self._envelope.anneal

    @property
    def calibrated(self) -> bool:
        """Whether the search is over."""
        return self._phase is None

    @property
    def story(self) -> tuple[tuple[int, str], ...]:
        """What was seen and done in the search, in absolute rates, with the iteration at which it was."""
        return tuple(self._story)

    @property
    def phases(self) -> tuple[tuple[int, str], ...]:
        """Iterations at which a phase began: ``jump``, ``climb``, ``trials``, ``held``, ``annealed``."""
        return tuple(self._phases)

    @property
    def found_lr(self) -> float | None:
        """The learning rate that the search ended with, of the first param group; None before, or if it is unknown."""
        if self._phase is not None or self._given is None:
            return None
        return self._given * math.exp(min(700.0, self._held.found))

    def __repr__(self) -> str:
        """Say where it is; rates are those of the first param group before any schedule."""
        if self._phase is not None:
            state = f"searching the learning rate ({_name_of(self._phase)}), at {self._shown(self._phase.position)}"
        else:
            state = f"holds {self._shown(self._held.found)} since step {self._envelope.found_at}"
            if self._held.position != self._held.found:
                word = "lowered" if self._held.position < self._held.found else "raised"
                state += f", {word} to {self._shown(self._held.position)}"
            state += f" ({self._story[-1][1]})" if self._story else ""
            if self._phases and self._phases[-1][1] == "annealed":
                state += f", annealed since step {self._phases[-1][0] + self._envelope.skipped}"
        return f"CalibrateThenAnneal({self.total_steps} steps: {state})"

    def _shown(self, position: float) -> str:
        """A log rate as the learning rate of the first param group, for messages."""
        given = self._given if self._phase is not None else self._now or self._given  # others may have written it since
        factor = math.exp(min(700.0, position, self._held.limit))
        return f"{factor:.3g} times the rate given" if given is None else f"{given * factor:.3g}"

    def _in_rates(self, text: str) -> str:
        """A text of a phase, its log rates as learning rates."""
        return _RATE.sub(lambda match: self._shown(float(match[1])), text)

    def _tell(self, iteration: int, text: str, severity: int = logging.INFO) -> None:
        text = self._in_rates(text)
        self._story.append((iteration, text))
        LOG.log(severity, "%s", text)

    # ---------------------------------------------------------------- what is heard

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Hear of a measurement; the rate is decided in `decide`."""
        n = measurement.iteration
        self._held.measured(measurement)
        if self._phase is None:
            self._hold(n, measurement.loss_start)
            return 1.0
        rate = (measurement.lr[0] or max(measurement.lr)) if measurement.lr else 0.0
        if n < self._since:
            return 1.0
        if measurement.status is AlphaStatus.NOT_FINITE:  # nobody judges steps; else there are no such measurements
            self._go_on(self._phase.exploded(), n + 1)
        elif rate > 0.0 and self._given is not None:
            self._go_on(self._phase.measured(measurement, math.log(rate / self._given)), n + 1)
        return 1.0

    def on_step(self, iteration: int, loss: float) -> float:
        """Hear of a step that was made, and of the loss it was made from."""
        if self._phase is None:
            self._hold(iteration, loss)
        else:
            self._go_on(self._phase.stepped(loss), iteration)
        return 1.0

    def on_event(self, event: GuardEvent) -> None:
        """A step was taken back, or that was of no effect and is undone."""
        self._envelope.skipped += event.skipped
        if self._phase is not None:
            if event.restored:
                self._go_on(self._phase.exploded(), event.iteration - 1)
        elif event.reason is GuardReason.NO_EFFECT:
            lowered, self._undo = self._undo, None
            of_data = lowered is not None and bool(lowered["broken"])  # batches that are not finite tell of no level
            if lowered is not None:
                self._held.rate_is(lowered)
            if not of_data:
                self._held.level_accepted()
            if lowered is not None:
                self._tell(event.iteration, f"going back did not help: {{{self._held.position}}} is held again")
            if math.isfinite(event.loss_after) and not of_data:
                self._envelope.ramp_from(event.iteration + self._envelope.skipped)
        elif event.restored:
            broken = event.reason is not GuardReason.LOSS_ROSE
            if not (broken and self._undo is not None and self._undo.get("broken", False)):
                self._undo = {**self._held.rate(), "broken": broken}
            self._held.taken_back(event.iteration, math.log(event.scale_factor))
            self._tell_what_was_done(event.iteration)

    def give_up(self, iteration: int) -> None:
        """End the search and keep the rate given."""
        if self._phase is not None:
            self._go_on(After(None, corrected=False, text="the search was given up"), iteration)

    def start_over(self, iteration: int) -> None:
        """Somebody has changed the parameters: search from where they are now, or end if much was spent already."""
        phase = self._phase
        if phase is None:
            return
        self._tell(iteration, "somebody has changed the parameters while the learning rate is searched")
        self._keep = self._restore = None
        if phase.steps <= phase.settings.longest_climb:
            self._phase, self._begun, self._since = _first_phase(phase.settings), False, iteration
            return
        after = phase.cut_short() if isinstance(phase, Trials) else CUT_SHORT
        self._go_on(after._replace(restore=None, ended=None, corrected=False), iteration - 1)

    def cut_short(self, iteration: int) -> None:
        """End the search, since the run is: with the best trial so far, or the start and the rate given."""
        phase = self._phase
        if phase is None:
            return
        after = phase.cut_short() if isinstance(phase, Trials) else CUT_SHORT
        if not self._begun or self._keep == "start":  # nothing was tried yet, and nothing is kept
            after, self._begun, self._keep = after._replace(restore=None), True, None
        self._go_on(after, iteration - 1)
        self._envelope.ramp_from(None)

    def _go_on(self, after: After, iteration: int) -> None:
        """Take over what follows from something heard at an iteration."""
        if not self._begun:
            self._begun, self._keep = True, "start"
        level = self._level()
        self._phase = after.phase
        self._keep = after.keep or self._keep
        if after.restore is not None:
            self._restore, self._since = after.restore, iteration + 1
        if after.phase is None:
            self._end(after, iteration, level)
        elif after.text:
            self._tell(iteration, after.text)

    def _end(self, after: After, iteration: int, level: Level) -> None:
        """The search is over: hold what was found, or the rate given."""
        self._envelope.search_ended(iteration)
        position, shift, text = 0.0, self._shift(), self._in_rates(after.text)
        self._given = self._now
        if after.found is None:
            self._tell(iteration, f"{text}: {KEPT}", logging.WARNING)
        else:
            position = after.found + shift + (BELOW_FOUND if self.anneal else 0.0)
            share = ", two thirds of it" if self.anneal else ""
            self._tell(iteration, f"{text}; {{{position}}} is held{share}")
            self._envelope.ramp_from(self._envelope.found_at)
        ended = after.ended if after.corrected else None
        if ended is not None:
            ended = ended._replace(worse_from=ended.worse_from + shift)
        self._held.begin(position, level if after.corrected else None, after.highest + shift, ended)
        self._held.starts_after(iteration)

    def _level(self) -> Level:
        """Where the losses lay at the start: those of the rate held must not rise above that."""
        known = isinstance(self._phase, Trials) and self._phase.level.count > 1
        return self._phase.level if known and isinstance(self._phase, Trials) else UNKNOWN

    def _hold(self, iteration: int, loss: float) -> None:
        if iteration >= self._since:
            self._held.after_step(iteration, loss)
            self._tell_what_was_done(iteration)

    def _tell_what_was_done(self, iteration: int) -> None:
        """Tell what has become of the rate held."""
        said, self._held.said = self._held.said, []
        for text in said:
            self._tell(iteration, text)

    # ---------------------------------------------------------------- what is decided

    def limit(self, scale: float) -> None:
        """Look for no rate above a bound."""
        self._held.limit = min(HIGHEST, math.log(scale)) if scale > 0.0 else HIGHEST

    def _shift(self) -> float:
        """The log of the rate given when the search began, in multiples of that given now."""
        return 0.0 if self._given is None or self._now is None else math.log(self._given / self._now)

    def _heed_limits(self, phase: Phase, iteration: int) -> Phase | None:
        """The phase, within the highest rate allowed; None if it ends since the run has become too short for it."""
        highest = min(HIGHEST, self._held.limit - self._shift())
        if phase.settings.highest != highest:
            settings = replace(phase.settings, highest=highest)
            phase = replace(phase, settings=settings, position=min(phase.position, highest))  # type: ignore[type-var] # - a dataclass
            self._phase = phase
        if isinstance(phase, Trials) and not phase.settings.allows(phase.steps - phase.made):
            self._go_on(phase.cut_short(), iteration - 1)
        return self._phase

    def decide(self, iteration: int, given: float) -> Decision:
        """Say what the scale is, and which points to keep and to go back to."""
        if given > 0.0:
            self._now = given
            self._given = self._given or given
        phase = None if self._phase is None else self._heed_limits(self._phase, iteration)
        keep, restore, self._keep, self._restore = self._keep, self._restore, None, None
        self._note_phase(iteration)
        if phase is None:
            return Decision(math.exp(self._held.now), keep, restore)
        return Decision(
            math.exp(min(phase.position, phase.settings.highest) + self._shift()) * phase.factor,
            keep,
            restore,
            trial=True,
            searching=True,
        )

    def _note_phase(self, iteration: int) -> None:
        """Take note of the phase that the coming step belongs to, if it is another than that of the last."""
        name = "held" if self._phase is None else _name_of(self._phase)
        progress = iteration + self._envelope.skipped
        if self._phase is None and self.anneal and progress >= self._envelope.falls_from(self._held.stands_from):
            name = "annealed"
        if not self._phases or self._phases[-1][1] != name:
            self._phases.append((iteration, name))

    def wants(self, iteration: int) -> bool:
        """Measure every step of jump and climb, and of trials whose steps do not tell a loss; else one in ten."""
        phase = self._phase
        needed = phase is not None and not (isinstance(phase, Trials) and phase.settings.by_steps)
        return needed or iteration % SPARSE == 0

    def envelope(self, iteration: int) -> float:
        """Return 1 until the search is over, and in the end fall linearly to 0."""
        factor = self._envelope.factor(iteration, self._held.stands_from)
        return factor if self._phase is None else 1.0

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as plain values."""
        phase = self._phase
        name = None if phase is None else _name_of(phase)
        return {
            "version": 2,
            "total_steps": self.total_steps,
            "phase": name,
            "phase_state": {} if phase is None else to_plain(phase),
            "held": self._held.state_dict(),
            "given": self._given,
            "given_now": self._now,
            "since": self._since,
            "begun": self._begun,
            "keep": self._keep,
            "restore": self._restore,
            **self._envelope.state_dict(),
            "undo": self._undo,
            "story": to_plain(self._story),
            "phases": to_plain(self._phases),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; one of an earlier version whose search was under way keeps the rate given."""
        if "version" not in state:
            state = _of_version_1(state, self)
        self._held.load_state_dict(state["held"])
        before, here = int(state["total_steps"]), self._phase
        name = state["phase"]
        self._phase = None if name is None else from_plain(_PHASES[name], state["phase_state"], "phase_state")
        if before != self.total_steps:
            self._held.plan_anew(before)
            self._plan_anew(trial_length(self.total_steps) if here is None else here.settings.trial)
        self._given, self._since = state["given"], int(state["since"])
        self._now = state.get("given_now", self._given)
        self._keep, self._restore, self._begun = state["keep"], state["restore"], bool(state["begun"])
        self._envelope.load_state_dict(state)
        self._undo = state["undo"]
        self._story = from_plain(list[tuple[int, str]], state["story"], "story")
        self._phases = from_plain(list[tuple[int, str]], state.get("phases", []), "phases")

    def _plan_anew(self, trial: int) -> None:
        """The run has another length than the search was planned for; trials stay as long as those before them."""
        phase = self._phase
        if phase is not None:
            trial = phase.settings.trial if isinstance(phase, Trials) else trial
            settings = replace(phase.settings, total_steps=self.total_steps, trial=trial)
            self._phase = replace(phase, settings=settings)  # type: ignore[type-var] # - a dataclass


def _first_phase(settings: Settings) -> Phase | None:
    """What a search begins with; None where the run is too short for it."""
    return Trials.begun(settings, 0.0, -math.inf, UNKNOWN, 0) if settings.around else Jump(settings)


def _name_of(phase: Phase) -> str:
    return next(name for name, kind in _PHASES.items() if isinstance(phase, kind))


def _of_version_1(state: dict[str, Any], policy: CalibrateThenAnneal) -> dict[str, Any]:
    """A state as version 0.1 wrote it, which held a rate or searched in another way."""
    held = dict(state["held"])
    if not state["done"]:
        policy._held.begin(0.0, UNKNOWN, 0.0)
        held = policy._held.state_dict()
        LOG.warning("the search of an earlier version cannot be continued: the rate given is kept")
    return {
        **policy.state_dict(),
        "total_steps": state.get("total_steps", policy.total_steps),
        "phase": None,
        "phase_state": {},
        "held": {"now": float(state["scale"]) if state["done"] else 0.0, "highest": held["position"], **held},
        "given": state.get("given"),
        "since": 0,
        "begun": True,
        "keep": None,
        "restore": None,
        "done_at": state["done_at"],
        "skipped": state.get("skipped", 0),
        "warned": state["warned"],
    }
