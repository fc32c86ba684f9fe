"""What a backend promises.

A backend watches the user's own passes and never runs the model itself. It answers with one number
per sample, <d, gradient of that sample's loss>, unscaled per sample and not divided by |d|. Means and
variances are taken elsewhere (`statistics`), so two backends cannot disagree about a factor N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.step_direction import Direction

SAMPLES = 16
"""How many samples ``variance="sampled"`` uses."""


@dataclass(frozen=True)
class SampleSlopes:
    """Projections of samples on a direction.

    Attributes:
        values: <d, gradient of one sample's loss> ``[n]``.
        complete: Whether every sample of the iteration is in it (else a bounded number).
    """

    values: Tensor
    complete: bool


@dataclass
class Unaccounted:
    """Parameters whose per-sample slopes a backend could not get, with the reason."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, names: Sequence[str], reason: str) -> None:
        """Note parameters by name; the first reason stays."""
        for name in names:
            self.reasons.setdefault(name, reason)


class Backend(Protocol):
    """Collects what per-sample slopes need, from forward hook to optimizer step."""

    name: str
    unaccounted: Unaccounted

    def begin(self, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the model for the coming iteration.

        Args:
            end_of: Direction of the previous step if slopes along it are wanted.
            start: Whether slopes along the coming step are wanted.
            params: Parameters of the optimizer, in the order of directions.
        """

    def accumulated(self, param: Tensor) -> None:
        """A gradient has just been accumulated into ``param`` (inside the backward pass)."""

    def discard(self) -> None:
        """Forget what the passes of this iteration left: their gradients were thrown away."""

    def end_slopes(self, direction: Direction) -> SampleSlopes | None:
        """Per-sample slopes along the previous step, called before the next one; None if unknown."""

    def start_slopes(self, direction: Direction, gradients: LossGradients) -> SampleSlopes | None:
        """Per-sample slopes along the step just made, called after it; None if unknown.

        Args:
            direction: The step.
            gradients: What the backward passes left, before clipping; one per parameter.
        """

    def verified(self, of_parameters: Tensor, known: Tensor) -> Tensor | None:
        """Whether the samples of the last answer add up to the gradient ``[]``; None if not known.

        Args:
            of_parameters: <change, gradient> for every parameter ``[K]``.
            known: Whether those are known ``[]``.
        """

    def read_check(self) -> None:
        """Draw conclusions from the last `verified`; somebody reads numbers of that iteration now."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about the model and a resumed run must not learn anew."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was learned."""

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""

    def close(self) -> None:
        """Remove every hook and free what was collected."""


Names = Mapping[int, str]
"""From id(parameter) to its name in the model."""
