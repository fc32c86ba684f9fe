"""How long the parts of a search may be, by the length of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHARE = 0.04
TURNS = 2500
"""A trial takes this share of runs of up to so many steps; of longer ones it grows with the root of their length, so
that a search costs less of them."""
FEW, MOST_SHARE = 24, 0.06
"""A trial has so many steps at least, as long as that is no more than this share of the run: ten losses are its score,
and of a trial of 16 steps most of those were made at rates that had hardly fallen. Such trials find rates that are too
high where a run lives by its decay."""
SHORTEST = 10
"""Shorter trials say nothing: where the share of the run is less there are none."""
BUDGET = 0.35
"""No trial begins when this share of the run would be over at its end."""
MOST_TRIALS = 5
LONGEST_CLIMB = 0.2
"""A climb ends after this share of the run, or `SLOWEST` steps in short runs, whatever the loss did."""
SLOWEST = 50
HIGHEST = 60.0
"""No log rate above this is asked for, bound or not."""
SHORTEST_RUN = 100
"""In shorter runs nothing is searched."""


@dataclass(frozen=True)
class Settings:
    """What the phases of a search know of the run.

    Attributes:
        total_steps: Length of the run.
        trial: Length of a trial.
        around: Whether only rates near the one given are tried.
        by_steps: Whether losses are heard of with every step, not with measurements only.
        most_trials: Number of trials at most.
        highest: Highest log rate that is allowed.
    """

    total_steps: int
    trial: int
    around: bool = False
    by_steps: bool = False
    most_trials: int = MOST_TRIALS
    highest: float = HIGHEST

    @property
    def longest_climb(self) -> int:
        """Steps of a climb at most."""
        return max(SLOWEST, int(LONGEST_CLIMB * self.total_steps))

    def allows(self, steps: int) -> bool:
        """Whether a trial may begin after so many steps."""
        return self.trial >= SHORTEST and steps + self.trial <= BUDGET * self.total_steps


def trial_length(total_steps: int) -> int:
    """Steps of a trial in a run of this length."""
    usual = SHARE * min(total_steps, math.sqrt(TURNS * total_steps))
    return round(usual if usual < SHORTEST else min(max(usual, FEW), MOST_SHARE * total_steps))
