"""Steer alpha to a target by integral control in log learning rate."""

from __future__ import annotations

import math
from typing import Any

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.policies.alpha_window import AlphaWindow
from alpha_optim.policies.base import whole


class TargetAlpha:
    """Multiplies the rate by exp(gain * (target - alpha over a window)), slower up than down.

    A target of 0 is greedy: it makes the next step as good as possible and shrinks the rate over a run
    (short-horizon bias, Wu et al. 2018, arXiv 1803.02021). Under momentum and Adam alpha saturates near
    0.2, so targets above that may never be reached; the change per measurement is bounded.

    Args:
        target: Alpha to steer to, a pure number; from -0.5 to 1.
        gain: Change of the log rate per unit of alpha and measurement, > 0. Upwards half of it.
        window: Number of measurements in the average.
    """

    def __init__(self, target: float = 0.1, gain: float = 0.1, *, window: int = 10) -> None:
        """Set the target.

        Raises:
            ValueError: If an argument is out of range.
        """
        if not -0.5 <= target <= 1.0:
            raise ValueError(f"target must lie between -0.5 and 1, got {target}; good runs have 0 to 0.3")
        if not 0.0 < gain <= 1.0:
            raise ValueError(f"gain must be > 0 and at most 1, got {gain}")
        self.target, self.gain = target, gain
        self._window = AlphaWindow(whole("window", window, 1))

    def __repr__(self) -> str:
        """Return the call that builds it."""
        return f"TargetAlpha({self.target}, gain={self.gain})"

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return the factor for this measurement."""
        if not self._window.add(measurement):
            return 1.0
        alpha = self._window.alpha
        if not math.isfinite(alpha):
            return 1.0
        error = max(-1.0, min(1.0, self.target - alpha))
        return math.exp(self.gain * (0.5 * error if error > 0.0 else error))

    def state_dict(self) -> dict[str, Any]:
        """Return the window."""
        return self._window.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a window."""
        self._window.load_state_dict(state)
