"""Learning rates, one per param group: what is scheduled, and what others made of it. Only `scheduler` writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import CyclicLR, LambdaLR

from alpha_optim.alpha.states import Remembers


def peak_of(group: Mapping[str, Any]) -> float:
    """Largest of the group's ``lr``, ``initial_lr`` and ``max_lr``: the peak of most schedules."""
    return max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))


POINTS = 1000
"""At so many steps, the first ones and evenly over a run, a schedule that is a function of the step is looked at."""
LENGTH = 10_000
"""Of a run whose length is not known."""


def peaks_of(groups: Sequence[Mapping[str, Any]], schedule: Any, steps: int | None) -> list[float]:
    """Highest rates of a schedule, one per group.

    Args:
        groups: The param groups.
        schedule: The schedule, or None.
        steps: Length of the run, if it is known.
    """
    peaks = [peak_of(group) for group in groups]
    found = None
    if isinstance(schedule, CyclicLR):
        found = [float(rate) for rate in schedule.max_lrs]
    elif isinstance(schedule, LambdaLR):  # the usual ones end up at 1, Noam's far below
        length = steps or LENGTH
        every = {*range(min(length, POINTS)), *range(0, length, max(1, length // POINTS))}
        try:
            highest = [max(float(of(step)) for step in every) for of in schedule.lr_lambdas]
            found = [float(rate) * factor for rate, factor in zip(schedule.base_lrs, highest, strict=True)]
        except Exception:  # whatever a function of the user's raises at a step that the loop has not reached
            found = None
    if found is None or len(found) != len(peaks) or not all(0.0 < rate < math.inf for rate in found):
        return peaks
    return found


def clamped(rates: Sequence[float], lowest: float, highest: float) -> list[float]:
    """Rates between two bounds with their ratios kept; ``highest`` wins, and 0 stays 0 beside others."""
    positive = [rate for rate in rates if rate > 0.0]
    if lowest > 0.0 and not positive:
        rates = [lowest] * len(rates)
    elif positive and min(positive) < lowest:
        rates = [rate * lowest / min(positive) for rate in rates]
    if max(rates) > highest:
        rates = [rate * highest / max(rates) for rate in rates]
    return list(rates)


def ratios(now: Sequence[float], before: Sequence[float]) -> list[float]:
    """By what each rate was multiplied since; infinite where it was 0 and is not."""
    return [
        new / old if old != 0.0 else (1.0 if new == old else math.inf) for new, old in zip(now, before, strict=True)
    ]


def taken_over(rates: Sequence[float], factors: Sequence[float], now: Sequence[float]) -> list[float]:
    """Rates after somebody's change by factors; where that is infinite, what stands for the rate ``now``."""
    return [
        rate * factor if math.isfinite(factor) else new for rate, factor, new in zip(rates, factors, now, strict=True)
    ]


def rates_in(groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """The rates that the param groups hold now."""
    return [float(group["lr"]) for group in groups]


class GroupRates(Remembers, names={"factor": "factor_now"}):
    """The rates that scale and envelope multiply, and what was written last.

    Attributes:
        scheduled: The user's own rates, or what a schedule makes of them.
        peaks: The highest rates of the schedule; they stand in for ``scheduled`` during a search.
        written: What the scheduler has written last.
        factor: By what the scheduled rates were multiplied then.
        foreign: Calls in a row before which somebody else had written a rate.
    """

    scheduled: list[float]
    peaks: list[float]
    written: list[float]
    factor: float = 1.0
    foreign: int = 0

    def __init__(self, groups: Sequence[Mapping[str, Any]], schedule: Any = None, steps: int | None = None) -> None:
        """Begin with the rates given.

        Args:
            groups: The param groups.
            schedule: What makes other rates of them, if anything does.
            steps: Length of the run, if it is known.
        """
        self.scheduled = rates_in(groups)
        self.written = list(self.scheduled)
        self.peaks = peaks_of(groups, schedule, steps)
        self.belong_to(groups)

    def belong_to(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """From here on, the rates are those of these param groups."""
        self._groups = list(map(id, groups))

    def went_back(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The optimizer was loaded from an earlier state: its rates are what the scheduler wrote then, not a change."""
        self._match(groups, False)
        self.written = rates_in(groups)

    def take_over(self, groups: Sequence[Mapping[str, Any]], searching: bool = False) -> bool:
        """Take over what somebody else has written since, as a ratio; during a search as a rate given.

        The rates of a search have nothing to do with those given: the first are a hundred millionth of them.

        Args:
            groups: The param groups as they are now; some may have been added or removed.
            searching: Whether a rate is searched.

        Returns:
            Whether anything was.
        """
        self._match(groups, searching)
        now = rates_in(groups)
        factors = ratios(now, self.written)
        if all(factor == 1.0 for factor in factors):
            self.foreign = 0
            return False
        self.foreign += 1
        if searching:
            changed = [place for place, factor in enumerate(factors) if factor != 1.0]
            for place in changed:
                self.scheduled[place], self.peaks[place] = now[place], peak_of(groups[place])
            self.written = now
            return True
        plain = [rate / self.factor for rate in now]
        self.scheduled = taken_over(self.scheduled, factors, plain)
        self.peaks = taken_over(self.peaks, factors, plain)
        self.written = now
        return True

    def belong_to_others(self) -> None:
        """What is written is what is scheduled."""
        self.scheduled, self.peaks = list(self.written), list(self.written)

    def _match(self, groups: Sequence[Mapping[str, Any]], searching: bool) -> None:
        """Follow param groups that were added or removed.

        The rate given with an added one is the one it gets now; during a search it is one of the rates given.
        """
        if list(map(id, groups)) == self._groups:
            return
        places = {key: place for place, key in enumerate(self._groups)}
        known = [places.get(id(group)) for group in groups]
        if len(groups) == len(self._groups) and all(place is None for place in known):
            known = list(range(len(groups)))  # the same groups, loaded anew
        now = rates_in(groups)
        factor = 1.0 if searching else self.factor
        self.scheduled, self.peaks, self.written = (
            [new / share if place is None else rates[place] for place, new in zip(known, now, strict=True)]
            for rates, share in ((self.scheduled, factor), (self.peaks, factor), (self.written, 1.0))
        )
        self.belong_to(groups)
