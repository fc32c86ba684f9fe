"""Find the rate in the first steps of a run, then hold and anneal it.

What alpha tells about the rate: far below the right rate it sits on a plateau between -1 and 0 (how
high depends on the batch size), then rises through 0 within a decade (the knee), and above that says
little. So the knee is looked for, from either side, and the rate is set a little above it: greedy steps
(alpha = 0) are too small over a run, the more so the less noisy the batches are.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from alpha_optim.alpha import AlphaMeasurement
from alpha_optim.policies.window import AlphaWindow
from alpha_optim.records import GuardEvent

FEWEST = 100
"""Calibration takes at least this many steps, or a fifth of shorter runs."""
WINDOW = 6
KNEE = 0.0
FASTEST = 0.25
SLOWEST = 0.03
SLOWER = 0.7


class CalibrateThenAnneal:
    """Climbs or descends to the knee of alpha, then sets the rate and anneals it linearly to 0."""

    def __init__(
        self,
        total_steps: int,
        *,
        calibrate: float = 0.1,
        boost: float = 3.0,
        anneal: bool = True,
    ) -> None:
        """Set the horizon.

        Args:
            total_steps: Number of optimizer steps of the whole run.
            calibrate: Share of the run for the calibration, in (0, 1); at least 100 steps where the run
                is long enough for that.
            boost: How far above the knee the rate is set, a factor >= 1.
            anneal: Whether to anneal linearly to 0 (not if a schedule does).

        Raises:
            ValueError: If an argument is out of range.
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
        if not 0.0 < calibrate < 1.0:
            raise ValueError(f"calibrate must lie strictly between 0 and 1, got {calibrate}")
        if not boost >= 1.0:
            raise ValueError(f"boost must be >= 1, got {boost}")
        self.total_steps, self.boost, self.anneal = total_steps, boost, anneal
        self.calibration_steps = max(int(calibrate * total_steps), min(FEWEST, total_steps // 5))
        self._warned = False
        self._window = AlphaWindow(WINDOW)
        self._position = 0.0  # log of the scale reached so far
        self._pace = FASTEST
        self._sign = 0
        self._visited: list[float] = []  # positions since the knee was first crossed
        self._done = False

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return the factor for this measurement."""
        if self._done:
            return 1.0
        if measurement.iteration + 2 >= self.calibration_steps:
            return self._finish()
        if not self._window.add(measurement):
            return 1.0
        alpha = self._window.alpha
        if len(self._window) < 2 or not math.isfinite(alpha):
            return 1.0
        sign = 1 if alpha < KNEE else -1
        if self._sign and sign != self._sign:
            self._pace = max(SLOWEST, SLOWER * self._pace)
        if self._sign and (sign != self._sign or self._visited):
            self._visited.append(self._position)
        self._sign = sign
        return self._move(sign * self._pace)

    def envelope(self, iteration: int) -> float:
        """Return 1 during the calibration, then fall linearly to 0 at ``total_steps``."""
        if iteration > self.total_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"more steps than total_steps={self.total_steps}: the last learning rate is held",
                stacklevel=2,
            )
        if not self.anneal or iteration < self.calibration_steps:
            return 1.0
        last = self.total_steps - 1
        left = self.total_steps - min(iteration, last)
        return left / max(1, self.total_steps - self.calibration_steps)

    def on_event(self, event: GuardEvent) -> None:
        """A step was taken back: the scheduler has lowered the scale, the old alphas are void."""
        if event.restored:
            self._window.clear()
            self._pace = max(SLOWEST, SLOWER * self._pace)

    def _move(self, change: float) -> float:
        self._position += change
        return math.exp(change)

    def _finish(self) -> float:
        self._done = True
        if not self._visited:
            return 1.0
        knee = sorted(self._visited)[len(self._visited) // 2]
        return self._move(knee + math.log(self.boost) - self._position)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered of the calibration."""
        return {
            "window": self._window.state_dict(),
            "position": self._position,
            "pace": self._pace,
            "sign": self._sign,
            "visited": list(self._visited),
            "done": self._done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a calibration."""
        self._window.load_state_dict(state["window"])
        self._position, self._pace = float(state["position"]), float(state["pace"])
        self._sign, self._done = int(state["sign"]), bool(state["done"])
        self._visited = [float(position) for position in state["visited"]]
