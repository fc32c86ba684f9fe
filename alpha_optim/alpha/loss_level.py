"""Did a loss change beyond its noise?

Consecutive losses of a run differ, by the noise of the batches and by whatever else the data do. A loss has risen when
it lies further above the one before than such differences explain. How far they reach is taken from the run itself,
robustly; the noise of the two batches, from the scatter of single samples' losses, is a lower bound of it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from alpha_optim.alpha.states import Remembers

FALSE_ALARM = 1e-6
"""Probability per step that chance alone looks like an explosion. Two batches at the same point have to agree, so
each is judged at the root of it."""
TAILS = 4
"""Degrees of freedom of the Student t distribution that differences of losses are taken to have: rarer and larger
outliers than a normal distribution has, as batches of unlike difficulty give."""
WINDOW = 50
"""So many differences of consecutive losses are remembered."""
FORGETS = 0.998
"""What an outlier that proved harmless is multiplied by at every step: half of it counts after 350."""
RIPPLE, PROGRESS = 3.0, 0.05
"""A rise by less than so many times the loss, or by less than this share of all progress of the run, is a ripple: on
full batches, whose losses differ by next to nothing, momentum makes such."""
ROUNDING = 1e-5
"""Relative change of a loss that may be rounding in float32."""
FIRST, UNKNOWN = 1.0, 10.0
"""After the very first step, with no difference to compare with, a loss has risen when it rose by so many times its own
size; the second where the noise over samples is not known either."""


@lru_cache(maxsize=4096)
def quantile(freedom: float, chance: float = math.sqrt(FALSE_ALARM)) -> float:
    """The value that a Student t variable exceeds with this chance; infinite below one degree of freedom.

    Args:
        freedom: Degrees of freedom.
        chance: The chance; by default that of one batch that looks like an explosion.
    """
    if freedom < 1:
        return math.inf
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1.0 - chance))


class LossScatter(Remembers):
    """How much consecutive losses of a run usually differ."""

    _differences: deque[float]
    _harmless: float
    _first: float | None
    _last: float
    _lowest: float

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._differences = deque(maxlen=WINDOW)
        self._harmless, self._first = 0.0, None
        self._last = self._lowest = math.inf

    def note(self, loss: float) -> None:
        """Add the loss of a batch that was used."""
        if self._first is None:
            self._first = loss
        elif math.isfinite(self._last):
            self._differences.append(abs(loss - self._last))
        self._last, self._lowest = loss, min(loss, self._lowest)
        self._harmless *= FORGETS

    def level_unknown(self) -> None:
        """The parameters are others: losses from here on have nothing to do with those before."""
        self._differences.clear()
        self._first = None
        self._lowest = math.inf

    def moved(self) -> None:
        """The next loss is one of another point: how far it lies from the last one says nothing."""
        self._last = math.inf

    def note_harmless(self, rise: float) -> None:
        """A rise that looked like an explosion was none: the next one of its size is not looked at."""
        self._harmless = max(self._harmless, rise)

    @property
    def deviation(self) -> float:
        """Standard deviation of a difference, told by the middle and by the largest tenth; 0 if none was seen."""
        if not self._differences:
            return 0.0
        ordered = sorted(self._differences)
        # Of |x| of a normal distribution the median lies at 0.674 deviations, nine tenths at 1.645.
        return max(statistics.median(ordered) / 0.674, ordered[int(0.9 * (len(ordered) - 1))] / 1.645)

    def limit(self, before: float, noise: float, freedom: int) -> float:
        """Return how far a loss may rise above the one before.

        Args:
            before: That loss.
            noise: Standard error of the difference of both, from the scatter over samples; nan if not known.
            freedom: Its degrees of freedom.
        """
        known = noise >= 0.0 and freedom >= 1  # False where it is nan
        progress = 0.0 if self._first is None else max(0.0, self._first - self._lowest)
        limits = [ROUNDING * abs(before), 2.0 * self._harmless, min(RIPPLE * abs(before), PROGRESS * progress)]
        if known:
            limits.append(quantile(freedom) * noise)
        if self._differences:
            limits.append(quantile(min(TAILS, len(self._differences))) * self.deviation)
        else:
            limits.append((FIRST if known else UNKNOWN) * abs(before))
        return max(limits)


MISTAKEN = 0.01
"""Probability, over a whole run, that chance alone makes `surely_above` say so of two equal levels."""


class Level(NamedTuple):
    """Where the losses of some steps lie.

    Attributes:
        mean: Their mean.
        deviation: Their standard deviation from batch to batch (ddof=1), nan for one loss.
        count: Their number.
    """

    mean: float
    deviation: float
    count: int  # type: ignore[assignment] # - hides tuple.count, on purpose

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for one loss."""
        return math.inf if self.count < 2 else self.deviation / math.sqrt(self.count)

    def and_one(self, value: float) -> Level:
        """The level with one value more (Welford's update)."""
        count, off = self.count + 1, value - self.mean
        mean = self.mean + off / count
        squares = self.deviation**2 * max(0, self.count - 1) + off * (value - mean)
        return Level(mean, math.sqrt(squares / max(1, count - 1)), count)


NONE = Level(0.0, 0.0, 0)
"""Of nothing yet, for `Level.and_one`."""


def level_of(losses: Sequence[float]) -> Level:
    """The level of some losses; infinite where one of them is not finite, or none is there."""
    if not losses or not all(map(math.isfinite, losses)):
        return Level(math.inf, 0.0, len(losses))
    deviation = statistics.stdev(losses) if len(losses) > 1 else math.nan
    return Level(statistics.fmean(losses), deviation, len(losses))


def scatter_of(losses: Sequence[float]) -> float:
    """Deviation from batch to batch of losses that have a trend as well, from those of neighbours; nan below two."""
    differences = [(b - a) ** 2 for a, b in pairwise(losses)]
    return math.sqrt(statistics.fmean(differences) / 2.0) if differences else math.nan


def surely_above(high: Level, low: Level, looks: int, freedom: float | None = None) -> bool:
    """Whether one level lies above another beyond the noise of both.

    Args:
        high: The level that may be higher.
        low: The other one.
        looks: How often this is asked in a run; the chance to be mistaken once in all of them is `MISTAKEN`.
        freedom: Degrees of freedom of the deviations, where they come from more losses than the levels have; None: as
            in Welch's test.
    """
    rise = high.mean - low.mean
    if math.isinf(high.mean) or not rise > 0.0:
        return math.isinf(high.mean) and math.isfinite(low.mean)
    if min(high.count, low.count) < 2:
        return False
    parts = high.error**2, low.error**2
    noise = math.sqrt(sum(parts))
    if noise == 0.0:
        return True
    if freedom is None:
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (high.count - 1) + parts[1] ** 2 / (low.count - 1))
    return rise > quantile(round(freedom, 2), MISTAKEN / looks) * noise
