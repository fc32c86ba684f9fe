"""Four noisy observations of a loss along one step -> the parabola through them.

Pure maths on floats: no torch, no optimizer.

The model is f(x) = w0 + w1 x + w2 x^2 with observations f(0), f(t), f'(0), f'(t), weighted by the
inverse variances of their means (Schneider, Dangel and Hennig 2021, section 3.1 and appendix). We do
not solve the 3x3 normal equations, which are singular to rounding for very short steps. In the
variable u = x / t, and with p = t f'(0), e = t f'(t), the four observations say

    p ~ t s0,    e ~ t s1,    (p + e) / 2 ~ f1 - f0,

since w0 only absorbs the level. That is a linear least squares problem in two unknowns with three
observations, and its solution is a correction of the observed slopes by the residual of the third.
"""

from __future__ import annotations

import math

from alpha_optim.alpha.records import Observation, QuadraticFit

VARIANCE_FLOOR = 1e-10
"""Replaces a variance of one sample that is exactly zero (the value the original code uses)."""


def fit_quadratic(step_length: float, start: Observation, end: Observation) -> QuadraticFit:
    """Fit a parabola to what is known at the two ends of a step.

    With losses and all four variances it is the weighted least squares fit; otherwise the two slopes
    alone determine the parabola, and their variances, if known, its covariance.

    Args:
        step_length: Length of the step in parameter distance, finite and > 0.
        start: Mean loss and slope at the start with variances of one sample.
        end: The same at the end of the step.

    Returns:
        The fitted slopes at both ends and their covariance.

    Examples:
        f(x) = (x - 1)^2 and a step of length 1 from 0, which ends in the minimum:

        >>> start = Observation(samples=8, loss=1.0, loss_variance=1.0, slope=-2.0, slope_variance=1.0)
        >>> end = Observation(samples=8, loss=0.0, loss_variance=1.0, slope=0.0, slope_variance=1.0)
        >>> fit_quadratic(1.0, start, end).slope_end
        0.0

    References:
        Schneider, Dangel and Hennig (2021), https://arxiv.org/abs/2102.06604
    """
    rise_start, rise_end = step_length * start.slope, step_length * end.slope
    if start.slope_variance is None or end.slope_variance is None:
        return QuadraticFit(step_length, start.slope, end.slope, (math.nan, math.nan, math.nan))

    squared_length = step_length * step_length
    noise_start = squared_length * _variance_of_mean(start.slope_variance, start.samples)
    noise_end = squared_length * _variance_of_mean(end.slope_variance, end.samples)
    gain_start = gain_end = share_start = share_end = share_both = 0.0
    if (
        start.loss is not None
        and end.loss is not None
        and start.loss_variance is not None
        and end.loss_variance is not None
    ):
        residual = (end.loss - start.loss) - 0.5 * (rise_start + rise_end)
        noise_losses = _variance_of_mean(start.loss_variance, start.samples) + _variance_of_mean(
            end.loss_variance, end.samples
        )
        noise_residual = noise_losses + 0.25 * (noise_start + noise_end)
        gain_start = 0.5 * (noise_start / noise_residual) * residual
        gain_end = 0.5 * (noise_end / noise_residual) * residual
        share_start = 0.25 * (noise_start / noise_residual) * noise_start
        share_end = 0.25 * (noise_end / noise_residual) * noise_end
        share_both = 0.25 * (noise_start / noise_residual) * noise_end
    return QuadraticFit(
        step_length,
        (rise_start + gain_start) / step_length,
        (rise_end + gain_end) / step_length,
        (
            (noise_start - share_start) / squared_length,
            -share_both / squared_length,
            (noise_end - share_end) / squared_length,
        ),
    )


def _variance_of_mean(variance_of_one: float, samples: int) -> float:
    """Variance of a mean of ``samples`` values, exact zeros replaced before the division."""
    return (VARIANCE_FLOOR if variance_of_one == 0.0 else variance_of_one) / samples
