"""Find the rate from alpha alone, where no losses are known.

What alpha tells about the rate: far below the right rate it sits on a plateau between -1 and 0 (how
high depends on the batch size), then rises through 0 within a decade (the knee), and above that says
little. So the knee is looked for, from either side, and the rate is set a little above it: greedy steps
(alpha = 0) are too small over a run, the more so the less noisy the batches are.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.policies.alpha_window import AlphaWindow
from alpha_optim.policies.calibrate.trail import HIGHEST, Trail

WINDOW = 8
START = 1e-2
"""The search starts at this fraction of the initial rate (more in runs too short to climb back): a few steps
at a rate far too high damage a network for good, and no alpha is known before the second."""
FASTEST = 0.25
"""Largest change of the log rate per step: a decade in nine."""
LARGEST = 1.2
"""Largest change per measurement, where steps are measured now and then."""
SLOWER = 0.5
"""What the pace is multiplied by at every crossing of the knee."""
CROSSINGS = 2
"""The knee is known after so many."""


class KneeSearch:
    """Climbs or descends to the knee of alpha."""

    def __init__(self, calibration_steps: int, boost: float | None) -> None:
        """Start low; in half of the calibration the given rate can be reached again."""
        self.calibration_steps, self.boost = calibration_steps, boost
        self.start = max(math.log(START), -0.5 * FASTEST * calibration_steps)
        self.position = self.start  # log scale asked for
        self.done = False
        self.sign = 0  # -1: below the knee, 1: above, 0: not known yet
        self.crossings: list[float] = []
        self._window = AlphaWindow(WINDOW)
        self._where: deque[float] = deque(maxlen=WINDOW)  # log scale at which the window was measured
        self._trail = Trail(self.position)
        self._last: int | None = None  # iteration of the last measurement
        self._from: int | None = None  # first iteration at a rate of this search
        self._pace = FASTEST

    @property
    def shortfall(self) -> float:
        """Factor from the rate asked for up to the given one, if nothing has spoken for a lower one; else 1."""
        too_low = not self.crossings and self.sign <= 0
        return math.exp(max(0.0, -self.position)) if too_low else 1.0

    def see(self, measurement: AlphaMeasurement) -> None:
        """Move `position` for this measurement."""
        n = measurement.iteration
        self._from = n + 2 if self._from is None else self._from
        if n >= self._from and self._window.add_per_rate(measurement):
            self._where.append(self._trail.at(n))
        steps = 1 if self._last is None else max(1, n - self._last)
        self._last = n
        if len(self._window) >= 2:
            self.position = min(HIGHEST, self.position + self._search(steps))
        if n + 2 >= self.calibration_steps or len(self.crossings) >= CROSSINGS:
            self.done = True
            self.position = self._rate(measurement.samples_start)
        # Measurement n is known after step n+1, so a change acts from step n+2 on.
        self._trail.note(n + 2, self.position)

    def _search(self, steps: int) -> float:
        """Change of the log rate towards the knee, the bolder the more certain alpha's sign is.

        Args:
            steps: Number of steps since the last measurement.
        """
        alpha, std = self._window.alpha, self._window.alpha_std
        if not (math.isfinite(alpha) and math.isfinite(std)):
            return 0.0
        certainty = max(-1.0, min(1.0, 0.5 * alpha / std)) if std > 0.0 else math.copysign(1.0, alpha)
        if abs(certainty) >= 0.5:
            self._side(1 if alpha > 0.0 else -1)
        return -min(LARGEST, self._pace * steps) * certainty

    def _side(self, sign: int) -> None:
        """Take note on which side of the knee the window lies."""
        if self.sign and sign != self.sign:
            self.crossings.append(sum(self._where) / len(self._where))
            self._pace *= SLOWER
            self._forget_window()
        self.sign = sign

    def _rate(self, samples: int) -> float:
        """Log scale of the knee, or a little above it."""
        if not self.crossings:
            # Not a word from alpha (tiny batches), or still too low: at least the user's own rate.
            return self.position if self.sign > 0 else max(0.0, self.position)
        # The highest: alpha of a fixed rate rises as training goes on, so a late crossing lies too low.
        boost = min(2.0, max(1.0, (samples / 32) ** 0.3)) if self.boost is None else self.boost
        return max(self.crossings) + math.log(boost)

    def _forget_window(self) -> None:
        self._window.clear()
        self._where.clear()

    def taken_back(self, event: GuardEvent) -> None:
        """A step was taken back and the rate lowered: it was above the knee, old alphas are void."""
        self.position += math.log(event.scale_factor)
        self._trail.note(event.iteration, self.position)
        self._forget_window()
        if self.sign < 0:
            self.crossings.append(self.position)
            self._pace *= SLOWER
        self.sign = 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "position": self.position,
            "done": self.done,
            "sign": self.sign,
            "crossings": list(self.crossings),
            "window": self._window.state_dict(),
            "where": list(self._where),
            "trail": self._trail.state(),
            "last": self._last,
            "from": self._from,
            "pace": self._pace,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.position, self.done, self.sign = float(state["position"]), bool(state["done"]), int(state["sign"])
        self.crossings = [float(position) for position in state["crossings"]]
        self._window.load_state_dict(state["window"])
        self._where = deque(map(float, state["where"]), maxlen=WINDOW)
        self._trail.restore(state["trail"])
        self._last, self._from, self._pace = state["last"], state["from"], float(state["pace"])
