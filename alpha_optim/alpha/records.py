"""Frozen records that pass between the stages, and the status of a measurement.

Imports nothing of the package, so that every stage may import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Code(str, Enum):
    """A string out of a few, equal to and printed as that string."""

    def __str__(self) -> str:
        """Return the plain value, e.g. ``"measured"``."""
        return str(self.value)


class AlphaStatus(Code):
    """What a measured alpha means; the first that applies, in this order."""

    NOT_FINITE = "not_finite"
    NO_STEP = "no_step"
    DEGENERATE = "degenerate"
    CONCAVE = "concave"
    ASCENT = "ascent"
    MEASURED = "measured"

    @property
    def explanation(self) -> str:
        """One sentence for users: what happened, and what alpha is then."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    AlphaStatus.NOT_FINITE: "A loss, slope or variance was not finite; alpha is nan.",
    AlphaStatus.NO_STEP: "The optimizer did not move the parameters; alpha is -1.",
    AlphaStatus.DEGENERATE: "The fitted start slope is zero; alpha is undefined (nan).",
    AlphaStatus.CONCAVE: "The loss is concave along the step, its slope falls to the end; alpha is -1.",
    AlphaStatus.ASCENT: "The fit says that the step went uphill from its start.",
    AlphaStatus.MEASURED: "The parabola has a minimum along the step.",
}


class Information(Code):
    """What alpha was computed from."""

    SLOPES = "slopes"
    WITH_VARIANCES = "slopes+variances"
    FULL = "full"


class DropReason(Code):
    """Why a pair of iterations was not measured."""

    PARAMETERS_CHANGED = "parameters_changed"
    GRADIENTS_MODIFIED = "gradients_modified"
    DIRECTION_OVERWRITTEN = "direction_overwritten"
    STEP_SKIPPED = "step_skipped"
    NO_BACKWARD = "no_backward"
    EXCEPTION = "exception"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    OTHER_RANK = "other_rank"
    RESTORED = "restored"
    EVICTED = "evicted"


class GuardReason(Code):
    """Why the guard acted."""

    LOSS_NOT_FINITE = "loss_not_finite"
    GRADIENT_NOT_FINITE = "gradient_not_finite"
    STATE_NOT_FINITE = "state_not_finite"
    LOSS_ROSE = "loss_rose"
    LOSS_DRIFTED = "loss_drifted"  # this and the next only in runs of version 0.1
    POLICY_RETURNED = "policy_returned"
    NO_EFFECT = "no_effect"

    @property
    def explanation(self) -> str:
        """What happened, in a few words for users."""
        return _REASONS[self]


_REASONS = {
    GuardReason.LOSS_NOT_FINITE: "the loss is not finite",
    GuardReason.GRADIENT_NOT_FINITE: "a gradient is not finite",
    GuardReason.STATE_NOT_FINITE: "a parameter or buffer is no longer finite",
    GuardReason.LOSS_ROSE: "the loss rose far beyond what consecutive losses differ by",
    GuardReason.LOSS_DRIFTED: "the loss rose over many steps of a search",
    GuardReason.POLICY_RETURNED: "the search has seen enough and goes back",
    GuardReason.NO_EFFECT: "going back did not help, so it was not the step",
}


_BROKEN = (GuardReason.LOSS_NOT_FINITE, GuardReason.GRADIENT_NOT_FINITE)


@dataclass(frozen=True)
class Observation:
    """What one mini-batch says about one end of a step.

    Attributes:
        samples: Number of samples N in the batch.
        slope: Mean slope of the loss along the step direction, in loss per parameter distance.
        slope_variance: Variance of one sample's slope (ddof=1), or None if not observed.
        loss: Mean loss, or None if not observed.
        loss_variance: Variance of one sample's loss (ddof=1), or None if not observed.
    """

    samples: int
    slope: float
    slope_variance: float | None = None
    loss: float | None = None
    loss_variance: float | None = None


@dataclass(frozen=True)
class QuadraticFit:
    """A parabola along one step, told by its slopes at both ends.

    The two slopes determine the parabola up to a constant, and alpha is minus their ratio.

    Attributes:
        step_length: Length t of the step, in parameter distance.
        slope_start: Fitted slope at the start f'(0) = w1, in loss per parameter distance.
        slope_end: Fitted slope at the end f'(t) = w1 + 2 w2 t, same unit.
        covariance: (var of slope_start, covariance, var of slope_end), squared unit of a slope;
            nan where the noise is not known.
    """

    step_length: float
    slope_start: float
    slope_end: float
    covariance: tuple[float, float, float]

    @property
    def half_curvature(self) -> float:
        """The coefficient w2 of f(x) = w0 + w1 x + w2 x^2, in loss per squared distance."""
        return (self.slope_end - self.slope_start) / (2.0 * self.step_length)


@dataclass(frozen=True)
class GuardEvent:
    """Something that the guard did.

    Attributes:
        iteration: The iteration in progress.
        reason: Why, one of `GuardReason`.
        loss_before: Loss before the step that was judged (nan if not observed).
        loss_after: Loss after it.
        restored: Whether parameters and buffers were put back to the point before that step.
        scale_factor: By what the scheduler multiplied the learning rates.
        skipped: Whether the batch was not used for a step.
    """

    iteration: int
    reason: GuardReason
    loss_before: float
    loss_after: float
    restored: bool
    scale_factor: float = 1.0
    skipped: bool = True

    def __post_init__(self) -> None:
        """Take the reason by its value, too, as a state dict holds it."""
        object.__setattr__(self, "reason", GuardReason(self.reason))

    def __str__(self) -> str:
        """Return one line: when, why, what was done."""
        losses = f"loss {self.loss_before:.4g} -> {self.loss_after:.4g}"
        if math.isnan(self.loss_before):  # not known
            unseen = math.isnan(self.loss_after) and self.reason is not GuardReason.LOSS_NOT_FINITE
            losses = "loss not known" if unseen else f"loss {self.loss_after:.4g}"
        if self.restored:
            # A first batch that is not finite is skipped, an event before this one; the next one is told of as such.
            done = "again, so the step before was taken back" if self.reason in _BROKEN else "the step was taken back"
        elif self.skipped:
            done = "batch skipped"
        else:
            done = "the batch is used" if math.isfinite(self.loss_after) else "skipped by a gradient scaler"
        rate = "" if self.scale_factor == 1.0 else f", learning rate times {self.scale_factor:g}"
        return f"iteration {self.iteration}: {self.reason.explanation}, {losses}, {done}{rate}"
