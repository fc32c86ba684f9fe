"""Third phase: short annealed runs from one point, each at another rate; the best one is gone on from.

Short runs that fall linearly to 0 predict the best rate of the whole run; at constant rates they prefer rates too low.
Like the run that follows they begin with a short growth: what explodes at once at its full rate may be best after that.
Trials begin at the rate of the climb's lowest loss and the next lower one, and go outwards as long as the best one lies
at the border. The rate is the mean of those as good as the best, or, if there is one best, that of a parabola through
the scores around it.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from alpha_optim.alpha.loss_level import Level, level_of, surely_above
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.window import rise_of_steps, rises_by_itself, rises_of
from alpha_optim.policies.base import Place
from alpha_optim.policies.calibrate.phase import CUT_SHORT, After, Ended
from alpha_optim.policies.calibrate.settings import Settings

STEP = math.log(10.0) / 2
"""Log rates of trials are so far apart: half a decade."""
BELOW_KNEE = 2 * STEP
"""Nothing is tried further below the knee: where batches are small the knee may lie above the best rate."""
ABOVE_KNEE = 2 * STEP
"""Where the first trials come to nothing, rates further above the knee are passed over: elsewhere climbs are lowest
within a decade of it, or a little more."""
GROWS = 0.2
"""In this share of a trial its rate grows linearly, as after the search it does in a share of the run."""
FEWEST_SCORED, SHARE_SCORED = 10, 5
"""The score of a trial is the mean of its last tenfold or fifth of losses, whichever are more."""
EQUAL = 2.0
"""Scores that differ by fewer standard errors of the difference are equal. Then the mean of their log rates is taken,
and the trial at the lowest is gone on from: what too high a rate does to a network shows in the loss later."""
WITHOUT_TRIALS = math.log(2.0)
"""Without trials the rate lies so far below that of the lowest loss: the loss falls on for a while at rates that are
already too high."""
FIRST = 3
"""So many losses of a trial, at rates that have hardly grown, tell where it began."""
LOOK = 5
"""The last so many losses of a trial tell whether it is hopeless."""


@dataclass(frozen=True)
class Trials:
    """Tries rates.

    Attributes:
        settings: Of the search.
        position: Log rate of the trial under way, before it is annealed.
        lowest: Log rate below which nothing is tried.
        highest: Log rate above which nothing is tried.
        level: Losses at the point that all trials start from.
        fell: Whether the climb surely lowered the loss; else a trial has to.
        steps: Steps made since the beginning of the search.
        made: Steps of the trial under way.
        losses: Losses of the trial under way.
        best_losses: Losses of the trial with the lowest score so far.
        scores: Log rate, score and its standard error of the trials that are over; infinite where hopeless.
        kept: Log rate of the trial whose end is kept to go on from, the lowest one as good as the best; nan if none is.
        ends: Slope at the end times length of the steps of the trial under way that were measured.
        by_itself: Whether the loss surely rose, and not by the steps made.
        reached: The lowest losses of the climb; None without one.
        risen: Whether the loss of the climb rose again in the end.
    """

    settings: Settings
    position: float
    lowest: float
    highest: float
    level: Level
    steps: int
    fell: bool = False
    made: int = 0
    losses: tuple[float, ...] = ()
    best_losses: tuple[float, ...] = ()
    scores: tuple[tuple[float, float, float], ...] = ()
    kept: float = math.nan
    ends: tuple[float, ...] = ()
    by_itself: bool = False
    reached: Level | None = None
    risen: bool = True

    @classmethod
    def begun(
        cls,
        settings: Settings,
        around: float,
        knee: float,
        level: Level,
        steps: int,
        fell: bool = False,
        by_itself: bool = False,
        reached: Level | None = None,
        risen: bool = True,
    ) -> Trials | None:
        """The first trial, at the log rate ``around``; None where the run is too short for two."""
        if not settings.allows(steps + settings.trial):
            return None
        lowest, highest = (-2 * STEP, 2 * STEP) if settings.around else (knee - BELOW_KNEE, math.inf)
        return cls(
            settings, around, lowest, highest, level, steps, fell, by_itself=by_itself, reached=reached, risen=risen
        )

    @property
    def factor(self) -> float:
        """Linearly down from 1 after a short growth, never 0."""
        length = self.settings.trial
        return min((length - self.made) / length, (self.made + 1) / max(1.0, GROWS * length))

    def measured(self, measurement: AlphaMeasurement, here: float) -> After:
        """Take note of where the step went, and of the loss where steps do not tell."""
        loss, rises = measurement.loss_start, rises_of(measurement)
        phase = self if rises is None else replace(self, ends=(*self.ends, rises[1]))
        if self.settings.by_steps or not math.isfinite(loss):
            return After(phase)
        return phase._seen(replace(phase, losses=(*phase.losses, loss)))

    def stepped(self, loss: float) -> After:
        """Go on with the trial, or end it."""
        known = math.isfinite(loss)
        losses = (*self.losses, loss) if known else self.losses
        settings = replace(self.settings, by_steps=self.settings.by_steps or known)
        return self._seen(replace(self, settings=settings, made=self.made + 1, steps=self.steps + 1, losses=losses))

    def exploded(self) -> After:
        """The trial is hopeless."""
        return self._end(math.inf, 0.0)

    def _seen(self, phase: Trials) -> After:
        """End the trial if it is over, or hopeless, or surely no better than the best."""
        rise = phase._rise()
        if rise > 0.0:
            if not rises_by_itself(rise, rise_of_steps(level_of(phase.ends), phase.made)):
                return phase._end(math.inf, 0.0)
            phase = replace(phase, by_itself=True)
        if phase.made >= phase.settings.trial:
            score = level_of(phase.losses[-self._scored :])
            return phase._end(score.mean, score.error)
        behind = None if phase.by_itself else phase._behind()
        return After(phase) if behind is None else phase._end(*behind)

    @property
    def _scored(self) -> int:
        """So many of the last losses of a trial are its score."""
        return max(FEWEST_SCORED, self.settings.trial // SHARE_SCORED)

    def _rise(self) -> float:
        """By how much the loss surely lies above where the trial began; 0 if it does not."""
        if len(self.losses) <= LOOK or self.level.count < 2:
            return 0.0
        last = Level(statistics.fmean(self.losses[-LOOK:]), self.level.deviation, LOOK)
        looks = self.settings.trial * self.settings.most_trials
        risen = surely_above(last, self.level, looks, self.level.count - 1)
        return last.mean - self.level.mean if risen else 0.0

    def _behind(self) -> tuple[float, float] | None:
        """Score and error if the loss surely lies above that of the best trial after as many steps; None if not.

        What the rate does shows late in a trial, so that it is asked in the second half only. The distance there is
        taken for that at the end.
        """
        seen, window = len(self.losses), self._scored
        if seen < max(self.settings.trial / 2, window) or seen > len(self.best_losses):
            return None
        own, best = level_of(self.losses[-window:]), level_of(self.best_losses[seen - window : seen])
        if not surely_above(own, best, self.settings.trial * self.settings.most_trials):
            return None
        return self._lowest[1] + own.mean - best.mean, math.hypot(own.error, best.error)

    def _end(self, score: float, error: float) -> After:
        """Score the trial; begin the next one, or go on from the end of one."""
        best = not self.scores or score < self._lowest[1]
        scores = (*self.scores, (self.position, score, error))
        best_losses = self.losses if best else self.best_losses
        phase = replace(self, scores=scores, best_losses=best_losses, made=0, losses=(), ends=())
        good = phase._good()
        goes_on = min((where for where in (self.kept, self.position) if where in good), default=None)
        keep: Place | None = "best" if goes_on == self.position else None
        phase = replace(phase, kept=math.nan if goes_on is None else goes_on)
        shown = f"it ends at a loss of {score:.4g} ± {error:.2g}" if math.isfinite(score) else "hopeless"
        text = f"trial of {self.made} steps at {{{self.position}}}: {shown}"
        following = phase._next()
        if following is not None:
            return After(replace(phase, position=following), keep, "start", text=text)
        lower = phase._far_below()
        if lower is not None and goes_on is not None and phase.fell:
            taken = "no trial came near what the climb had reached at lower rates"
            return After(
                None, restore="start", found=lower, highest=lower, text=f"{text}; {taken}: {{{lower}}} is taken"
            )
        if goes_on is None or not phase._fell():
            why = "every trial was hopeless" if goes_on is None else "no trial surely lowered the loss"
            return After(None, restore="start", text=f"{text}; {why}")
        return phase._over(None if keep == "best" else "best", f"{text}; the best rate is")

    def _fell(self) -> bool:
        """Whether climb or trials surely lowered the loss; True where it is not known where that began.

        A loss that rises by itself was lowered if the best trial ends below where it began itself, and surely below the
        end of another one.
        """
        if self.fell or self.level.count < 2:
            return True
        known = [(score, error * math.sqrt(self._scored)) for _, score, error in self.scores if math.isfinite(score)]
        ends = [Level(score, deviation, self._scored) for score, deviation in known]
        if any(surely_above(self.level, end, self.settings.most_trials) for end in ends):
            return True
        if not self.by_itself or not ends or min(ends).mean >= statistics.fmean(self.best_losses[:FIRST]):
            return False
        return any(surely_above(end, min(ends), self.settings.most_trials) for end in ends)

    @property
    def _lowest(self) -> tuple[float, float, float]:
        """The lowest of the scores."""
        return min(self.scores, key=lambda entry: entry[1])

    @property
    def best(self) -> float:
        """Log rate of the trial with the lowest score; nan if all were hopeless."""
        where, score, _ = self._lowest
        return where if math.isfinite(score) else math.nan

    def _good(self) -> list[float]:
        """Log rates of the trials as good as the best, itself among them; none if all were hopeless."""
        _, lowest, error = self._lowest
        if math.isinf(lowest):
            return []
        return [where for where, score, own in self.scores if score <= lowest + EQUAL * math.hypot(error, own)]

    def cut_short(self) -> After:
        """Go on from the best trial so far; without one from the start, at what the climb says or at the rate given."""
        if math.isnan(self.kept) and self.fell and not self.scores:
            found = self.position - WITHOUT_TRIALS
            text = f"{CUT_SHORT.text}; half of the rate at which the climb's loss was lowest is taken"
            return After(None, restore="start", found=found, highest=self.position, text=text)
        if math.isnan(self.kept) or not self._fell():
            return CUT_SHORT
        text = "the search was cut short, and goes on from the end of its best trial; the best rate so far is"
        return self._over("best", text)

    def _over(self, restore: Place | None, text: str) -> After:
        """The search is over: what its scores say, which is told behind the text."""
        found, highest = self.found()
        return After(None, None, restore, found, highest, self._ended(), text=f"{text} {{{found}}}")

    def _ended(self) -> Ended | None:
        """How the best trial ended; None where it is not known where it began."""
        if self.level.count < 2:
            return None
        good = self._good()
        worse = [where for where, _, _ in self.scores if where > max(good)]
        return Ended(self.level.mean, *self._lowest[1:], min(worse, default=math.inf))

    def _next(self) -> float | None:
        """Log rate of the next trial; None if there is none."""
        if len(self.scores) >= self.settings.most_trials or not self.settings.allows(self.steps):
            return None
        tried = [where for where, _, _ in self.scores]
        lower = self._far_below()
        if lower is not None:
            return lower
        if len(tried) == 1 and self.best <= self.lowest + STEP:
            return self._above(tried)  # alpha was still below 0 there
        if self.best == min(tried):
            following = min(tried) - STEP
            return following if following >= self.lowest else self._above(tried)
        return self._above(tried)

    def _far_below(self) -> float | None:
        """The log rate to go down to where no trial came near what the climb has reached, at lower rates; else None.

        Where outputs are normalised (cosine similarities, weight normalisation) large steps make the weights grow, and
        these make the next ones small: a climb goes on and on, at rates that are far too high for weights as they
        begin.
        """
        _, score, error = self._lowest
        near = math.inf if math.isinf(self.lowest) else self.lowest + BELOW_KNEE + ABOVE_KNEE
        if math.isfinite(score):
            if self.reached is None or self.best <= near:
                return None
            end = Level(score, error * math.sqrt(self._scored), self._scored)
            if not surely_above(end, self.reached, self.settings.most_trials):
                return None
        lower = min(where for where, _, _ in self.scores) - STEP
        # That the first is hopeless is usual, and where batches are tiny the knee may lie far too low.
        usual = math.isinf(score) and len(self.scores) == 1 and self.risen
        return lower if usual else min(lower, near)

    def _above(self, tried: list[float]) -> float | None:
        """The next higher log rate, if the best one is the highest so far that is not hopeless."""
        above = [where for where in tried if where > self.best]
        highest = min(self.highest, self.settings.highest)
        following = min(self.best + STEP, highest) if not above else (self.best + min(above)) / 2.0
        hopeless = all(math.isinf(score) for where, score, _ in self.scores if where > self.best)
        wide = not above or min(above) - self.best > 0.6 * STEP
        far = following - self.best > 0.4 * STEP  # half a step, but for rounding
        return following if hopeless and wide and far and following <= highest else None

    def found(self) -> tuple[float, float]:
        """The log rate that follows from the scores, and how high it may ever be raised: to that of the best trial."""
        good, ordered = self._good(), sorted(self.scores)
        if len(good) > 1:
            return statistics.fmean(good), self.best
        place = next(k for k, entry in enumerate(ordered) if entry[0] == self.best)
        neighbours = ordered[max(0, place - 1) : place] + ordered[place + 1 : place + 2]
        near = all(math.isfinite(score) and abs(where - self.best) < 1.5 * STEP for where, score, _ in neighbours)
        if len(neighbours) < 2 or not near:
            return self.best, self.best
        left, right = ((where - self.best, score - ordered[place][1]) for where, score, _ in neighbours)
        shift = _vertex(left, right)
        return self.best + shift, self.best + max(0.0, shift)


def _vertex(left: tuple[float, float], right: tuple[float, float]) -> float:
    """Where a parabola through the origin and two points that lie no lower, one on either side, is lowest.

    Args:
        left: The point with x < 0.
        right: The point with x > 0.
    """
    (a, fa), (b, fb) = left, right
    slope, curvature = fa * b * b - fb * a * a, fa * b - fb * a  # both times a b (b - a)
    return 0.5 * slope / curvature if curvature != 0.0 else 0.0
