"""After the calibration: is the held rate too high, too low, or has it done what it can?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from alpha_optim.alpha.loss_level import NONE, Level, level_of, surely_above
from alpha_optim.alpha.states import Remembers
from alpha_optim.alpha.window import rise_of_steps, rises_by_itself

SHARE = 20
SHORTEST = 20
"""A window is a 20th of the run, at least 20 steps."""
FEWEST = 3
"""Losses in a window, where few are read (``guard=False`` and measurements now and then), ..."""
FEWEST_TREND = 10
"""... and to tell from it whether the loss still falls."""
SETTLES = 1
"""So many windows after a change are not judged: the loss needs time to come down."""
SURE = 3.0
"""Standard errors by which a loss that falls fast lies below all windows before."""
UNKNOWN = Level(math.inf, 0.0, 0)
COUNTED = 40
"""The loss falls fast when it does so by `SURE` standard errors of windows of so many losses at most: in longer
windows every loss falls surely, whatever the rate."""
STANDING = 2
"""So many windows the loss is given before it may stand."""


class Seen(NamedTuple):
    """What a window of losses said.

    Attributes:
        high: It surely lies above the best level.
        mean: The mean of the window, nan where it was not judged.
        error: The standard error of such a mean.
        falls: It lies far below all windows before.
        stands: It does not lie below the lowest window before.
        by_itself: It is high, and surely not by the steps made since the best level.
        unclear: It is high, most likely not by those steps, and that may be chance.
        level: Where its losses lie.
    """

    high: bool
    mean: float
    error: float
    falls: bool
    stands: bool
    by_itself: bool = False
    level: Level = UNKNOWN
    unclear: bool = False


class LossWatch(Remembers):
    """Windows of the loss against the best level so far, and against each other."""

    level: Level | None
    newest: int  # iteration of the newest loss
    _losses: list[float]
    _begin: int | None  # iteration of the window's first loss
    _by_steps: float = 0.0  # by how much steps can have raised the loss since the best level, up to the last window
    _likely: float  # by how much they have raised it most likely
    _ended: int  # iteration at which that ended
    _ends: Level = NONE  # slope at the end times length, of the steps measured since then
    _windows: int  # since the level last spoke
    _trends: int  # windows in which a trend was looked for
    _lowest: float  # mean of the lowest of them

    def __init__(self, total_steps: int) -> None:
        """Start without a level: the first window sets it; nothing is judged while it is None."""
        self.length = max(SHORTEST, total_steps // SHARE)
        self.level = UNKNOWN
        self.starts_after(-1)
        self.settle()
        self._trends, self._lowest = 0, math.inf

    def starts_after(self, iteration: int) -> None:
        """Ignore losses up to this iteration; the level is that of this point."""
        self.newest = self._ended = iteration
        self._ends, self._by_steps, self._likely = NONE, 0.0, 0.0

    def stepped(self, end: float) -> None:
        """Hear of the slope at the end of a measured step, times its length."""
        self._ends = self._ends.and_one(end)

    def see(self, loss: float, iteration: int) -> Seen | None:
        """Add the loss of an iteration, unless it is nan or known; say something when a window is complete."""
        if self.level is None or not math.isfinite(loss) or iteration <= self.newest:
            return None
        self.newest = iteration
        self._begin = iteration if self._begin is None else self._begin
        self._losses.append(loss)
        if iteration - self._begin + 1 < self.length or len(self._losses) < FEWEST:
            return None
        losses, self._losses, self._begin = self._losses, [], None
        mean = statistics.fmean(losses)
        falls, stands = self._trend(mean, losses)
        best = self.level
        level = level_of(losses)
        high = self._too_high(level, best)
        judged = high or self._windows > SETTLES
        error = statistics.stdev(losses) / math.sqrt(len(losses))
        # Steps that have gone down in one window do not make up for those that go up in another.
        steps = iteration - self._ended
        self._by_steps += max(0.0, rise_of_steps(self._ends, steps))
        self._likely += max(0.0, rise_of_steps(self._ends, steps, chance=0.5))
        by_itself = high and rises_by_itself(mean - best.mean, self._by_steps)
        unclear = high and not by_itself and rises_by_itself(mean - best.mean, self._likely)
        if unclear:  # judged once more after the next window
            self._windows = SETTLES
        self._ends, self._ended = NONE, iteration
        if self.level is not best:
            self._by_steps = self._likely = 0.0
        return Seen(high, mean if judged else math.nan, error, falls, stands, by_itself, level, unclear)

    def begin_anew(self) -> None:
        """The losses so far say nothing about those to come: the next window sets the level."""
        self.level = None if self.level is None else UNKNOWN
        self._trends, self._lowest = 0, math.inf
        self.settle()

    def settle(self) -> None:
        """Leave out the window under way and judge none before the next but one: the rate is another."""
        self._losses, self._begin, self._windows = [], None, 0

    def _too_high(self, level: Level, best: Level) -> bool:
        """Whether a window surely lies above the best level."""
        self._windows += 1
        if level.mean < best.mean:
            self.level = level
        above = self._windows > SETTLES and surely_above(level, best, SHARE)
        if above:
            self._windows = 0
        return above

    def _trend(self, mean: float, losses: list[float]) -> tuple[bool, bool]:
        """Whether the loss falls fast, and whether it stands."""
        if len(losses) < FEWEST_TREND:
            return False, False
        self._trends += 1
        before = self._trends - 1 - SETTLES
        if before < 0:
            return False, False
        lowest, self._lowest = self._lowest, min(self._lowest, mean)
        error = statistics.stdev(losses) * math.sqrt(2.0 / min(len(losses), COUNTED))
        return before > 0 and mean < lowest - SURE * error, before >= STANDING and mean > lowest

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; versions before knew nothing of steps."""
        super().load_state_dict({"likely": state.get("by_steps", 0.0), "ended": state["newest"], **state})
