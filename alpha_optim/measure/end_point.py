"""What was seen at one end of a step, reduced to four numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alpha_optim.measure.step_ends import BatchLoss, EndPoint, put_together
from alpha_optim.observe.backward_passes import BackwardPass, PassLog
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.scalars import (
    Scalar,
    Scalars,
    Truth,
    added_up,
    either,
    quotient,
    readable,
    scalar,
    times,
)
from alpha_optim.observe.step_direction import Direction, slopes_of_parameters
from alpha_optim.slopes.base import SampleSlopes
from alpha_optim.slopes.statistics import sample_mean, sample_variance


def batch_loss(log: PassLog, fallback: Tensor | float | None) -> BatchLoss:
    """Put the losses of the iteration's passes together.

    Args:
        log: The passes.
        fallback: A closure's loss, used if no other was seen.

    Returns:
        The loss as that of one batch.
    """
    calls = [(*entry.losses(), entry.samples or 0) for entry in log.reached if entry.calls]
    recorded = [(call.mean, call.individual, call.samples or 0) for call in log.recorded]
    # What was handed over counts, unless it is a mere mean and single losses were seen.
    handed_singly = any(single is not None for _, single, _ in recorded)
    if recorded and (handed_singly or all(single is None for _, single, _ in calls)):
        calls = recorded
    samples = sum(entry.samples or 0 for entry in log.reached)
    if calls:
        whole = put_together(calls)
        return whole if whole.samples else replace(whole, samples=samples)
    mean = None if fallback is None else torch.as_tensor(fallback).detach()
    return BatchLoss(mean, None, samples)


def reduced(
    direction: Direction,
    gradients: LossGradients,
    passes: Sequence[BackwardPass],
    loss: BatchLoss,
    slopes: SampleSlopes | None,
    carried: Scalar | None,
) -> tuple[EndPoint, Scalar | None, Scalars]:
    """Reduce what the passes of an iteration say about the loss along a direction.

    Args:
        direction: Direction of the step.
        gradients: Gradients of the iteration.
        passes: Its backward passes.
        loss: Its loss.
        slopes: Slopes of single samples along the direction, if they were measured.
        carried: Variance of one sample's slope that stands in where they were not.

    Returns:
        The four numbers; the variance of one sample's slope, if it was measured; and the slopes of the
        parameters that everything was computed from: <change, gradient> of what was sent backward.
    """
    length = direction.length
    of_parameters = slopes_of_parameters(direction, gradients.tensors)
    if gradients.factor is not None:
        of_parameters = times(of_parameters, quotient(1.0, gradients.factor))
    slope = quotient(added_up(of_parameters), length)
    gammas = [scalar(entry.gamma) for entry in passes if entry.gamma is not None]
    if gammas:
        slope = quotient(slope, sum(gammas[1:], gammas[0]))
    if slopes is not None and slopes.complete and len(passes) > 1:
        mean = scalar(sample_mean(slopes.values / length))
        slope = either(_evenly_weighted(passes, slopes.values.device), slope, mean)
    variance = carried
    if slopes is not None:
        # Divided by the length first: squares of <d, gradient> overflow in a diverging run.
        measured = sample_variance(slopes.values / length)
        variance = None if measured is None else scalar(measured)
    parts = (loss.mean, loss.variance, slope, variance)
    observed = (loss.mean is not None, loss.variance is not None, variance is not None)
    point = EndPoint(parts, loss.samples, observed, gradients.lost)
    return point, None if slopes is None else variance, of_parameters


def _evenly_weighted(passes: Sequence[BackwardPass], device: torch.device) -> Truth:
    """Whether every sample has the same weight in the gradient, whichever pass it came with."""
    shares = [entry.gamma / entry.samples for entry in passes if entry.gamma is not None and entry.samples]
    if not shares:
        return True
    weights = torch.stack([share.double().to(device) for share in shares])
    even: Truth = readable(weights.max() - weights.min() <= 1e-6 * weights.abs().max())
    return even
