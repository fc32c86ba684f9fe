"""Only ever lower the rate, when steps overshoot for certain."""

from __future__ import annotations

from typing import Any

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.policies.alpha_window import AlphaWindow
from alpha_optim.policies.base import whole


class OvershootBackoff:
    """Multiplies the rate by ``factor`` when alpha over a window is above ``limit`` for certain.

    For users who have a rate and a schedule and want a safety net. After each change the window starts
    anew, so one bad stretch is answered once.

    Args:
        limit: Alpha above which steps count as overshooting, a pure number > 0.
        factor: What the rate is multiplied by, in (0, 1).
        window: Number of measurements in the average, at least 2.
        certainty: How many standard errors alpha must lie above the limit, >= 0.
    """

    def __init__(self, limit: float = 0.7, factor: float = 0.7, *, window: int = 20, certainty: float = 2.0) -> None:
        """Set the limit.

        Raises:
            ValueError: If an argument is out of range.
        """
        if not limit > 0.0:  # nor nan
            raise ValueError(f"limit must be > 0 (0 is the minimum along the step), got {limit}")
        if not 0.0 < factor < 1.0:
            raise ValueError(f"factor must lie strictly between 0 and 1, got {factor}")
        window = whole("window", window, 2)
        if not certainty >= 0.0:
            raise ValueError(f"certainty must be >= 0, got {certainty}")
        self.limit, self.factor, self.size, self.certainty = limit, factor, window, certainty
        self._window = AlphaWindow(window)

    def __repr__(self) -> str:
        """Return the call that builds it."""
        return f"OvershootBackoff({self.limit}, {self.factor}, certainty={self.certainty})"

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return ``factor`` or 1."""
        self._window.add(measurement)
        if len(self._window) < self.size:
            return 1.0
        if self._window.alpha - self.certainty * self._window.alpha_std > self.limit:
            self._window.clear()
            return self.factor
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the window."""
        return self._window.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a window."""
        self._window.load_state_dict(state)
