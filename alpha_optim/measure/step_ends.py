"""What is kept of one step: its two ends as a few numbers on the device, and how they become alpha."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpha_optim.alpha.measurement import AlphaMeasurement, measure_alpha
from alpha_optim.alpha.records import Observation
from alpha_optim.measure.tensor_fit import Observed, alpha_of
from alpha_optim.observe.scalars import Scalar, Truth, either, free_to_read, readable, small_tensor
from alpha_optim.observe.step_direction import Direction, versions_of
from alpha_optim.slopes.statistics import sample_mean, sample_variance

DROPPED = ("", "parameters_changed", "gradients_modified")
"""Why a pair has to be dropped, by the number that says so on the device; 0: it has not."""


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
            None where not observed.
        samples: N, 0 if not known.
        observed: Which of loss, its variance and the slope variance were observed.
        lost: Whether the gradient of the loss is not known, so that there is no slope.
    """

    numbers: tuple[Scalar | None, Scalar | None, Scalar, Scalar | None]
    samples: int
    observed: Observed
    lost: Truth


@dataclass(frozen=True)
class PendingStart:
    """A step that was made and waits for its end.

    Attributes:
        iteration: Iteration n of the start.
        direction: Parameter change of the step.
        point: What was seen at the start.
        spots: Some elements of every parameter as the step left them.
        lr: Learning rates of the step, one per group.
    """

    iteration: int
    direction: Direction
    point: EndPoint
    spots: Tensor
    lr: tuple[float | Tensor, ...]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and copies of the tensors."""
        return {
            "iteration": self.iteration,
            "moved": self.direction.moved,
            "squares": self.direction.squares,
            "length": self.direction.length,
            "rates": list(self.direction.rates),
            "bases": [None if base is None else base.clone() for base in self.direction.bases],
            "of_gradient": self.direction.of_gradient,
            "numbers": small_tensor(self.point.numbers, self.spots.device),
            "samples": self.point.samples,
            "observed": list(self.point.observed),
            "lost": self.point.lost,
            "spots": self.spots,
            "lr": [rate.clone() if isinstance(rate, Tensor) else rate for rate in self.lr],
        }

    @classmethod
    def from_state(cls, saved: dict[str, Any], params: Sequence[Tensor]) -> PendingStart | None:
        """Build it anew on the devices of ``params``; None if it does not belong to them."""
        if len(saved["bases"]) != len(params):
            return None
        bases = [
            None if base is None else base.to(param.device).clone()
            for base, param in zip(saved["bases"], params, strict=True)
        ]
        device = params[0].device
        a, b, c = saved["observed"]
        direction = Direction(
            bases,
            list(saved["rates"]),
            _moved_to(device, saved["squares"]),
            _moved_to(device, saved["length"]),
            _moved_to(device, saved["moved"]),
            bool(saved["of_gradient"]),
            versions_of(bases),
        )
        observed = (bool(a), bool(b), bool(c))
        numbers = readable(saved["numbers"].to(device))
        loss, loss_variance, slope, slope_variance = numbers if isinstance(numbers, list) else numbers.unbind()
        numbers = (loss if a else None, loss_variance if b else None, slope, slope_variance if c else None)
        point = EndPoint(numbers, int(saved["samples"]), observed, _moved_to(device, saved["lost"]))
        spots = saved["spots"].to(device)
        return cls(int(saved["iteration"]), direction, point, spots, tuple(saved["lr"]))


@dataclass(frozen=True)
class PendingPair:
    """Both ends of a step; becomes a measurement when somebody reads.

    Attributes:
        iteration: Iteration n of the start.
        numbers: Length, moved, index into `DROPPED`, then the four numbers of the start and those of
            the end, float64 ``[11]``.
        samples: N at start and end.
        observed: What was observed at start and end, as in `EndPoint`.
        lr: Learning rates of the step, one per group.
        on_read: Called when the numbers are read.
    """

    iteration: int
    numbers: Tensor
    samples: tuple[int, int]
    observed: tuple[Observed, Observed]
    lr: tuple[float | Tensor, ...]
    on_read: Callable[[], None]

    @classmethod
    def of(cls, start: PendingStart, end: EndPoint, edited: Truth, on_read: Callable[[], None]) -> PendingPair:
        """Put both ends into one small tensor."""
        direction = start.direction
        dropped = either(edited, 1.0, either(start.point.lost | end.lost, 2.0, 0.0))
        head = (direction.length, direction.moved, dropped)
        numbers = small_tensor((*head, *start.point.numbers, *end.numbers), start.spots.device)
        samples, observed = (start.point.samples, end.samples), (start.point.observed, end.observed)
        return cls(start.iteration, numbers, samples, observed, start.lr, on_read)

    def alpha(self) -> Tensor:
        """Alpha on the device, float64 ``[]``; nothing is fetched."""
        return alpha_of(self.numbers, self.samples, self.observed)

    @classmethod
    def resolve(cls, pairs: Sequence[PendingPair]) -> list[AlphaMeasurement | str]:
        """Fetch the numbers of pairs, all at once, and measure; or the reason why one has to be dropped."""
        device = pairs[0].numbers.device
        fetched: Any = torch.stack([pair.numbers.to(device) for pair in pairs]).tolist()
        return [pair._measured(numbers) for pair, numbers in zip(pairs, fetched, strict=True)]

    def _measured(self, numbers: list[float]) -> AlphaMeasurement | str:
        length, moved, dropped, *rest = numbers
        self.on_read()
        if dropped:
            return DROPPED[int(dropped)]
        length = length if moved or not math.isfinite(length) else 0.0
        start = _observation(rest[:4], self.samples[0], self.observed[0])
        end = _observation(rest[4:], self.samples[1], self.observed[1])
        return measure_alpha(self.iteration, length, start, end, tuple(float(rate) for rate in self.lr))


def put_together(calls: list[tuple[Tensor, Tensor | None, int]]) -> BatchLoss:
    """Losses of several micro-batches as those of one batch."""
    samples = sum(count for _, _, count in calls)
    parts = [individual.flatten() for _, individual, _ in calls if individual is not None]
    if len(parts) == len(calls):
        values = (parts[0] if len(parts) == 1 else torch.cat(parts)).double()
        return BatchLoss(sample_mean(values), sample_variance(values), samples)
    weights = [count if samples else 1 for _, _, count in calls]
    total = sum(weights)
    means = [mean.double() * (weight / total) for (mean, _, _), weight in zip(calls, weights, strict=True)]
    return BatchLoss(torch.stack(means).sum(), None, samples)


def _moved_to(device: torch.device, saved: Any) -> Any:
    """A saved number as it is wanted on a device."""
    if free_to_read(device):
        return readable(saved.cpu()) if isinstance(saved, Tensor) else saved
    dtype = torch.bool if isinstance(saved, bool) else None
    return torch.as_tensor(saved, dtype=dtype or getattr(saved, "dtype", torch.float64), device=device)


def _observation(numbers: list[float], samples: int, observed: Observed) -> Observation:
    loss, loss_variance, slope, slope_variance = numbers
    has_loss, has_loss_variance, has_slope_variance = observed
    # A nan beside a finite slope: the samples did not add up to the gradient; the slope itself is right.
    usable = has_slope_variance and not (math.isnan(slope_variance) and math.isfinite(slope))
    return Observation(
        samples=samples,
        slope=slope,
        slope_variance=slope_variance if usable else None,
        loss=loss if has_loss else None,
        loss_variance=loss_variance if has_loss_variance else None,
    )
