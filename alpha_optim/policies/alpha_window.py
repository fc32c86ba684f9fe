"""Alpha over the last few measurements, for policies; remembers two numbers a measurement."""

from __future__ import annotations

import math
from collections import deque

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.states import Remembers
from alpha_optim.alpha.window import ratio_of_sums, rises_of


class AlphaWindow(Remembers):
    """Ratio of summed fitted slopes over the last ``size`` usable measurements."""

    _rises: deque[tuple[float, float]]

    def __init__(self, size: int) -> None:
        """Start empty; ``size`` is the length in measurements."""
        self._rises = deque(maxlen=size)

    def add(self, measurement: AlphaMeasurement) -> bool:
        """Add a measurement; False if it has no finite slopes and was ignored."""
        rises = rises_of(measurement)
        if rises is not None:
            self._rises.append(rises)
        return rises is not None

    def clear(self) -> None:
        """Forget everything, after the rate has changed."""
        self._rises.clear()

    def __len__(self) -> int:
        """Return the number of measurements."""
        return len(self._rises)

    @property
    def alpha(self) -> float:
        """Alpha of the window, a pure number; nan while it is empty."""
        return ratio_of_sums(self._rises).alpha

    @property
    def alpha_std(self) -> float:
        """Its standard error from the scatter of the measurements; inf for fewer than two."""
        error = ratio_of_sums(self._rises).alpha_std
        return math.inf if math.isnan(error) else error
