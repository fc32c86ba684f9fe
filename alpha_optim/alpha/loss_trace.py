"""The loss over a climbing rate: where it was lowest, and when it has risen for good."""

from __future__ import annotations

import math
from collections import deque

from alpha_optim.alpha.loss_level import Level
from alpha_optim.alpha.measurement import AlphaMeasurement

RESOLUTION = 0.4
"""A window of losses covers this change of the log rate, but 4 to 20 measurements."""
RISE = 0.5
"""The climb is over when a window lost this share of all progress since the first step ..."""
SURE = 4.0
"""... and that is so many standard errors of the difference of two windows."""
SURELY = 4.0
"""Standard errors by which the loss of a climb has to fall: the lowest of many windows is low by chance."""
FALLEN = 2.0
"""A climb has got somewhere when its best window lies so many standard errors below its first."""


def room_above(samples: int) -> float:
    """How far above the point of lowest loss the log rate is set, by the number of samples in a batch.

    Noise leaves less room, and batches of many samples have less of it.
    """
    return 0.3 * math.log(min(256, max(8, samples)) / 32)


class LossTrace:
    """Trailing windows of the loss over the log rate."""

    def __init__(self, size: int, first: float) -> None:
        """Start empty.

        Args:
            size: Length of a window in measurements.
            first: Loss before the first step.
        """
        self.size, self.first = size, first
        self.best: Level | None = None
        self._losses: deque[float] = deque(maxlen=size)
        self._where: deque[float] = deque(maxlen=size)
        self._means: list[tuple[float, float]] = []  # (mean loss, mean log rate) of all windows

    def add(self, loss: float, position: float, error: float) -> None:
        """Add the loss seen at a log rate, and its standard error."""
        self._losses.append(loss)
        self._where.append(position)
        if len(self._losses) < self.size:
            return
        mean = math.fsum(self._losses) / self.size
        self._means.append((mean, math.fsum(self._where) / self.size))
        if self.best is None or mean < self.best.mean:
            squares = math.fsum((loss - mean) ** 2 for loss in self._losses)
            self.best = Level(mean, max(error, math.sqrt(squares / (self.size - 1))), self.size)

    def see(self, measurement: AlphaMeasurement, position: float) -> None:
        """Add the loss at the start of a step that was made at a log rate."""
        samples, variance = measurement.samples_start, measurement.loss_variance_start
        known = samples > 0 and variance > 0.0  # not where it is nan
        self.add(measurement.loss_start, position, math.sqrt(variance / samples) if known else 0.0)

    def risen(self) -> bool:
        """Whether the window at hand lost much of the progress, beyond its noise."""
        if self.best is None:
            return False
        rise = self._means[-1][0] - self.best.mean
        return rise > max(RISE * (self.first - self.best.mean), SURE * self._error(self.best))

    def has_fallen(self, errors: float = FALLEN) -> bool:
        """Whether the best window lies below the first one, by so many standard errors."""
        if self.best is None:
            return False
        return self._means[0][0] - self.best.mean > errors * self._error(self.best)

    def _error(self, level: Level) -> float:
        """Standard error of the difference of two windows."""
        return level.deviation * math.sqrt(2.0 / self.size)

    def lowest(self) -> float | None:
        """Log rate at which the loss was lowest: the mean over windows as good as the best."""
        if self.best is None:
            return None
        limit = self.best.mean + self.best.deviation / math.sqrt(self.size)
        near = [where for mean, where in self._means if mean <= limit]
        return math.fsum(near) / len(near)
