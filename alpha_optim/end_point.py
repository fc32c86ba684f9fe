"""What was seen at one end of a step, reduced to four numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alpha_optim.direction import Direction, slopes_of_parameters
from alpha_optim.gradient_watch import LossGradients
from alpha_optim.pairs import BatchLoss, EndPoint
from alpha_optim.passes import BackwardPass
from alpha_optim.projections.base import SampleSlopes
from alpha_optim.projections.statistics import sample_mean, sample_variance


def reduced(
    direction: Direction,
    gradients: LossGradients,
    passes: Sequence[BackwardPass],
    loss: BatchLoss,
    slopes: SampleSlopes | None,
    carried: Tensor | None,
) -> tuple[EndPoint, Tensor | None, Tensor]:
    """Reduce what the passes of an iteration say about the loss along a direction.

    Args:
        direction: Direction of the step.
        gradients: Gradients of the iteration.
        passes: Its backward passes.
        loss: Its loss.
        slopes: Slopes of single samples along the direction, if they were measured.
        carried: Variance of one sample's slope that stands in where they were not ``[]``.

    Returns:
        The four numbers; the variance of one sample's slope, if it was measured ``[]``; and the slopes of the
        parameters that everything was computed from: <change, gradient> of what was sent backward ``[K]``.
    """
    length = direction.squared_length.sqrt()
    of_parameters = slopes_of_parameters(direction, gradients.tensors) / gradients.factor
    slope = of_parameters.sum() / length
    gammas = [entry.gamma.to(slope) for entry in passes if entry.gamma is not None]
    if gammas:
        slope = slope / sum(gammas[1:], gammas[0])
    if slopes is not None and slopes.complete and len(passes) > 1:
        mean = sample_mean(slopes.values / length)
        slope = torch.where(_evenly_weighted(passes, slope.device), slope, mean)
    # Divided by the length first: squares of <d, gradient> overflow in a diverging run.
    variance = carried if slopes is None else sample_variance(slopes.values / length)
    parts = (loss.mean, loss.variance, slope, variance)
    observed = (loss.mean is not None, loss.variance is not None, variance is not None)
    point = EndPoint(parts, loss.samples, observed, gradients.lost)
    return point, None if slopes is None else variance, of_parameters


def _evenly_weighted(passes: Sequence[BackwardPass], device: torch.device) -> Tensor:
    """Whether every sample has the same weight in the gradient, whichever pass it came with ``[]``."""
    shares = [entry.gamma / entry.samples for entry in passes if entry.gamma is not None and entry.samples]
    if not shares:
        return torch.ones((), dtype=torch.bool, device=device)
    weights = torch.stack([share.double().to(device) for share in shares])
    return weights.max() - weights.min() <= 1e-6 * weights.abs().max()
