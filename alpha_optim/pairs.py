"""What is kept of one step: its two ends as a few numbers on the device, and how they become alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpha_optim.alpha import AlphaMeasurement, measure_alpha
from alpha_optim.direction import Direction
from alpha_optim.projections.statistics import sample_mean, sample_variance
from alpha_optim.records import Observation

NAN = math.nan
Observed = tuple[bool, bool, bool]


@dataclass(frozen=True)
class BatchLoss:
    """The loss of an iteration over all its backward passes.

    Attributes:
        mean: Mean loss ``[]``, or None if not observed.
        variance: Variance of one sample's loss ``[]`` (ddof=1), or None.
        samples: N, 0 if not known.
    """

    mean: Tensor | None
    variance: Tensor | None
    samples: int


@dataclass(frozen=True)
class EndPoint:
    """What was seen at one end of a step; numbers stay on the device.

    Attributes:
        numbers: loss, its variance, slope of the mean loss along d / |d|, variance of one sample's slope;
            float64 ``[4]``, nan where not observed.
        samples: N, 0 if not known.
        observed: Which of loss, its variance and the slope variance were observed.
    """

    numbers: Tensor
    samples: int
    observed: Observed


@dataclass(frozen=True)
class PendingStart:
    """A step that was made and waits for its end.

    Attributes:
        iteration: Iteration n of the start.
        direction: Parameter change of the step.
        point: What was seen at the start.
        fingerprint: Norms of the parameters as the step left them ``[L]``.
        lr: Learning rates of the step, one per group.
    """

    iteration: int
    direction: Direction
    point: EndPoint
    fingerprint: Tensor
    lr: tuple[float | Tensor, ...]


@dataclass(frozen=True)
class PendingPair:
    """Both ends of a step; becomes a measurement when somebody reads.

    Attributes:
        iteration: Iteration n of the start.
        numbers: Squared length, moved, edited, then the four numbers of the start and those of the end,
            float64 ``[11]``.
        samples: N at start and end.
        observed: What was observed at start and end, as in `EndPoint`.
        lr: Learning rates of the step, one per group.
    """

    iteration: int
    numbers: Tensor
    samples: tuple[int, int]
    observed: tuple[Observed, Observed]
    lr: tuple[float | Tensor, ...]

    @classmethod
    def of(cls, start: PendingStart, end: EndPoint, edited: Tensor) -> PendingPair:
        """Put both ends into one small tensor."""
        device = end.numbers.device
        head = small_tensor([start.direction.squared_length, start.direction.moved, edited], device)
        numbers = torch.cat([head, start.point.numbers.to(device), end.numbers])
        samples, observed = (start.point.samples, end.samples), (start.point.observed, end.observed)
        return cls(start.iteration, numbers, samples, observed, start.lr)

    def resolve(self) -> AlphaMeasurement | str:
        """Fetch the numbers and measure; or the reason why the pair has to be dropped."""
        squared, moved, edited, *rest = self.numbers.tolist()
        if edited:
            return "parameters_changed"
        length = math.sqrt(squared) if squared >= 0.0 else NAN
        length = length if moved or not math.isfinite(length) else 0.0
        start = _observation(rest[:4], self.samples[0], self.observed[0])
        end = _observation(rest[4:], self.samples[1], self.observed[1])
        return measure_alpha(self.iteration, length, start, end, tuple(float(rate) for rate in self.lr))


def put_together(calls: list[tuple[Tensor, Tensor | None, int]]) -> BatchLoss:
    """Losses of several micro-batches as those of one batch."""
    samples = sum(count for _, _, count in calls)
    parts = [individual for _, individual, _ in calls if individual is not None]
    if len(parts) == len(calls):
        values = torch.cat([part.flatten() for part in parts])
        return BatchLoss(sample_mean(values), sample_variance(values), samples)
    weights = [count if samples else 1 for _, _, count in calls]
    means = torch.stack([mean.double() for mean, _, _ in calls])
    shares = torch.tensor(weights, dtype=torch.float64, device=means.device)
    return BatchLoss((means * shares).sum() / shares.sum(), None, samples)


def small_tensor(parts: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """One small float64 tensor, nan for what is missing."""
    return torch.stack(
        [torch.full((), NAN, dtype=torch.float64, device=device) if part is None
         else part.detach().to(device, torch.float64) for part in parts]
    )  # fmt: skip


def _observation(numbers: list[float], samples: int, observed: Observed) -> Observation:
    loss, loss_variance, slope, slope_variance = numbers
    has_loss, has_loss_variance, has_slope_variance = observed
    # A direction that is no multiple of the gradient leaves a nan here, the slope itself is right.
    usable = has_slope_variance and not (math.isnan(slope_variance) and math.isfinite(slope))
    return Observation(
        samples=samples,
        slope=slope,
        slope_variance=slope_variance if usable else None,
        loss=loss if has_loss else None,
        loss_variance=loss_variance if has_loss_variance else None,
    )
