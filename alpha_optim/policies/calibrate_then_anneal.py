"""Find the rate in the first steps of a run, then hold and anneal it.

What alpha tells about the rate: far below the right rate it sits on a plateau between -1 and 0 (how
high depends on the batch size), then rises through 0 within a decade (the knee), and above that says
little. So the knee is looked for, from either side, and the rate is set a little above it: greedy steps
(alpha = 0) are too small over a run, the more so the less noisy the batches are.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Any

from alpha_optim.alpha import AlphaMeasurement
from alpha_optim.policies.window import AlphaWindow
from alpha_optim.records import GuardEvent

FEWEST = 100
"""Calibration takes at least this many steps, or a fifth of shorter runs."""
WINDOW = 8
START = 1e-2
"""The first steps are made with this fraction of the initial rate (more in runs too short to climb back): a
few steps at a rate far too high damage a network for good, and no alpha is known before the second."""
FASTEST = 0.25
"""Largest change of the log rate per step: a decade in nine."""
LARGEST = 1.2
"""Largest change per measurement, where steps are measured now and then."""
SLOWER = 0.5
"""What the pace is multiplied by at every crossing of the knee."""
CROSSINGS = 2
"""The knee is known after so many."""
LOWER_HELD = 2.0
"""What the held rate is divided by for every stretch in which steps had to be taken back."""
CALM = 10
"""After so many measurements without a step taken back the rate returns towards the one held."""


class CalibrateThenAnneal:
    """Climbs or descends to the knee of alpha, then sets the rate and anneals it linearly to 0."""

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
                is long enough for that.
            boost: How far above the knee the rate is set, a factor >= 1; None: by the batch size, 1 for
                batches of up to 32 samples, 1.5 for 128, at most 2.
            anneal: Whether to anneal linearly to 0 (not if a schedule does).

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
        self._window = AlphaWindow(WINDOW)
        self._where: deque[float] = deque(maxlen=WINDOW)  # log scale at which the window was measured
        # In half of the calibration the given rate can be reached again.
        self._start = max(START, math.exp(-0.5 * FASTEST * self.calibration_steps))
        self._position = math.log(self._start)  # log scale now, while no alpha is known through the envelope
        self._trail: list[tuple[int, float]] = [(0, self._position)]  # from which iteration on it was what
        self._begun = False
        self._last: int | None = None  # iteration of the last measurement
        self._pace = FASTEST
        self._sign = 0  # -1: below the knee, 1: above, 0: not known yet
        self._crossings: list[float] = []
        self._done = False
        self._held = 0.0  # log scale to hold after the calibration
        self._calm = CALM + 1  # measurements since a step was taken back

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return the factor for this measurement."""
        if self._done:
            return self._return_to_held()
        n = measurement.iteration
        # Products of slope and step grow with the rate; divided by it, old rates weigh as new ones.
        rate = measurement.lr[0] if measurement.lr and measurement.lr[0] > 0.0 else 1.0
        usable = self._window.add(measurement, weight=1.0 / rate)
        ends = n + 2 >= self.calibration_steps
        if not (usable or self._begun):  # no alpha yet: the envelope keeps the rate low until the end
            self._done = ends
            self._position = 0.0 if ends else self._position
            return 1.0
        if usable:
            self._where.append(self._position_at(n))
        steps = 1 if self._last is None else max(1, n - self._last)
        self._last = n
        change = self._search(steps) if len(self._window) >= 2 else 0.0
        if ends or len(self._crossings) >= CROSSINGS:
            self._done = True
            change = self._to_the_rate(measurement.samples_start)
            self._held = self._position + change
        self._position += change
        first, self._begun = not self._begun, True
        # Measurement n is known after step n+1, so a change acts from step n+2 on.
        self._trail = [*self._trail[-4 * WINDOW :], (n + 2, self._position)]
        return self._start * math.exp(change) if first else math.exp(change)

    def _return_to_held(self) -> float:
        """The guard lowers the rate by much, for safety; once all is calm, take most of that back."""
        self._calm += 1
        if self._calm <= CALM or self._position >= self._held:
            return 1.0
        change = min(FASTEST, self._held - self._position)
        self._position += change
        return math.exp(change)

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
        if self._sign and sign != self._sign:
            self._crossings.append(sum(self._where) / len(self._where))
            self._pace *= SLOWER
            self._forget_window()
        self._sign = sign

    def _to_the_rate(self, samples: int) -> float:
        """Change of the log rate to the knee, or a little above it.

        Greedy steps are too short over a run, the more so the less noisy the batches are.
        """
        if not self._crossings:
            # Not a word from alpha (tiny batches), or still too low: at least the user's own rate.
            return 0.0 if self._sign > 0 else max(0.0, -self._position)
        # The highest: alpha of a fixed rate rises as training goes on, so a late crossing lies too low.
        boost = min(2.0, max(1.0, (samples / 32) ** 0.3)) if self.boost is None else self.boost
        return max(self._crossings) + math.log(boost) - self._position

    def _position_at(self, iteration: int) -> float:
        """Log scale of the step of an iteration."""
        return next((p for n, p in reversed(self._trail) if n <= iteration), self._trail[0][1])

    def _forget_window(self) -> None:
        self._window.clear()
        self._where.clear()

    def envelope(self, iteration: int) -> float:
        """Return a low start until the first alpha, 1 in the calibration, then fall linearly to 0."""
        if iteration > self.total_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"more steps than total_steps={self.total_steps}: the last learning rate is held",
                stacklevel=2,
            )
        if iteration < self.calibration_steps:
            return 1.0 if self._begun else self._start
        late = 1.0  # the calibration is over, but no alpha has come since to say so
        if not self._done and not self._crossings and self._sign <= 0:
            late = math.exp(max(0.0, -self._position)) if self._begun else 1.0
        if not self.anneal:
            return late
        last = self.total_steps - 1
        left = self.total_steps - min(iteration, last)
        return late * left / max(1, self.total_steps - self.calibration_steps)

    def on_event(self, event: GuardEvent) -> None:
        """A step was taken back and the rate lowered: it was above the knee, old alphas are void."""
        if event.restored:
            self._position += math.log(event.scale_factor)
            self._trail = [*self._trail, (event.iteration, self._position)]
            self._forget_window()
            if self._done and self._calm > CALM:  # the rate was too high: once per bad stretch
                self._held -= math.log(LOWER_HELD)
            self._calm = 0
            if not self._done:
                if self._sign < 0:
                    self._crossings.append(self._position)
                    self._pace *= SLOWER
                self._sign = 1

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered of the calibration."""
        return {
            "window": self._window.state_dict(),
            "where": list(self._where),
            "position": self._position,
            "begun": self._begun,
            "last": self._last,
            "trail": [list(entry) for entry in self._trail],
            "pace": self._pace,
            "sign": self._sign,
            "crossings": list(self._crossings),
            "done": self._done,
            "held": self._held,
            "calm": self._calm,
            "warned": self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a calibration."""
        self._window.load_state_dict(state["window"])
        self._where = deque(map(float, state["where"]), maxlen=WINDOW)
        self._position, self._pace = float(state["position"]), float(state["pace"])
        self._trail = [(int(n), float(position)) for n, position in state["trail"]]
        self._sign, self._done = int(state["sign"]), bool(state["done"])
        self._begun, self._calm = bool(state["begun"]), int(state["calm"])
        self._held, self._last = float(state["held"]), state["last"]
        self._crossings = [float(position) for position in state["crossings"]]
        self._warned = bool(state["warned"])
