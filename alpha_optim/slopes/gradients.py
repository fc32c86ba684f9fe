"""Slopes from gradients alone: no number per sample."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from alpha_optim.observe.backward_passes import BackwardPasses
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.step_direction import Direction
from alpha_optim.slopes.base import Expected, SampleSlopes, Silent, Unaccounted


class GradientsBackend(Silent):
    """Leaves the slopes to the two inner products every measurement takes anyway."""

    name = "gradients"

    def __init__(self) -> None:
        """Nothing to prepare."""
        self.unaccounted = Unaccounted()

    def cost(self, samples: int) -> float:
        """One more evaluation of the loss function, for the variance of the losses."""
        return 0.05

    def begin(self, passes: BackwardPasses, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook nothing."""

    def end_slopes(self, direction: Direction, point: Sequence[Tensor]) -> SampleSlopes | None:
        """Return None: not known."""
        return None

    def start_slopes(self, direction: Direction, gradients: LossGradients, expected: Expected) -> SampleSlopes | None:
        """Return None: not known."""
        return None
