"""What alpha says so far, in plain words.

Deliberately cautious. The sign of alpha is only trusted where it differs from zero by its own error:
start slope and step come from the same batch, which pushes alpha of small batches towards zero at any
rate, and above the best rate alpha hardly says how much too large a rate is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import numpy as np

from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.loss_trace import RESOLUTION, SURELY, LossTrace, room_above
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import AlphaStatus, GuardEvent, GuardReason
from alpha_optim.alpha.window import WindowAlpha, window_alpha

WINDOW = 100
FEWEST = 20
CERTAIN = 2.0
"""How many standard errors make a difference."""
BEYOND = 0.3
"""Above that most steps end beyond the minimum."""
RISES = 3.0
"""Standard errors by which the last quarter of a window lies above the one before, if the loss rises: once in a
thousand by chance, since every run is asked, most of them many times."""
SHORT = -0.1
FAR = 0.8
LARGE = 32
CLIMB = math.log(100.0)
"""A rate that rose by this factor, step by step, says where the loss was lowest and where it began to rise."""

LOWERED, NEAR = 0.5, 0.8
"""Below the first share of a rate that only fell steps are meant to fall short; those above the second tell of it."""

TAKEN_BACK = 3
"""More steps than this taken back within the window are a sign of divergence."""
BROKEN = "The loss is not finite."
"""Why a run diverges, or seems to: a batch may be to blame."""


@dataclass(frozen=True)
class Diagnosis:
    """What alpha says over the last measurements.

    Attributes:
        verdict: ``"undershooting"``, ``"balanced"``, ``"overshooting"``, ``"diverging"`` or ``"unknown"``.
        alpha: Alpha over the window, a pure number; nan without measurements. The window is that of the last steps, or
            where the rate has been lowered since (annealed), that of the steps before.
        alpha_std: Its standard error.
        count: Number of measurements in the window.
        cause: What led to the verdict and what to do, in a sentence or two.
        suggested_lr: A learning rate for the first param group to begin a decay with, or None when the data
            cannot tell or contradict the verdict. They can if losses were measured while the rate climbed until the
            loss rose, as in a long warm-up, or in a trial run with a growing rate; not in the search of an
            `AlphaScheduler`, which has tried out more than its climb.
    """

    verdict: str
    alpha: float
    alpha_std: float
    count: int
    cause: str = ""
    suggested_lr: float | None = None

    def __str__(self) -> str:
        """Advice in plain words."""
        if self.count == 0:
            return f"{self.verdict}: {self.cause}"
        measured = f"alpha = {self.alpha:+.2f} ± {self.alpha_std:.2f} over {self.count} steps"
        rate = "" if self.suggested_lr is None else f" Suggested learning rate: {self.suggested_lr:.2g}."
        return f"{self.verdict}: {self.cause} ({measured}){rate}"


def diagnose(history: AlphaHistory, events: Sequence[GuardEvent] = ()) -> Diagnosis:
    """Judge the last measurements of a history.

    Args:
        history: Measurements of a run.
        events: What the guard did in that run.

    Returns:
        The diagnosis; often ``"unknown"``, never a guess.
    """
    recent = history.lasting(WINDOW)
    window, diverges = window_alpha(recent), _diverges(recent, events)
    falls_short = _surely_short(window)
    before = [] if diverges or not _may_fall_short_on_purpose(recent, window) else _before_lowering(history)
    if before:
        recent = before[-WINDOW:]
        window = window_alpha(recent)
    verdict, cause = ("diverging", diverges) if diverges else _verdict(history, recent, window)
    if before and verdict == "unknown" and SHORT <= window.alpha <= FAR and _fell_since(history, recent):
        verdict, cause = "balanced", f"{_steps_end(window.alpha)}; the loss has fallen with the rate since."
    if before:
        first, last = (f"{item.lr[0]:.2g}" for item in (recent[0], recent[-1]))
        rates = f"a learning rate of {first}" if first == last else f"learning rates from {first} to {last}"
        so = ", which makes steps fall short" if falls_short else ""
        cause = (
            f"At {rates}, up to iteration {recent[-1].iteration}: {cause[0].lower()}{cause[1:]} Since then the rate "
            f"was lowered further{so}."
        )
    suggested = rate_from_climbs(history.lasting())  # a search that took its climb back has found a rate itself
    if suggested is not None and not _agrees(verdict, suggested, recent):
        suggested = None
    if verdict == "diverging":
        lower = recent[-1].lr[0] / 10.0 if suggested is None and recent and recent[-1].lr else math.nan
        advice = (
            f"lower the learning rate, to {lower:.2g} to begin with." if lower > 0.0 else "lower the learning rate."
        )
        if cause == BROKEN:  # by the rate, or by a batch
            advice = f"look for nan and inf in the data and in the parameters. If there are none, {advice}"
        cause += f" {advice[0].upper()}{advice[1:]}"
    return Diagnosis(verdict, *window, cause, suggested)


def _verdict(
    history: AlphaHistory,
    recent: Sequence[AlphaMeasurement],
    window: WindowAlpha,
) -> tuple[str, str]:
    """The verdict on a window that does not diverge, and the one cause that applied."""
    alpha, std, count = window
    if count == 0 and recent:
        kinds = Counter(str(item.status) for item in recent).most_common()
        return "unknown", f"None of the last {len(recent)} steps can be judged: " + ", ".join(
            f"{number} {status}" for status, number in kinds
        ) + "."  # fmt: skip
    if count == 0:
        return "unknown", "Nothing has been measured yet; an alpha is known after two steps."
    if count < FEWEST or not math.isfinite(std):
        return "unknown", f"Too few measurements: {FEWEST} are needed."
    if _surely_short(window):
        unseen = " No losses are seen, so whether the model still learns is not known." if _unseen(recent) else ""
        return "undershooting", (
            f"Steps end short of the minimum along their direction: the learning rate can grow.{unseen}"
        )
    if alpha - CERTAIN * std > FAR:
        return "overshooting", "Steps end far beyond the minimum along their direction: lower the learning rate."
    if alpha > FAR:
        return "unknown", (
            "Steps end far beyond the minimum along their direction, most likely; alpha is not known well enough to be "
            "sure. A lower learning rate may do better."
        )
    large = bool(recent) and sorted(item.samples_start for item in recent)[len(recent) // 2] >= LARGE
    # Near 0 means a good rate for large batches, and nothing at all for tiny ones.
    if not alpha - CERTAIN * std > (SHORT if large else 0.0):
        if large and alpha + CERTAIN * std < 0.0:
            return "unknown", (
                "Steps end a little short of the minimum along their direction, as they do at good learning rates and "
                "at rates that are a little too low."
            )
        return "unknown", (
            "Alpha is not known well enough to tell." if large
            else "Batches this small tell little: their alpha is near 0 at low and at good learning rates alike."
        )  # fmt: skip
    if _is_where_it_began(history, recent):
        return "unknown", "The loss is no lower than at the beginning: the learning rate may be far too high."
    trend = _trend(recent)
    if trend is _Trend.RISES_AGAIN:
        return "unknown", (
            "The loss fell and rises again since: the learning rate may have become too high, which alpha does not "
            "show. Lower it to find out."
        )
    if trend is _Trend.STANDS and _lowered(recent[0], history[-1]):
        return "unknown", "The loss no longer fell, and the rate has been lowered."
    if trend is _Trend.STANDS:
        return "unknown", (
            "The loss no longer falls: training is done at this learning rate, or the rate is too high, which alpha "
            "does not show. Lower it to find out."
        )
    if trend is _Trend.UNSEEN:
        return "unknown", f"{_steps_end(alpha)}; whether the loss falls is not known, since no losses are seen."
    falls = trend is _Trend.FALLS
    said = ", and the loss falls." if falls else "; these are too few steps to tell whether the loss falls."
    return "balanced", f"{_steps_end(alpha)}{said}"


def _surely_short(window: WindowAlpha) -> bool:
    """Whether steps surely end short of the minimum along their direction."""
    return window.alpha + CERTAIN * window.alpha_std < SHORT


def _unseen(recent: Sequence[AlphaMeasurement]) -> bool:
    """Whether losses of a window are not known."""
    return any(not math.isfinite(item.loss_start) for item in recent)


def _lowered(early: AlphaMeasurement, late: AlphaMeasurement) -> bool:
    """Whether the rate was lowered by half at least in between."""
    return bool(early.lr and late.lr) and late.lr[0] < LOWERED * early.lr[0]


def _may_fall_short_on_purpose(recent: Sequence[AlphaMeasurement], window: WindowAlpha) -> bool:
    """Whether the rate falls over the window, or its steps surely fall short: else they tell of the rate they have."""
    rates = [item.lr[0] for item in recent if item.lr]
    return _surely_short(window) or (bool(rates) and rates[-1] < rates[0])


def _before_lowering(history: AlphaHistory) -> list[AlphaMeasurement]:
    """Measurements near the learning rate that has been lowered since, by half at least; empty if it has not."""
    falling: list[AlphaMeasurement] = []  # the newest first
    for item in reversed(history.lasting()):
        if not item.lr or (falling and not item.lr[0] >= falling[-1].lr[0]):
            break
        falling.append(item)
    if not falling or not _lowered(falling[-1], falling[0]):
        return []
    before = [item for item in reversed(falling) if item.lr[0] >= NEAR * falling[-1].lr[0]]
    return before if len(before) >= FEWEST else []


def _agrees(verdict: str, suggested: float, recent: Sequence[AlphaMeasurement]) -> bool:
    """Whether a learning rate does not contradict a verdict on steps made at another."""
    now = recent[-1].lr[0] if recent and recent[-1].lr else math.nan
    return {"diverging": suggested < now, "overshooting": suggested < now, "undershooting": suggested > now}.get(
        verdict, True
    )


def _halves(losses: np.ndarray) -> tuple[float, float]:
    """By how much the second half of losses lies above the first, and the standard error of that."""
    half = len(losses) // 2
    return _rise(losses[:half], losses[half:])


def _rise(early: np.ndarray, late: np.ndarray) -> tuple[float, float]:
    """By how much later losses lie above earlier ones, and the standard error of that."""
    noise = math.sqrt(early.var(ddof=1) / len(early) + late.var(ddof=1) / len(late))
    return float(late.mean() - early.mean()), noise


def _steps_end(alpha: float) -> str:
    """Where steps end that are neither too short nor far too long."""
    where = "near or a little beyond" if alpha <= BEYOND else "beyond, but not far beyond,"
    return f"Steps end {where} the minimum along their direction"


class _Trend(Enum):
    """Where the losses of a window go."""

    FALLS = "falls"
    STANDS = "stands"
    RISES_AGAIN = "rises again"
    NOT_KNOWN = "not known"
    UNSEEN = "unseen"


def _trend(recent: Sequence[AlphaMeasurement]) -> _Trend:
    """Say where the loss goes; that it stands, or not yet, only a full window tells."""
    losses = np.array([item.loss_start for item in recent])
    if _unseen(recent):
        return _Trend.UNSEEN
    rise, noise = _halves(losses[len(losses) // 2 :])
    if rise > RISES * noise:
        return _Trend.RISES_AGAIN
    rise, noise = _halves(losses)
    if rise <= -CERTAIN * noise:
        return _Trend.FALLS
    return _Trend.STANDS if len(losses) >= WINDOW else _Trend.NOT_KNOWN


def _fell_since(history: AlphaHistory, recent: Sequence[AlphaMeasurement]) -> bool:
    """Whether the latest losses surely lie below those of an earlier window: what it could not tell is settled."""
    early = np.array([item.loss_start for item in recent])
    late = np.array([item.loss_start for item in history.lasting(WINDOW) if item.iteration > recent[-1].iteration])
    if min(len(early), len(late)) < FEWEST or not (np.isfinite(early).all() and np.isfinite(late).all()):
        return False
    rise, noise = _rise(early, late)
    return rise < -RISES * noise


def _is_where_it_began(history: AlphaHistory, recent: Sequence[AlphaMeasurement]) -> bool:
    """Whether the loss is no lower than at the first step: alpha of a spoilt network may look like any."""
    if len(history) < WINDOW or history[0].iteration >= WINDOW:  # too short, or its beginning is not known
        return False
    first, losses = history[0].loss_start, np.array([item.loss_start for item in recent])
    scatter = float(np.diff(losses).std(ddof=1)) / math.sqrt(2.0)  # of a single loss, as the first one is
    return bool(first - losses.mean() < CERTAIN * scatter)  # False where a loss is nan


def rate_from_climbs(history: Sequence[AlphaMeasurement]) -> float | None:
    """Learning rate of the first param group, from the stretches in which it climbed; None if they do not tell.

    Args:
        history: Measurements of a run.

    Returns:
        The geometric mean of what the climbs say: where the loss was lowest, and a little more for large batches.
    """
    found = [rate for climb in _climbs(history) if (rate := _lowest(climb)) is not None]
    return math.exp(math.fsum(found) / len(found)) if found else None


def _climbs(history: Sequence[AlphaMeasurement]) -> list[list[AlphaMeasurement]]:
    """Stretches in which the rate never fell and grew by `CLIMB`, of measurements with losses.

    It has to grow above all rates before: else it comes back from where a guard, or a restart, has put it.
    """
    climbs: list[list[AlphaMeasurement]] = [[]]
    for item in history:
        if not (item.lr and item.lr[0] > 0.0 and math.isfinite(item.loss_start)):
            continue
        if climbs[-1] and item.lr[0] < climbs[-1][-1].lr[0]:
            climbs.append([])
        climbs[-1].append(item)
    found, highest = [], 0.0
    for climb in filter(None, climbs):
        if math.log(climb[-1].lr[0] / max(climb[0].lr[0], highest)) >= CLIMB:
            found.append(climb)
        highest = max(highest, climb[-1].lr[0])
    return found


def _lowest(climb: Sequence[AlphaMeasurement]) -> float | None:
    """Log rate to take after a climb; None if its loss did not fall, or not rise again."""
    moved = [item for last, item in pairwise(climb) if item.lr[0] > last.lr[0]]
    if len(moved) < FEWEST:
        return None
    pace = math.log(climb[-1].lr[0] / climb[0].lr[0]) / len(moved)
    trace = LossTrace(min(20, max(5, round(RESOLUTION / pace))), climb[0].loss_start)
    for item in climb:
        trace.see(item, math.log(item.lr[0]))
        if trace.risen() and trace.has_fallen(SURELY):  # else it scatters, at rates far too low
            lowest = trace.lowest()
            return None if lowest is None else lowest + room_above(climb[0].samples_start)
    return None


def _diverges(recent: Sequence[AlphaMeasurement], events: Sequence[GuardEvent]) -> str:
    """Why a run diverges: the loss is not finite, steps were taken back, or its level rose; empty if it does not."""
    if recent and recent[-1].status is AlphaStatus.NOT_FINITE:
        return BROKEN
    undone = {event.iteration for event in events if event.reason is GuardReason.NO_EFFECT}
    bad = [
        event
        for event in events
        if event.restored and event.scale_factor != 1.0 and event.iteration not in undone  # else it ended a trial
    ]
    back = sum(event.iteration >= recent[0].iteration for event in bad) if recent else 0
    if back > TAKEN_BACK:
        return f"{back} steps of the last {WINDOW} had to be taken back."
    losses = np.array([item.loss_start for item in recent])
    losses = losses[np.isfinite(losses)]
    if len(losses) < FEWEST:
        return ""
    rise, noise = _halves(losses)
    return "The loss rises." if rise > 4.0 * noise else ""
