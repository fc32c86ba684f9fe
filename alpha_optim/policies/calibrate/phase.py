"""What the phases of a search have in common.

A phase is a frozen record of plain values. It hears of measurements, of executed steps with their losses, and of steps
that the guard took back, and answers with an `After`: the phase that follows, perhaps itself changed, and what is to be
done with the points of training. All rates are logarithms of multiples of the rate given.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.policies.base import Place
from alpha_optim.policies.calibrate.settings import Settings


class Phase(Protocol):
    """A phase of the search."""

    @property
    def settings(self) -> Settings:
        """What is known of the run."""

    @property
    def position(self) -> float:
        """Log rate of the coming step."""

    @property
    def steps(self) -> int:
        """Steps made since the search began."""

    @property
    def factor(self) -> float:
        """What the rate of the coming step is multiplied by; 1 but in trials, which are annealed."""

    def measured(self, measurement: AlphaMeasurement, here: float) -> After:
        """A step that was made at the log rate ``here`` was measured."""

    def stepped(self, loss: float) -> After:
        """A step was made from this loss, nan if not known."""

    def exploded(self) -> After:
        """Two batches in a row were not finite, or the loss exploded."""


class Ended(NamedTuple):
    """How the best trial of a search ended.

    Attributes:
        start: Mean of the losses at the point that it started from.
        mean: Mean of its last losses, the score.
        error: Standard error of that.
        worse_from: The lowest log rate above that of trials as good as the best at which one was worse; infinite if
            there was none.
    """

    start: float
    mean: float
    error: float
    worse_from: float


class After(NamedTuple):
    """What follows from something heard.

    Attributes:
        phase: The phase from here on; None: the search is over.
        keep: Where to keep the point reached.
        restore: The point to go on from.
        found: Once the search is over: the log rate; None: the rate given is kept, and the text says why.
        highest: Once the search is over: how high the log rate may be raised.
        ended: Once the search is over: how its best trial ended; None if there was none.
        corrected: Once the search is over: whether losses correct the rate held.
        text: Something worth telling, in absolute rates where ``{...}`` stands around a log rate; empty if nothing.
    """

    phase: Phase | None
    keep: Place | None = None
    restore: Place | None = None
    found: float | None = None
    highest: float = 0.0
    ended: Ended | None = None
    corrected: bool = True
    text: str = ""


CUT_SHORT = After(
    None, restore="start", corrected=False, text="the search was cut short, and the model put back to where it began"
)
"""What follows where a run ends in its search, with no trial to go on from."""
