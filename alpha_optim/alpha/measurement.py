"""Parabola along a step -> the normalized step length alpha, its error and what it means.

Alpha = t / t_min - 1, with t the length of the step and t_min the distance to the minimum of the
parabola. Written with the slopes at both ends it is alpha = -f'(t) / f'(0): no division by the
curvature, so a straight or nearly straight line is an ordinary case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from alpha_optim.alpha.quadratic_fit import fit_quadratic
from alpha_optim.alpha.records import AlphaStatus, Information, Observation, QuadraticFit


@dataclass(frozen=True)
class AlphaMeasurement:
    """Alpha of one step, and everything it was computed from.

    Attributes:
        iteration: Iteration n whose step was measured.
        alpha: Pure number. -1: no move, 0: in the minimum, 1: the mirror point of the start.
        alpha_std: Standard error of alpha from the noise of losses and slopes; nan if not known.
            It does not contain the bias that start slope and step come from the same batch.
        status: What ``alpha`` means, see `AlphaStatus`.
        information: ``"slopes"``, ``"slopes+variances"`` or ``"full"``: what alpha came from.
        step_length: Length of the step over all parameters together, in parameter distance.
        loss_start: Mean loss of batch n at its parameters; nan if not observed.
        loss_end: Mean loss of batch n+1 at the parameters after the step; nan if not observed.
        slope_start: Mean slope along the step at its start, in loss per parameter distance.
        slope_end: The same at its end, on batch n+1.
        loss_variance_start: Variance of one sample's loss (ddof=1) at the start.
        loss_variance_end: The same at the end.
        slope_variance_start: Variance of one sample's slope (ddof=1) at the start.
        slope_variance_end: The same at the end.
        samples_start: Number of samples N in batch n; 0 if not observed.
        samples_end: Number of samples in batch n+1; 0 if not observed.
        fitted_slope_start: Slope of the fitted parabola at the start.
        fitted_slope_end: Slope of the fitted parabola at the end.
        lr: Effective learning rate of the step, one per param group.
    """

    iteration: int
    alpha: float
    alpha_std: float
    status: AlphaStatus
    information: Information
    step_length: float
    loss_start: float
    loss_end: float
    slope_start: float
    slope_end: float
    loss_variance_start: float
    loss_variance_end: float
    slope_variance_start: float
    slope_variance_end: float
    samples_start: int
    samples_end: int
    fitted_slope_start: float
    fitted_slope_end: float
    lr: tuple[float, ...]

    def __float__(self) -> float:
        """Return alpha."""
        return self.alpha

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return Fieller's confidence interval of alpha.

        It holds also where the start slope is uncertain; there it may be unbounded.

        Args:
            level: Probability that the interval covers the true alpha of the step's direction.

        Returns:
            Lower and upper end (pure numbers); nan where the noise is not known.
        """
        start, end = self._observations()
        if self.status in (AlphaStatus.NOT_FINITE, AlphaStatus.NO_STEP):
            return (math.nan, math.nan)
        return fieller_interval(fit_quadratic(self.step_length, start, end), level)

    def _observations(self) -> tuple[Observation, Observation]:
        """Return both ends, with None for what did not enter this measurement."""
        slopes_noisy = self.information is not Information.SLOPES
        full = self.information is Information.FULL
        return (
            Observation(
                self.samples_start,
                self.slope_start,
                self.slope_variance_start if slopes_noisy else None,
                self.loss_start if full else None,
                self.loss_variance_start if full else None,
            ),
            Observation(
                self.samples_end,
                self.slope_end,
                self.slope_variance_end if slopes_noisy else None,
                self.loss_end if full else None,
                self.loss_variance_end if full else None,
            ),
        )


def measure_alpha(
    iteration: int, step_length: float, start: Observation, end: Observation, lr: tuple[float, ...]
) -> AlphaMeasurement:
    """Measure alpha of one step from what was observed at its two ends.

    Args:
        iteration: Iteration of the start.
        step_length: Length of the step in parameter distance; 0 if the parameters did not move.
        start: Observed at the start, slopes along the unit step direction.
        end: Observed at the end, on the next batch.
        lr: Effective learning rate of the step, one per param group.

    Returns:
        The measurement. ``alpha`` is nan for NOT_FINITE and DEGENERATE, -1 for NO_STEP and CONCAVE.
    """
    information = information_of(start, end)
    nan = math.nan
    fit = QuadraticFit(step_length, nan, nan, (nan, nan, nan))
    if not _all_finite(step_length, start, end, slopes=step_length != 0.0):
        status, alpha, std = AlphaStatus.NOT_FINITE, nan, nan
    elif step_length == 0.0:
        status, alpha, std = AlphaStatus.NO_STEP, -1.0, nan
    else:
        used = (start, end) if information is Information.FULL else (_slopes_only(start), _slopes_only(end))
        fit = fit_quadratic(step_length, *used)
        status, alpha, std = _alpha_of(fit)
    return AlphaMeasurement(
        iteration=iteration,
        alpha=alpha,
        alpha_std=std,
        status=status,
        information=information,
        step_length=step_length,
        loss_start=_or_nan(start.loss),
        loss_end=_or_nan(end.loss),
        slope_start=start.slope,
        slope_end=end.slope,
        loss_variance_start=_or_nan(start.loss_variance),
        loss_variance_end=_or_nan(end.loss_variance),
        slope_variance_start=_or_nan(start.slope_variance),
        slope_variance_end=_or_nan(end.slope_variance),
        samples_start=start.samples,
        samples_end=end.samples,
        fitted_slope_start=fit.slope_start,
        fitted_slope_end=fit.slope_end,
        lr=lr,
    )


def information_of(start: Observation, end: Observation) -> Information:
    """Say what was observed at both ends."""
    if start.slope_variance is None or end.slope_variance is None:
        return Information.SLOPES
    if _has_noisy_loss(start) and _has_noisy_loss(end):
        return Information.FULL
    return Information.WITH_VARIANCES


def fieller_interval(fit: QuadraticFit, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the ratio -slope_end / slope_start (Fieller 1954).

    Args:
        fit: Fitted slopes and their covariance.
        level: Coverage probability, in (0, 1).

    Returns:
        The two ends. (-inf, inf) where the start slope cannot be told from zero at this level;
        (nan, nan) where the noise is not known.

    Raises:
        ValueError: If ``level`` is not strictly between 0 and 1.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}; try 0.95")
    if not all(math.isfinite(entry) for entry in fit.covariance):
        return (math.nan, math.nan)
    # In units of the larger slope, so that no square over- or underflows.
    unit = max(abs(fit.slope_start), abs(fit.slope_end)) or 1.0
    start, end = fit.slope_start / unit, fit.slope_end / unit
    var_start, cov, var_end = (entry / unit / unit for entry in fit.covariance)
    z2 = NormalDist().inv_cdf(0.5 + level / 2.0) ** 2
    # (end + a start)^2 <= z^2 (var_end + 2 a cov + a^2 var_start), solved for a.
    square, half_linear, constant = (
        start * start - z2 * var_start,
        end * start - z2 * cov,
        end * end - z2 * var_end,
    )
    discriminant = half_linear * half_linear - square * constant
    if square <= 0.0 or discriminant < 0.0:
        return (-math.inf, math.inf)
    root = math.sqrt(discriminant)
    return ((-half_linear - root) / square, (-half_linear + root) / square)


def _alpha_of(fit: QuadraticFit) -> tuple[AlphaStatus, float, float]:
    """Status, alpha and standard error of a finite fit of a step that moved."""
    if fit.slope_start == 0.0:
        return AlphaStatus.DEGENERATE, math.nan, math.nan
    alpha = -fit.slope_end / fit.slope_start
    var_start, cov, var_end = (entry / fit.slope_start / fit.slope_start for entry in fit.covariance)
    std = math.sqrt(max(0.0, var_end + alpha * (alpha * var_start + 2.0 * cov)))
    if math.isnan(var_start):
        std = math.nan
    if not math.isfinite(alpha):
        return AlphaStatus.DEGENERATE, math.nan, math.nan
    if fit.slope_end < fit.slope_start:
        return AlphaStatus.CONCAVE, -1.0, std
    if fit.slope_start > 0.0:
        return AlphaStatus.ASCENT, alpha, std
    return AlphaStatus.MEASURED, alpha, std


def _all_finite(step_length: float, start: Observation, end: Observation, slopes: bool) -> bool:
    values = [step_length]
    for seen in (start, end):
        optional = [seen.loss, seen.loss_variance]
        if slopes:  # along a step of length zero slopes are 0/0
            optional += [seen.slope, seen.slope_variance]
        values += [value for value in optional if value is not None]
    return all(math.isfinite(value) for value in values)


def _has_noisy_loss(seen: Observation) -> bool:
    return seen.loss is not None and seen.loss_variance is not None


def _slopes_only(seen: Observation) -> Observation:
    return Observation(seen.samples, seen.slope, seen.slope_variance)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
