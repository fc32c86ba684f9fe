"""Find the rate from alpha and the loss while the rate climbs.

Above the knee alpha says little about how much too large a rate is; there the loss has to speak. Three
parts, none of which depends on the initial rate: jump to a rate whose steps promise a small decrease
(start slope times step length); climb fast until the loss has risen, which tells roughly where the edge
is; go back to the best point and climb slowly from a `SPAN`-th of the edge. Past the knee a climb ends as soon
as the lowest loss lies behind. Three log rates are seen on the way: where alpha rose above 0 in the fast
climb, and where the losses of the two climbs were lowest. Each alone is misled now and then, by noise or by an
optimizer for which it lies low or high; the median is taken, but not far above the knee.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from alpha_optim.alpha.loss_trace import RESOLUTION, SURELY, LossTrace, room_above
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.alpha.window import rises_of
from alpha_optim.policies.alpha_window import AlphaWindow
from alpha_optim.policies.calibrate.crossing import Crossing
from alpha_optim.policies.calibrate.trail import HIGHEST, Trail

START = 1e-8
"""The first steps are made at this fraction of the initial rate."""
SHORTEST = 20
"""Calibrations shorter than this cannot climb back from there."""
PROMISE = 1e-3
"""The climb starts where a step promises this decrease, relative to the loss: far below any knee seen."""
JUMP = math.log(1e3)
"""Largest jump towards that rate; the slope is measured again before the next."""
BLIND = math.log(30.0)
"""Jump where a step was too short to move the parameters."""
FASTEST = 0.25
"""Change of the log rate per step in the fast climb: a decade in nine; half of it where alpha is above 0."""
LARGEST = 1.2
"""Largest change per measurement, where steps are measured now and then."""
SPAN = math.log(50.0)
"""The slow climb starts so far below the edge ..."""
BELOW = math.log(4.0)
"""... and at least so far below the knee: an edge that is hardly felt lies too high."""
WIDTH = 4.0
"""The slow climb covers so many e-folds (from a 50th of the edge to it) in what is left of the calibration."""
SLOWEST = 0.01
FEWEST_SLOW = 20
SINGLE = 50
"""Calibrations shorter than this have one climb only, at `WIDTH` e-folds in all."""
COARSE = 5
"""Length of a window in the fast climb."""
ALPHAS = 12
"""Length of the window of alphas."""
EVENTS = 2
"""The second step that is taken back ends the slow climb; one alone can be an outlier."""
KNEE = "alpha positive"
FAST, SLOW = "loss lowest in the first climb", "loss lowest in the second climb"
APART = math.log(10.0)
"""Climbs whose losses were lowest at log rates this far apart do not agree: by chance it is less than half of it."""
FAR = math.log(10.0)
"""A knee so far below the log rates of all lowest losses is none: chance, or a direction learned early."""
ABOVE = 1.5
"""Else the log rate lies at most so far above it: on a flat stretch the loss can be lowest anywhere."""
LONGEST = 2
"""The calibration ends after so many times its length, whatever the loss did."""


def agreed(seen: dict[str, float]) -> float:
    """Return the log rate that follows from those seen: their median, and not far above the knee."""
    if _knee_is_none(seen):
        return min(where for name, where in seen.items() if name != KNEE)
    return min(statistics.median(seen.values()), ceiling(seen))


def ceiling(seen: dict[str, float]) -> float:
    """Return how high the log rate may ever be set, by those seen."""
    knee = math.inf if _knee_is_none(seen) else seen.get(KNEE, math.inf)
    return min(max(seen.values()), knee + ABOVE)


def _knee_is_none(seen: dict[str, float]) -> bool:
    """Whether there is a knee, but far below where the losses were lowest."""
    others = [where for name, where in seen.items() if name != KNEE]
    return bool(others) and min(others) - seen.get(KNEE, math.inf) > FAR


class LossSearch:
    """Climbs until the loss rises, twice."""

    def __init__(self, calibration_steps: int, boost: float | None) -> None:
        """Start low."""
        self.calibration_steps, self.boost = calibration_steps, boost
        self.position = math.log(START)  # log scale asked for
        self.done = False
        self.wants_return = False
        self.trace: LossTrace | None = None
        self._fell = False  # whether the loss surely fell in the first climb
        self._level: float | None = None  # mean loss at its beginning
        self.doubt = ""  # why the search is not to be trusted
        self.seen: dict[str, float] = {}  # the log rates of the module docstring, by where they come from
        self._trail = Trail(self.position)
        self._window = AlphaWindow(ALPHAS)
        self._stage = 0  # 0: jump to the start, 1: fast climb, 2: slow climb
        self._knee = Crossing()  # of the fast climb
        self._pace = FASTEST
        self._last: int | None = None
        self._begin: int | None = None  # iteration of the first measurement
        self._from = 0  # measurements of earlier iterations belong to the climb before
        self._seen_batches, self._log_samples = 0, 0.0  # number of batches, and the mean log of their samples
        self._taken_back = 0

    @property
    def trusts_point(self) -> bool:
        """Whether what is reached is good if its loss is low: rates past the knee do harm that shows late."""
        return self._stage != 1 or self._knee.found is None

    @property
    def highest(self) -> float:
        """The highest log rate that what was seen allows, once the search is done."""
        if self.doubt:  # then it may grow where the loss falls fast
            return max(self.seen.values(), default=math.inf) + ABOVE
        return ceiling(self.seen) + self._room if self.seen else self.position

    @property
    def _room(self) -> float:
        """How far above what was seen the log rate is set."""
        samples = round(math.exp(self._log_samples)) if self._seen_batches else 0
        return room_above(samples) if self.boost is None else math.log(self.boost)

    @property
    def over_by(self) -> int:
        """Iteration by which the search is over if measurements come at all."""
        return (self._begin or 0) + (LONGEST + 1) * self.calibration_steps

    def see(self, measurement: AlphaMeasurement) -> None:
        """Move `position` for this measurement."""
        n, loss = measurement.iteration, measurement.loss_start
        here = self._trail.at(n)
        steps = 1 if self._last is None else max(1, n - self._last)
        self._begin = n if self._begin is None else self._begin
        self._last = n
        if measurement.samples_start > 0:
            self._seen_batches += 1
            self._log_samples += (math.log(measurement.samples_start) - self._log_samples) / self._seen_batches
        if not math.isfinite(loss) or n < self._from:
            return
        if self._stage == 0:
            self._to_the_start(measurement, loss, here)
        else:
            assert self.trace is not None
            self.trace.see(measurement, here)
            if self._stage == 1:
                self._knee.see(measurement, here)
            self._window.add_per_rate(measurement)
            self.position += min(LARGEST, self._climb() * steps)
            # Past the knee rates do harm that the loss may not show for long: no need to wait for the edge.
            past_the_knee = self._knee.found is not None
            if self.trace.risen() or (past_the_knee and self.trace.passed(here)):
                self._end_climb(n, here)
            elif n - self._begin >= LONGEST * self.calibration_steps:
                self._stage = 2
                self._end_climb(n, here, risen=False)
        self.position = min(HIGHEST, self.position)
        # Measurement n is known after step n+1, so a change acts from step n+2 on.
        self._trail.note(n + 2, self.position)

    def _to_the_start(self, measurement: AlphaMeasurement, loss: float, here: float) -> None:
        """Jump to where a step promises a decrease of `PROMISE`."""
        if self.trace is None:
            self.trace = LossTrace(COARSE, loss)
        rises = rises_of(measurement)
        if rises is None or rises[0] == 0.0:
            self.position = here + BLIND
            return
        variance = measurement.loss_variance_start
        size = max(abs(loss), math.sqrt(variance) if variance > 0.0 else 0.0)
        change = min(JUMP, math.log(PROMISE * size / abs(rises[0]))) if size > 0.0 else 0.0
        self.position = max(self.position, here + change) if change > 0.0 else here + change
        assert self._begin is not None
        if change < 1.0 or measurement.iteration - self._begin >= self.calibration_steps // 2:
            single = self.calibration_steps < SINGLE
            self._pace = min(FASTEST, WIDTH / self.calibration_steps) if single else FASTEST
            self._begin_climb(2 if single else 1)

    def _begin_climb(self, stage: int) -> None:
        assert self.trace is not None
        self._stage, self._taken_back = stage, 0
        size = COARSE if stage == 1 else min(20, max(4, round(RESOLUTION / self._pace)))
        self.trace = LossTrace(size, self.trace.first)
        self._window.clear()

    def _climb(self) -> float:
        """Change of the log rate per step."""
        if self._stage == 2:
            return self._pace
        alpha, std = self._window.alpha, self._window.alpha_std
        above = len(self._window) >= 4 and math.isfinite(alpha) and alpha > std
        return 0.5 * self._pace if above else self._pace

    def _end_climb(self, n: int, edge: float, risen: bool = True) -> None:
        """The loss has risen at this log rate: climb again, or take the rate at which it was lowest."""
        assert self.trace is not None
        self.wants_return, self._from = risen, n + 2
        assert self._begin is not None
        lowest = self.trace.lowest()
        if self._stage == 1:
            self._fell, self._level = self.trace.has_fallen(SURELY), self.trace.begin
            left = max(FEWEST_SLOW, self.calibration_steps - (n - self._begin))
            self._pace = min(FASTEST, max(SLOWEST, WIDTH / left))
            knee = self._knee.found
            self.position = edge - SPAN if knee is None else min(edge - SPAN, knee - BELOW)
            if knee is not None:
                self.seen[KNEE] = knee
            # A few losses in a noisy stretch say nothing about the rate.
            if lowest is not None and self.trace.has_fallen():
                self.seen[FAST] = lowest
            self._begin_climb(2)
            return
        if lowest is not None:
            self.seen[SLOW] = lowest
        self.doubt = self._doubt()
        if self.doubt:  # the rate given, but not above where the loss was seen to rise
            self.position = min(0.0, edge - 1.0) if risen else 0.0
            if self.seen:
                self.position = min(max(self.position, min(self.seen.values())), ceiling(self.seen))
        else:
            self.position = agreed(self.seen) + self._room
        self.done = True

    def _doubt(self) -> str:
        """Why what was seen is not to be trusted; empty if it is."""
        assert self.trace is not None
        if not self._surely_fell():
            return "the loss never surely fell"
        if FAST in self.seen and SLOW in self.seen and abs(self.seen[FAST] - self.seen[SLOW]) > APART:
            return "the two climbs do not agree"
        return "" if self.seen else "no loss was lowest anywhere"

    def _surely_fell(self) -> bool:
        """Whether the loss fell in one of the climbs, or from the beginning of the first to the best of the second."""
        assert self.trace is not None
        from_the_beginning = self._level is not None and self.trace.lies_below(self._level, COARSE, SURELY)
        return self._fell or from_the_beginning or self.trace.has_fallen(SURELY)

    def taken_back(self, event: GuardEvent) -> None:
        """A step was taken back and the rate lowered."""
        edge = self._trail.at(event.iteration - 1)
        self.position += math.log(event.scale_factor)
        if self._stage > 0:
            self._taken_back += 1
            self._window.clear()
            if self._stage == 1 or self._taken_back >= EVENTS or event.reason != "loss_rose":
                self._end_climb(event.iteration, edge)
                self._from = event.iteration  # the factor acts before the step that was not made
        self._trail.note(event.iteration, self.position)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "position": self.position,
            "done": self.done,
            "wants_return": self.wants_return,
            "trace": None if self.trace is None else self.trace.state_dict(),
            "trail": self._trail.state(),
            "window": self._window.state_dict(),
            "stage": self._stage,
            "begin": self._begin,
            "from": self._from,
            "seen": dict(self.seen),
            "fell": bool(self._fell),
            "level": self._level,
            "doubt": self.doubt,
            "knee": self._knee.state_dict(),
            "pace": self._pace,
            "last": self._last,
            "batches": self._seen_batches,
            "log_samples": self._log_samples,
            "taken_back": self._taken_back,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.position, self.done = float(state["position"]), bool(state["done"])
        self.wants_return = bool(state["wants_return"])
        self.trace = None if state["trace"] is None else LossTrace.of(state["trace"])
        self._trail.restore(state["trail"])
        self._window.load_state_dict(state["window"])
        self._begin, self._from = state["begin"], int(state["from"])
        self._fell, self._level = bool(state.get("fell", False)), state.get("level")
        self.doubt = str(state.get("doubt", ""))
        self.seen = {str(name): float(where) for name, where in state["seen"].items()}
        self._knee.load_state_dict(state["knee"])
        self._stage, self._pace, self._last = int(state["stage"]), float(state["pace"]), state["last"]
        self._seen_batches, self._log_samples = int(state.get("batches", 0)), float(state.get("log_samples", 0.0))
        self._taken_back = int(state["taken_back"])
