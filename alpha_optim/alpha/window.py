"""Alpha over several steps: a ratio of sums, and its error.

Single alphas are ratios with heavy tails; their mean says little. Over a window

    alpha = - sum t f'(t) / sum t f'(0),

with the fitted slopes times the step length of each step. Concave steps enter unclamped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from alpha_optim.alpha.loss_level import Level, quantile
from alpha_optim.alpha.measurement import AlphaMeasurement

CHANCE = 0.025
"""Probability that steps have raised the loss by more than is taken for the most: two standard errors of many."""


class WindowAlpha(NamedTuple):
    """Alpha over several steps.

    Attributes:
        alpha: Minus the ratio of the summed end slopes to the summed start slopes.
        alpha_std: Its standard error from the scatter of the steps; nan for fewer than two.
        count: How many measurements entered.
    """

    alpha: float
    alpha_std: float
    count: int  # type: ignore[assignment] # - hides tuple.count, on purpose


def rises_of(measurement: AlphaMeasurement) -> tuple[float, float] | None:
    """Fitted slopes at both ends times the step length, in units of the loss; None if not finite."""
    start = measurement.fitted_slope_start * measurement.step_length
    end = measurement.fitted_slope_end * measurement.step_length
    return (start, end) if math.isfinite(start) and math.isfinite(end) else None


def ratio_of_sums(rises: Sequence[tuple[float, float]]) -> WindowAlpha:
    """Alpha over steps of which the rises at both ends are known."""
    total, count = math.fsum(start for start, _ in rises), len(rises)
    if total == 0.0:
        return WindowAlpha(math.nan, math.nan, count)
    alpha = -math.fsum(end for _, end in rises) / total
    if count < 2:
        return WindowAlpha(alpha, math.nan, count)
    scatter = math.hypot(*(end + alpha * start for start, end in rises))
    return WindowAlpha(alpha, math.sqrt(count / (count - 1)) * scatter / abs(total), count)


def rise_of_steps(ends: Level, steps: int, chance: float = CHANCE) -> float:
    """By how much steps can have raised the loss, at most.

    Along a line on which the loss is convex a step raises it by no more than the slope at its end times its length; and
    the loss at the end of a step is that of another batch than the step was made from.

    Args:
        ends: Slope at the end times length of the steps that were measured.
        steps: Steps made, the newest of which cannot be measured yet; infinite is the answer where fewer than half of
            them were.
        chance: Probability that it was more; 0.5 for what is most likely.
    """
    if ends.count < 3 or 2 * (ends.count + 1) < steps:
        return math.inf
    return steps * (ends.mean + quantile(ends.count - 1, chance) * ends.error)


def rises_by_itself(rise: float, most: float) -> bool:
    """Whether more than half of a rise of the loss has other causes than the steps made meanwhile: the data, say.

    Args:
        rise: By how much the loss has risen.
        most: By how much the steps can have raised it; see `rise_of_steps`.
    """
    return most < 0.5 * rise


def window_alpha(measurements: Iterable[AlphaMeasurement]) -> WindowAlpha:
    """Alpha over measurements; those without finite slopes do not enter.

    Args:
        measurements: The measurements of the window.

    Returns:
        ``(alpha, alpha_std, count)``. For one measurement the error is its own.
    """
    usable = [(item, rises) for item in measurements if (rises := rises_of(item)) is not None]
    window = ratio_of_sums([rises for _, rises in usable])
    return window._replace(alpha_std=usable[0][0].alpha_std) if len(usable) == 1 else window
