"""Alpha over the last few measurements, for policies; remembers two numbers a measurement."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from alpha_optim.alpha import AlphaMeasurement


class AlphaWindow:
    """Ratio of summed fitted slopes over the last ``size`` usable measurements."""

    def __init__(self, size: int) -> None:
        """Start empty; ``size`` is the length in measurements."""
        self._rises: deque[tuple[float, float]] = deque(maxlen=size)

    def add(self, measurement: AlphaMeasurement, weight: float = 1.0) -> bool:
        """Add a measurement; False if it has no finite slopes and was ignored."""
        rise_start = measurement.fitted_slope_start * measurement.step_length * weight
        rise_end = measurement.fitted_slope_end * measurement.step_length * weight
        if not (math.isfinite(rise_start) and math.isfinite(rise_end)):
            return False
        self._rises.append((rise_start, rise_end))
        return True

    def clear(self) -> None:
        """Forget everything, after the rate has changed."""
        self._rises.clear()

    def __len__(self) -> int:
        """Return the number of measurements."""
        return len(self._rises)

    @property
    def alpha(self) -> float:
        """Alpha of the window, a pure number; nan while it is empty."""
        total = math.fsum(start for start, _ in self._rises)
        return math.nan if total == 0.0 else -math.fsum(end for _, end in self._rises) / total

    @property
    def alpha_std(self) -> float:
        """Its standard error from the scatter of the measurements; inf for fewer than two."""
        total, count = math.fsum(start for start, _ in self._rises), len(self._rises)
        if count < 2 or total == 0.0:
            return math.inf
        alpha = self.alpha
        squares = math.fsum((end + alpha * start) ** 2 for start, end in self._rises)
        return math.sqrt(count / (count - 1) * squares) / abs(total)

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered numbers."""
        return {"rises": [list(pair) for pair in self._rises]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over remembered numbers."""
        rises: Sequence[Sequence[float]] = state["rises"]
        self._rises.clear()
        self._rises.extend((float(start), float(end)) for start, end in rises)
