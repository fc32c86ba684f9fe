"""Alpha over several steps: a ratio of sums, and its error.

Single alphas are ratios with heavy tails; their mean says little. Over a window

    alpha = - sum t f'(t) / sum t f'(0),

with the fitted slopes times the step length of each step. Concave steps enter unclamped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from alpha_optim.alpha.measurement import AlphaMeasurement


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
