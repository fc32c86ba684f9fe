"""What alpha says so far, in plain words.

Deliberately cautious. The sign of alpha is only trusted where it differs from zero by its own error:
start slope and step come from the same batch, which pushes alpha of small batches towards zero at any
rate, and above the best rate alpha hardly says how much too large a rate is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alpha_optim.alpha import AlphaMeasurement
from alpha_optim.history import AlphaHistory
from alpha_optim.records import AlphaStatus, GuardEvent

WINDOW = 100
FEWEST = 20
CERTAIN = 2.0
"""How many standard errors make a difference."""
SHORT = -0.1
FAR = 0.8
LARGE = 32

_ADVICE = {
    "undershooting": "Steps end short of the minimum along their direction: the learning rate can grow.",
    "balanced": "Steps end near or a little beyond the minimum along their direction, as in good runs.",
    "overshooting": "Steps end far beyond the minimum along their direction: lower the learning rate.",
    "diverging": "The loss rises or is not finite: lower the learning rate, by 10 to begin with.",
    "unknown": "The measurements do not tell: too few, too noisy, or batches too small for the sign of alpha.",
}


@dataclass(frozen=True)
class Diagnosis:
    """What alpha says over the last measurements.

    Attributes:
        verdict: ``"undershooting"``, ``"balanced"``, ``"overshooting"``, ``"diverging"`` or ``"unknown"``.
        alpha: Alpha over the window, a pure number; nan without measurements.
        alpha_std: Its standard error.
        count: Number of measurements in the window.
        suggested_lr: A learning rate for the first param group, or None when the data cannot tell.
    """

    verdict: str
    alpha: float
    alpha_std: float
    count: int
    suggested_lr: float | None = None

    def __str__(self) -> str:
        """Advice in plain words."""
        measured = f"alpha = {self.alpha:+.2f} ± {self.alpha_std:.2f} over {self.count} steps"
        rate = "" if self.suggested_lr is None else f" Suggested learning rate: {self.suggested_lr:.2g}."
        return f"{self.verdict}: {_ADVICE[self.verdict]} ({measured}){rate}"


def diagnose(history: AlphaHistory, events: Sequence[GuardEvent] = ()) -> Diagnosis:
    """Judge the last measurements of a history.

    Args:
        history: Measurements of a run.
        events: What the guard did in that run.

    Returns:
        The diagnosis; often ``"unknown"``, never a guess.
    """
    recent = history[-WINDOW:]
    alpha, std, count = history.windowed(WINDOW)
    if _diverges(recent, events):
        return Diagnosis("diverging", alpha, std, count)
    if count < FEWEST or not math.isfinite(std):
        return Diagnosis("unknown", alpha, std, count)
    if alpha + CERTAIN * std < SHORT:
        return Diagnosis("undershooting", alpha, std, count)
    if alpha - CERTAIN * std > FAR:
        return Diagnosis("overshooting", alpha, std, count)
    large = bool(recent) and sorted(item.samples_start for item in recent)[len(recent) // 2] >= LARGE
    # Near 0 means a good rate for large batches, and nothing at all for tiny ones.
    if alpha - CERTAIN * std > (SHORT if large else 0.0):
        return Diagnosis("balanced", alpha, std, count)
    return Diagnosis("unknown", alpha, std, count)


def _diverges(recent: Sequence[AlphaMeasurement], events: Sequence[GuardEvent]) -> bool:
    """Whether the loss is not finite, or its level rose over the window beyond its scatter."""
    if recent and recent[-1].status is AlphaStatus.NOT_FINITE:
        return True
    if events and recent and sum(event.iteration >= recent[0].iteration for event in events) > 3:
        return True
    losses = np.array([item.loss_start for item in recent])
    losses = losses[np.isfinite(losses)]
    if len(losses) < FEWEST:
        return False
    half = len(losses) // 2
    early, late = losses[:half], losses[half:]
    noise = math.sqrt(early.var(ddof=1) / len(early) + late.var(ddof=1) / len(late))
    return bool(late.mean() - early.mean() > 4.0 * noise)
