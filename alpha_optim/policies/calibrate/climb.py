"""Second phase: climb fast until the loss has risen, to see roughly where the edge is; then go back to the start.

The climb is as harmless as a trial, since it ends where it began. It says where trials have to look: the log rate at
which the loss was lowest, and the knee, where alpha rose from its plateau above 0; no rate below it is worth trying.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from alpha_optim.alpha.loss_level import Level, level_of, scatter_of, surely_above
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.window import ratio_of_sums, rise_of_steps, rises_by_itself, rises_of
from alpha_optim.policies.calibrate.phase import After
from alpha_optim.policies.calibrate.settings import Settings
from alpha_optim.policies.calibrate.trials import STEP, WITHOUT_TRIALS, Trials

PACE = math.log(10.0) / 9
"""Change of the log rate per step: a decade in nine."""
WINDOW = 5
"""Losses that are averaged: half a decade."""
LOST = 0.5
"""The climb is over when a window surely lost this share of all progress."""
ALPHAS = 8
"""Steps over which alpha is averaged for the knee."""
FURTHER = math.log(1e3)
SOON = 14
"""Where the loss rose within so many steps and never fell the climb began too high: once more from so far below. As far
above the knee a climb ends, further than those of losses that rise again have come."""


@dataclass(frozen=True)
class Climb:
    """Climbs until the loss has risen.

    Attributes:
        settings: Of the search.
        position: Log rate of the coming step.
        steps: Steps made since the beginning of the search.
        before: Losses of the steps before the climb.
        losses: Pairs of log rate and loss.
        rises: Log rate, and slope times length per rate at both ends, of the steps measured.
        shaken: Whether it has gone on after a step that was taken back.
        again: Whether it is the second climb, since the first one only rose.
        bounded: Steps made at the highest rate that is allowed.
        by_itself: Whether the loss surely rose, and not by the steps made.
    """

    settings: Settings
    position: float
    steps: int
    before: tuple[float, ...]
    losses: tuple[tuple[float, float], ...] = ()
    rises: tuple[tuple[float, float, float], ...] = ()
    again: bool = False
    shaken: bool = False
    bounded: int = 0
    by_itself: bool = False
    factor = 1.0

    def measured(self, measurement: AlphaMeasurement, here: float) -> After:
        """Take note of alpha, and of the loss where steps do not tell."""
        rises = rises_of(measurement)
        phase = self
        if rises is not None:
            per_rate = math.exp(-here)
            phase = replace(phase, rises=(*phase.rises, (here, rises[0] * per_rate, rises[1] * per_rate)))
        if self.settings.by_steps or not math.isfinite(measurement.loss_start):
            return After(phase)
        return phase._with_loss(here, measurement.loss_start)

    def stepped(self, loss: float) -> After:
        """Climb on, or end."""
        highest = self.settings.highest
        phase = replace(
            self,
            steps=self.steps + 1,
            position=min(highest, self.position + PACE),
            bounded=self.bounded + (self.position >= highest),
        )
        # At a bound it waits for the loss to fall.
        arrived = (self.bounded >= WINDOW and self.fell()) or self._far_above_knee()
        if self.steps >= self.settings.longest_climb + len(self.before) or arrived:
            return self._end(risen=False)
        return phase._with_loss(self.position, loss) if math.isfinite(loss) else After(phase)

    def exploded(self) -> After:
        """The edge is passed; or two batches were bad, as long as the loss has not fallen: then climb on, once."""
        if not self.shaken and not self.fell():
            return After(replace(self, shaken=True), restore="start")
        return self._end(risen=True)

    def _with_loss(self, here: float, loss: float) -> After:
        phase = replace(self, losses=(*self.losses, (here, loss)))
        if not phase._risen():
            return After(phase)
        if phase._rises_by_itself():
            return After(replace(phase, by_itself=True))
        return phase._end(risen=True)

    # ---------------------------------------------------------------- what was seen

    def windows(self) -> list[tuple[float, float]]:
        """Mean log rate and mean loss of every window."""
        return [
            (fmean(where for where, _ in part), fmean(loss for _, loss in part))
            for part in (self.losses[k - WINDOW : k] for k in range(WINDOW, len(self.losses) + 1))
        ]

    def _first(self) -> list[float]:
        """Losses before the climb and from its beginning, at rates that change nothing yet."""
        return [*self.before, *(loss for _, loss in self.losses[:WINDOW])]

    def _levels(self) -> tuple[Level, Level, Level, int] | None:
        """Levels before the climb, of the best window and of the last one, and the degrees of freedom of their noise.

        The noise is that of all losses up to the best window: losses of a window have a trend as well.
        """
        windows = self.windows()
        if not windows:
            return None
        best = min(range(len(windows)), key=lambda k: windows[k][1])
        noise = scatter_of([*self.before, *(loss for _, loss in self.losses[: best + WINDOW])])
        first = self._first()
        return (
            Level(fmean(first), noise, len(first)),
            Level(windows[best][1], noise, WINDOW),
            Level(windows[-1][1], noise, WINDOW),
            len(self.before) + best + WINDOW - 1,
        )

    def _risen(self) -> bool:
        """Whether the last window surely lost much of all progress."""
        levels = self._levels()
        if levels is None:
            return False
        first, best, last, freedom = levels
        looks = self.settings.longest_climb
        if not self._fell(levels):
            return surely_above(last, first, looks, freedom)
        looks *= looks  # for the lowest of many windows is low by chance
        return last.mean - best.mean > LOST * (first.mean - best.mean) and surely_above(last, best, looks, freedom)

    def _rises_by_itself(self) -> bool:
        """Whether the loss never fell, and rises for other reasons than the rate."""
        levels = self._levels()
        if levels is None or self._fell(levels):
            return False
        ends = level_of([end * math.exp(where) for where, _, end in self.rises])
        return rises_by_itself(levels[2].mean - levels[0].mean, rise_of_steps(ends, len(self.losses)))

    def lowest(self) -> float:
        """Log rate at which the loss was lowest: the mean over windows as good as the best."""
        levels = self._levels()
        assert levels is not None
        limit = levels[1].mean + levels[1].error
        return fmean(where for where, mean in self.windows() if mean <= limit)

    def fell(self) -> bool:
        """Whether the loss surely fell."""
        levels = self._levels()
        return levels is not None and self._fell(levels)

    def _fell(self, levels: tuple[Level, Level, Level, int]) -> bool:
        first, best, _, freedom = levels
        return surely_above(first, best, self.settings.longest_climb**2, freedom)

    def knee(self) -> float | None:
        """Log rate at which alpha, over a few steps, first rose from below 0 above it; None if it did not."""
        below = False
        for part in parts_of(self.rises, ALPHAS):
            alpha = ratio_of_sums([(start, end) for _, start, end in part]).alpha
            if alpha > 0.0 and below:
                return fmean(where for where, _, _ in part)
            below = alpha <= 0.0
        return None

    def _far_above_knee(self) -> bool:
        """Whether steps have overshot for long, and the loss goes on falling: weights grow that have no scale."""
        if self.position - self._begin() <= FURTHER:
            return False
        knee = self.knee()
        return knee is not None and self.position - knee > FURTHER and self.fell()

    def _begin(self) -> float:
        """Log rate at which the climb began."""
        return self.losses[0][0] if self.losses else self.position

    # ---------------------------------------------------------------- the end

    def _end(self, risen: bool) -> After:
        """Go back to the start, and try rates, if the climb can be trusted."""
        fell, enough = self.fell(), len(self.losses) >= WINDOW
        if risen and not fell and not self.again and len(self.losses) <= SOON:
            lower = Climb(self.settings, self._begin() - FURTHER, self.steps, self.before, again=True)
            return After(lower, restore="start")
        if not fell and not (risen and enough and self.settings.allows(self.steps)):
            why = "the loss did not surely fall while the rate climbed"
            # It may grow where the loss falls fast later, half a decade less far than the climb went.
            return After(None, restore="start", highest=self.position - STEP, text=why)
        low, knee = self.lowest(), self.knee()
        seen = f"the rate climbed to {{{self.position}}}, the loss was lowest at a rate of {{{low}}}"
        by_itself = self.by_itself and not fell
        if by_itself:  # the lowest loss is an early one
            low = self.losses[-1][0] if knee is None else knee
            seen = f"the rate climbed to {{{self.position}}}, the loss rose, and not by the steps made"
        seen += "" if knee is None else f", alpha rose above 0 at {{{knee}}}"
        held = ", which is the highest allowed" if self.bounded else ", and it did not rise again"
        seen += "" if risen else held
        level = level_of(self._first())
        lowest = -math.inf if knee is None else knee
        levels = self._levels()
        reached = levels[1] if levels is not None and fell else None
        trials = Trials.begun(self.settings, low, lowest, level, self.steps, fell, by_itself, reached, risen)
        if trials is None:
            found = low - WITHOUT_TRIALS
            return After(None, restore="start", found=found, highest=low, text=f"{seen}: {{{found}}} is taken")
        return After(trials, restore="start", text=seen)


def parts_of(values: Sequence[tuple[float, float, float]], size: int) -> list[Sequence[tuple[float, float, float]]]:
    """All runs of ``size`` neighbours; shorter ones from half that size at the beginning."""
    return [values[max(0, k - size) : k] for k in range(size // 2, len(values) + 1)]
