"""What a way of getting slopes of single samples promises.

It answers with one number per sample, <d, gradient of that sample's loss>, normalised so that their mean over all
samples is <d, gradient of the mean loss>, and not divided by |d|. Means and variances are taken elsewhere, so that
no two ways can disagree about a factor N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from alpha_optim.alpha.loss_level import MISTAKEN, quantile
from alpha_optim.observe.backward_passes import (
    BackwardPass,
    BackwardPasses,
    loss_weight,
    shares_of_one_mean,
    total_samples,
)
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.numbers import read
from alpha_optim.observe.step_direction import Direction

SAMPLES = 16
"""How many samples ``variance="sampled"`` uses: the relative error of a variance is then about a third."""

ALL = ("all parameters",)
"""Names for `Unaccounted.add` where a reason concerns all of them."""
OTHER_TERMS = (
    "the loss that was seen is not all of the loss that is sent backward (a penalty, a balance loss, a second loss), "
    "or another run of the model does not repeat it, as where it keeps state, or "
    "draws random numbers in a function that was compiled by itself"
)
OF_LOSS_FN = "parameters of the loss function are trained, and their share of a sample's slope is not seen"
SUBSET = "the loss is one of some samples only, picked by a mask"
AGAIN = (
    "several backward passes go through one call of the model, with the same samples (a single pass, of the sum of "
    "their losses, has slopes of samples)"
)
INTERACT = (
    "samples interact (a contrastive loss?) or do not lie along sample_dim; models that are fed time first take "
    "sample_dim=1"
)
DERIVATIVES = "derivatives of the model were taken with create_graph=True, and may be part of the loss (a penalty)"


CHECKS = 100
"""Checks of one run that `chance_of_means` allows for: they lie hundreds of steps apart."""
OF_OTHER_GRADIENTS = 0.1
"""Deviation of such a mean from the slope of the gradients that is no chance, relative to the slopes of samples: the
gradients that reached the outputs are those of the loop's own dropout. At a dropout of 0.2 to 0.3 it is 0.05 to 0.1."""


def chance_of_means(samples: float) -> float:
    """How far two means of so many samples may lie apart by chance, relative to the standard deviation of samples.

    One is that of the training loop, the other one of a repetition with other random numbers. Both scatter by no more
    than samples do. The chance to lie further apart once in a run is `loss_level.MISTAKEN`.
    """
    return quantile(samples - 1.0, MISTAKEN / CHECKS / 2.0) * math.sqrt(2.0 / samples)


def by_chance(values: Tensor) -> Tensor:
    """The same for these samples ``[n]``."""
    if len(values) < 2:
        return torch.full_like(values.sum(), math.inf)
    return chance_of_means(len(values)) * values.std()


@dataclass(frozen=True)
class SampleSlopes:
    """Projections of samples on a direction.

    Attributes:
        values: <d, gradient of one sample's loss>, float64 ``[n]``.
        complete: Whether every sample of the iteration is in it (else a bounded number).
        losses: Losses of the same samples ``[n]``, where they were seen on the way.
        repeated: Whether random numbers were those of the training loop. With others samples give the slope of the
            gradients but for chance, and only at the end of a step: a step was made from the very numbers of its start.
    """

    values: Tensor
    complete: bool
    losses: Tensor | None = None
    repeated: bool = True

    def apart_from(self, slope: Tensor, tolerance: float) -> Tensor:
        """Whether the mean is not the slope of the gradients.

        Args:
            slope: That slope ``[]``.
            tolerance: How far it may lie off, relative to the slopes of samples; where random numbers were others as
                far as `by_chance` in place of that.
        """
        values, slope = self.values, slope.to(self.values.device)
        size = slope.abs() + values.abs().mean()
        limit = tolerance * size if self.repeated else OF_OTHER_GRADIENTS * size + by_chance(values)
        return (values.mean() - slope).abs() > limit


def scattered_as_all(parts: Sequence[Tensor], taken: Sequence[BackwardPass], passes: Sequence[BackwardPass]) -> Tensor:
    """Slopes of samples, or losses, of an iteration's passes, scattered as those of all samples are ``[n]``.

    Samples of small micro-batches weigh more than those of large ones, and the few that are looked at come from the
    first of them. A weight w and a number u that do not know of each other have a product of variance
    <w^2> (<u>^2 + var u) - <w>^2 <u>^2.

    Args:
        parts: Numbers of the samples of each pass, times its weight.
        taken: The passes that they come from.
        passes: All passes.
    """
    together = torch.cat([part.to(parts[0].device) for part in parts])
    if len(passes) == 1 or len(together) == total_samples(passes) or shares_of_one_mean(passes):
        return together
    weights = read([loss_weight(entry, passes) for entry in passes])
    counts, own = total_samples(passes), dict(zip(map(id, passes), weights, strict=True))
    first, second = (
        sum(weight**power * (entry.samples or 0) / counts for weight, entry in zip(weights, passes, strict=True))
        for power in (1, 2)
    )
    # Where no target counts a sample weighs nothing, and tells nothing.
    known = [part / own[id(entry)] for part, entry in zip(parts, taken, strict=True) if own[id(entry)] != 0.0]
    plain = torch.cat([part.to(together.device) for part in known]) if known else together
    if len(plain) < 2:
        return together
    mean, variance = plain.mean(), plain.var()
    wanted = second * (variance + mean * mean) - (first * mean) ** 2
    stretch = torch.where(variance > 0, wanted.clamp_min(0) / variance, 1.0).sqrt()
    scattered: Tensor = first * mean + (plain - mean) * stretch
    return scattered


@dataclass(frozen=True)
class Expected:
    """What is known of the mean over all samples.

    Attributes:
        slope: <d, gradient of the mean loss> ``[]``, None if not known.
        loss: Mean loss ``[]``, None if not seen.
        interacting: Whether a sample's loss was seen to depend on others.
        all_of_loss: Whether the losses seen are all that reached the outputs of the model.
    """

    slope: Tensor | None
    loss: Tensor | None
    interacting: bool
    all_of_loss: bool


@dataclass
class Unaccounted:
    """Why slopes of single samples could not be had, by parameter or for all."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, names: Sequence[str], reason: str) -> None:
        """Note parameters by name; the first reason stays."""
        for name in names:
            self.reasons.setdefault(name, reason)


class Backend(Protocol):
    """Collects what slopes of samples need, from forward pass to optimizer step."""

    name: str
    unaccounted: Unaccounted

    @property
    def records(self) -> bool:
        """Whether calls of the model are to be kept for a repetition."""

    def check_due(self) -> bool:
        """Whether the losses of the coming iteration are to be followed back to the model's outputs."""

    def cost(self, samples: int) -> float:
        """What slopes at both ends of a step cost, in training steps, at a batch of so many samples."""

    def begin(self, passes: BackwardPasses, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Prepare the coming iteration.

        Args:
            passes: Where its backward passes are noted.
            end_of: The previous step if slopes along it are wanted.
            start: Whether slopes along the coming step are wanted.
            params: Parameters of the optimizer, in the order of changes.
        """

    def accumulated(self, param: Tensor) -> None:
        """A gradient has just been accumulated into ``param`` (inside the backward pass)."""

    def discard(self) -> None:
        """Forget what the passes of this iteration left: their gradients were thrown away."""

    def end_slopes(self, direction: Direction, point: Sequence[Tensor]) -> SampleSlopes | None:
        """Slopes along the previous step, asked for before the next one; None if unknown.

        Args:
            direction: The previous step.
            point: The parameters at its end.
        """

    def start_slopes(self, direction: Direction, gradients: LossGradients, expected: Expected) -> SampleSlopes | None:
        """Slopes along the step just made, asked for after it; None if unknown.

        Args:
            direction: The step.
            gradients: What the backward passes left, before clipping; one per parameter.
            expected: What the mean has to be.
        """

    def doubted(self, reason: str) -> None:
        """The slopes of all samples were compared with that of the gradients, and are not those of the loss."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about the model and a resumed run must not learn anew."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was learned."""

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""

    def close(self) -> None:
        """Remove every hook and free what was collected."""


class Silent:
    """The parts of a backend that watches nothing during the passes and learns nothing."""

    records = False
    unaccounted: Unaccounted

    def check_due(self) -> bool:
        """Nothing is checked."""
        return False

    def accumulated(self, param: Tensor) -> None:
        """Note nothing."""

    def discard(self) -> None:
        """Forget nothing."""

    def doubted(self, reason: str) -> None:
        """Say so of all parameters."""
        self.unaccounted.add(ALL, reason)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""

    def mute(self) -> None:
        """Unhook nothing."""

    def close(self) -> None:
        """Free nothing."""


IN_PASS_FIXED_COST = 0.5
"""What reading the parameters and hooking the layers cost at both ends, in training steps: measured on an MLP at batch
128; less on others."""
Names = Mapping[int, str]
"""From id(parameter) to its name in the model."""


def in_pass_cost(samples: int, sampled: bool) -> float:
    """Cost of contracting calls of layers at both ends of a step while the passes run: two thirds of a step each."""
    share = min(1.0, SAMPLES / max(samples, 1)) if sampled else 1.0
    return 4.0 / 3.0 * share + IN_PASS_FIXED_COST
