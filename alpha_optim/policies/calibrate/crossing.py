"""Where alpha rose above 0 while the rate climbed: the knee."""

from __future__ import annotations

from collections import deque
from typing import Any

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.policies.alpha_window import AlphaWindow

WINDOW = 8
FEWEST = 4
"""Measurements before the sign of their alpha counts."""


class Crossing:
    """Alpha over the last few measurements, and the log rate at which it first went from below 0 to above."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.found: float | None = None
        self._window = AlphaWindow(WINDOW)
        self._where: deque[float] = deque(maxlen=WINDOW)
        self._was_below = False

    def see(self, measurement: AlphaMeasurement, position: float) -> None:
        """Add a step that was made at a log rate."""
        if not self._window.add_per_rate(measurement):
            return
        self._where.append(position)
        if len(self._window) < FEWEST or self.found is not None:
            return
        if self._window.alpha > 0.0 and self._was_below:
            self.found = sum(self._where) / len(self._where)
        self._was_below = self._window.alpha <= 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "found": self.found,
            "window": self._window.state_dict(),
            "where": list(self._where),
            "was_below": self._was_below,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.found, self._was_below = state["found"], bool(state["was_below"])
        self._window.load_state_dict(state["window"])
        self._where = deque(map(float, state["where"]), maxlen=WINDOW)
