"""The fit as tensor operations: alpha on the device that measured, without waiting for it.

The same parabola as `quadratic_fit`, for a whole batch of steps at once. What is read by people and policies
comes from there; this is for loops that must not wait for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alpha_optim.alpha.quadratic_fit import VARIANCE_FLOOR

Observed = tuple[bool, bool, bool]


def alpha_of(
    numbers: Tensor, samples: tuple[Tensor | int, Tensor | int], observed: tuple[Observed, Observed]
) -> Tensor:
    """Alpha of steps from what was observed at their two ends.

    Args:
        numbers: Length of the step, whether it moved the parameters, whether it has to be dropped, then loss,
            loss variance, slope and slope variance at the start and the same at the end, float64 ``[..., 11]``;
            variances are those of one sample.
        samples: Number of samples at start and end.
        observed: Whether loss, loss variance and slope variance were observed, at start and end.

    Returns:
        Alpha ``[...]``; nan where it is undefined or the step has to be dropped, -1 where the parameters did
        not move or the loss is concave along the step.
    """
    length, moved, dropped, *rest = numbers.unbind(-1)
    start, end = rest[:4], rest[4:]
    step = torch.where(torch.isfinite(length) & (moved == 0), 0.0, length)
    rises = step * start[2], step * end[2]
    if all(all(seen) for seen in observed):
        # A variance that is nan beside a finite slope was found to be wrong: then the slopes alone count.
        usable = ~(start[3].isnan() | end[3].isnan())
        fitted = _fitted(step, start, end, samples)
        rises = torch.where(usable, fitted[0], rises[0]), torch.where(usable, fitted[1], rises[1])
    slope_start, slope_end = rises[0] / step, rises[1] / step
    alpha = -slope_end / slope_start
    alpha = torch.where(torch.isfinite(alpha), alpha, torch.nan)
    alpha = torch.where((slope_end < slope_start) & ~alpha.isnan(), -1.0, alpha)
    alpha = torch.where(step == 0.0, -1.0, alpha)
    bad = ~torch.isfinite(length) | (dropped != 0)
    for point, seen in zip((start, end), observed, strict=True):
        bad = bad | _not_finite(step, point, seen)
    return torch.where(bad, torch.nan, alpha)


def _fitted(
    step: Tensor, start: list[Tensor], end: list[Tensor], samples: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor]:
    """Slopes of the fitted parabola at both ends, times the length of the step."""
    rise_start, rise_end = step * start[2], step * end[2]
    noise_start = step * step * _of_mean(start[3], samples[0])
    noise_end = step * step * _of_mean(end[3], samples[1])
    losses = _of_mean(start[1], samples[0]) + _of_mean(end[1], samples[1])
    residual = (end[0] - start[0]) - 0.5 * (rise_start + rise_end)
    total = losses + 0.25 * (noise_start + noise_end)
    return (
        rise_start + 0.5 * (noise_start / total) * residual,
        rise_end + 0.5 * (noise_end / total) * residual,
    )


def _of_mean(variance: Tensor, samples: Tensor | int) -> Tensor:
    """Variance of a mean, exact zeros replaced before the division."""
    return torch.where(variance == 0.0, VARIANCE_FLOOR, variance) / samples


def _not_finite(step: Tensor, point: list[Tensor], observed: Observed) -> Tensor:
    """Whether something that was observed at one end is not finite."""
    loss, loss_variance, slope, slope_variance = point
    # Along a step of length zero slopes are 0 / 0.
    bad = (step != 0.0) & ~torch.isfinite(slope)
    if observed[0]:
        bad = bad | ~torch.isfinite(loss)
    if observed[1]:
        bad = bad | ~torch.isfinite(loss_variance)
    if observed[2]:
        bad = bad | ((step != 0.0) & slope_variance.isinf())
    return bad
