"""The two ends of a step: what was seen there, as it stands on the device, and how both become alpha.

Nothing is computed before somebody reads: inner products, losses and the factors between them are tensors of one
element, fetched all at once; the arithmetic is done in floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpha_optim.alpha.measurement import AlphaMeasurement, measure_alpha
from alpha_optim.alpha.records import DropReason, Observation
from alpha_optim.distributed import Ranks
from alpha_optim.measure.across_ranks import StartAcrossRanks
from alpha_optim.observe.backward_passes import (
    BackwardPasses,
    LossCall,
    gamma_of,
    loss_weight,
    partly_seen,
    total_samples,
)
from alpha_optim.observe.numbers import Number, Truth, read
from alpha_optim.observe.step_direction import AlongGradient, BetweenPoints, restored
from alpha_optim.slopes.base import SampleSlopes


@dataclass(frozen=True)
class BatchLoss:
    """The loss of an iteration over all its backward passes.

    Attributes:
        mean: Mean loss ``[]``, or None if not observed.
        variance: Variance of one sample's loss ``[]`` (ddof=1), or None.
        samples: N, 0 if not known.
        complete: Whether losses of single samples can be had.
        individual: Losses of the samples ``[N]``, weighted so that their mean is ``mean``; None if not wanted now.
    """

    mean: Tensor | None
    variance: Number | None
    samples: int
    complete: bool = False
    individual: Tensor | None = None

    @classmethod
    def of(cls, mean: Tensor, individual: Tensor | None, samples: int, complete: bool) -> BatchLoss:
        """The loss with the variance of the losses of its samples, if these are there."""
        variance = None if individual is None else sample_variance(individual)
        return cls(mean, variance, samples, complete, individual)


@dataclass(frozen=True)
class EndPoint:
    """What was seen at one end of a step d.

    Attributes:
        product: <d, gradient> as it was taken.
        factor: What that gradient is a multiple of the one sent backward by; None if it is that one.
        gamma: Factor between the mean loss and what was sent backward; None if not seen.
        loss: Mean loss; None if not observed.
        loss_variance: Variance of one sample's loss; None if not observed.
        slope_variance: Variance of one sample's slope along d / |d|; None if not observed.
        lost: Whether the gradient of the loss is not known, so that there is no slope.
        doubtful: Whether samples did not add up to the gradient, so that their variance is none.
        samples: N, 0 if not known.
    """

    product: Number
    factor: Number | None
    gamma: Number | None
    loss: Number | None
    loss_variance: Number | None
    slope_variance: Number | None
    lost: Truth
    doubtful: Truth
    samples: int

    @property
    def numbers(self) -> tuple[Any, ...]:
        """All of them, in the order of the fields."""
        return (
            self.product,
            self.factor,
            self.gamma,
            self.loss,
            self.loss_variance,
            self.slope_variance,
            self.lost,
            self.doubtful,
            self.samples,
        )

    def observation(self, length: float) -> Observation:
        """The same once the numbers have been read, for a step of a length."""
        product, factor, gamma = float(self.product), self.factor, self.gamma
        unscaled = gamma is None and factor is not None and _of_a_scaler(float(factor))
        for divisor in (factor, gamma, length):
            if divisor is not None:
                product = math.nan if divisor == 0.0 else product / float(divisor)
        return Observation(
            samples=self.samples,
            slope=product,
            slope_variance=None if self.doubtful or not self.samples else _float(self.slope_variance),
            loss=_float(self.loss),
            # Losses without a graph, of which nobody has seen by how much they were scaled up: not those of this slope.
            loss_variance=None if unscaled else _float(self.loss_variance),
        )


@dataclass(frozen=True)
class PendingStart:
    """A step that was made and waits for its end.

    Attributes:
        iteration: Iteration n of the start.
        direction: Parameter change of the step.
        point: What was seen at the start.
        elements: Some elements of every parameter as the step left them.
        lr: Learning rates of the step, one per group.
    """

    iteration: int
    direction: AlongGradient | BetweenPoints
    point: EndPoint | StartAcrossRanks
    elements: Tensor
    lr: tuple[float | Tensor, ...]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and copies of the tensors."""
        point = self.point
        return {
            "iteration": self.iteration,
            "direction": self.direction.state(),
            "point": read(point.numbers) if isinstance(point, EndPoint) else None,
            "across": point.state_dict() if isinstance(point, StartAcrossRanks) else None,
            "elements": self.elements,
            "lr": [rate.clone() if isinstance(rate, Tensor) else rate for rate in self.lr],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], params: list[Tensor], ranks: Ranks | None) -> PendingStart | None:
        """Build it anew on the devices of ``params``; None if it does not belong to them, or not to this rank."""
        direction = restored(state["direction"], params, None if ranks is None else ranks.weights)
        point: EndPoint | StartAcrossRanks | None
        if state.get("across") is not None:
            point = StartAcrossRanks.from_state(state["across"], ranks)
        else:
            point = EndPoint(*state["point"]) if ranks is None else None
        if direction is None or point is None:
            return None
        elements = state["elements"].to(params[0].device)
        return cls(int(state["iteration"]), direction, point, elements, tuple(state["lr"]))


@dataclass(frozen=True)
class EndSeen:
    """What this process has seen at the end of a step.

    Attributes:
        start: The step that ends.
        product: <d, gradient>.
        edited: Whether parameters were changed between the step and the pass at its end.
        slopes: Slopes of samples along the step; None if they were not due or could not be had.
        unseen: Whether they were due and could not be had.
    """

    start: PendingStart
    product: Tensor
    edited: Truth
    slopes: SampleSlopes | None
    unseen: bool


@dataclass(frozen=True)
class PendingPair:
    """Both ends of a step; becomes a measurement when somebody reads.

    Attributes:
        iteration: Iteration n of the start.
        length: |d|.
        moved: Whether any parameter changed.
        edited: Whether parameters were changed between the step and the pass at its end.
        start: What was seen at the start.
        end: What was seen at the end.
        lr: Learning rates of the step, one per group.
        on_doubt: Called when the numbers are read and samples did not add up.
    """

    iteration: int
    length: Number
    moved: Truth
    edited: Truth
    start: EndPoint
    end: EndPoint
    lr: tuple[float | Tensor, ...]
    on_doubt: Callable[[], None]

    @property
    def _numbers(self) -> tuple[Any, ...]:
        return (self.length, self.moved, self.edited, *self.start.numbers, *self.end.numbers, *self.lr)

    @classmethod
    def resolve(cls, pairs: Sequence[PendingPair]) -> list[AlphaMeasurement | DropReason]:
        """Fetch the numbers of pairs, all at once, and measure; or the reason why one has to be dropped."""
        found = iter(read([number for pair in pairs for number in pair._numbers]))
        return [pair._measured(found) for pair in pairs]

    def _measured(self, numbers: Iterator[Any]) -> AlphaMeasurement | DropReason:
        length, moved, edited = next(numbers), next(numbers), next(numbers)
        start = EndPoint(*(next(numbers) for _ in self.start.numbers))
        end = EndPoint(*(next(numbers) for _ in self.end.numbers))
        lr = tuple(float(next(numbers)) for _ in self.lr)
        if edited:
            return DropReason.PARAMETERS_CHANGED
        if start.lost or end.lost:
            return DropReason.GRADIENTS_MODIFIED
        if start.doubtful or end.doubtful:
            self.on_doubt()
        length = length if moved or not math.isfinite(length) else 0.0
        return measure_alpha(self.iteration, length, start.observation(length), end.observation(length), lr)


def batch_loss(passes: BackwardPasses, fallback: Tensor | float | None) -> BatchLoss:
    """Put the losses of an iteration's passes together; the mean over all samples is the loss.

    Args:
        passes: The passes.
        fallback: A closure's loss, used if no other was seen.

    Returns:
        The loss as that of one batch.
    """
    reached = passes.reached
    samples = total_samples(reached)
    recorded = passes.recorded
    seen = [entry for entry in reached if entry.calls]
    # What was handed over counts, unless it is a mere mean and single losses were seen.
    singly = any(call.complete for call in recorded)
    again = any(entry.again for entry in reached)
    # Of those with a graph it was seen by which factor they were sent backward.
    weighed = bool(reached) and all(
        any(call.explicit and call.gamma is not None for call in entry.calls) for entry in reached
    )
    if recorded and not weighed and (singly or not any(call.complete for entry in seen for call in entry.calls)):
        return _of_recorded(recorded, samples, again)
    if not seen:
        mean = None if fallback is None else torch.as_tensor(fallback).detach()
        return BatchLoss(mean, None, samples)
    parts = [entry.losses() for entry in seen]
    partly = again or partly_seen(reached)
    complete = not partly and all(call.complete for entry in seen for call in entry.calls)
    if len(seen) == 1:
        mean, individual = parts[0]
        return BatchLoss.of(mean, None if partly else individual, samples, complete)
    gamma = gamma_of(seen)
    assert gamma is not None
    weighted = [
        part[0].double() * entry.gamma for part, entry in zip(parts, seen, strict=True) if entry.gamma is not None
    ]
    single = [
        part[1].double() * loss_weight(entry, seen)
        for part, entry in zip(parts, seen, strict=True)
        if part[1] is not None
    ]
    every = torch.cat(single) if len(single) == len(seen) and not partly else None
    # Nothing counts in any of them: their sum is 0, and so is its gradient.
    gamma = torch.where(gamma == 0.0, torch.ones_like(gamma), gamma)
    return BatchLoss.of(torch.stack(weighted).sum() / gamma, every, samples, complete)


def _of_recorded(calls: Sequence[LossCall], samples: int, again: bool) -> BatchLoss:
    """Losses that were handed over, as those of one batch in which every sample weighs the same.

    Args:
        calls: What was handed over.
        samples: N, as the passes tell.
        again: Whether several passes have the same samples.
    """
    counted = sum(call.samples or 0 for call in calls)
    individual = [] if again else [call.individual for call in calls if call.individual is not None]
    if len(individual) == len(calls):
        values = torch.cat(individual) if len(individual) > 1 else individual[0]
        return BatchLoss.of(values.double().mean(), values, counted or samples, complete=True)
    weights = [call.samples or 0 if counted else 1 for call in calls]
    means = [call.mean.double() * (w / sum(weights)) for call, w in zip(calls, weights, strict=True)]
    return BatchLoss(torch.stack(means).sum(), None, samples if again or not counted else counted)


def sample_variance(values: Tensor) -> Tensor | None:
    """Variance of one sample (ddof=1, centred), float64 ``[]``; None for fewer than two samples.

    Args:
        values: One number per sample ``[n]``.
    """
    if values.numel() < 2:
        return None
    # Centred first: mean of squares minus squared mean loses everything in float32.
    return values.double().var(correction=1)


SCALED = 1e-3
"""A gradient that was made smaller than this share of itself before the step was not clipped: a scaler has undone what
it did to the loss. So it has where the factor is a power of two, as its scales are."""


def _of_a_scaler(factor: float) -> bool:
    """Whether gradients were multiplied by a factor between backward pass and step because the loss was scaled up."""
    return 0.0 < factor < SCALED or (0.0 < factor < 1.0 and math.frexp(factor)[0] == 0.5)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
