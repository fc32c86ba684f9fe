"""Slopes from gradients alone: no hook on the layers, no number per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.step_direction import Direction
from alpha_optim.slopes.base import SampleSlopes, Unaccounted


class GradientsBackend:
    """Leaves the slopes to the two inner products every measurement takes anyway."""

    name = "gradients"

    def __init__(self) -> None:
        """Nothing to prepare."""
        self.unaccounted = Unaccounted()

    def begin(self, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook nothing."""

    def accumulated(self, param: Tensor) -> None:
        """Note nothing."""

    def discard(self) -> None:
        """Forget nothing."""

    def end_slopes(self, direction: Direction) -> SampleSlopes | None:
        """Return None: not known."""
        return None

    def start_slopes(self, direction: Direction, gradients: LossGradients) -> SampleSlopes | None:
        """Return None: not known."""
        return None

    def verified(self, of_parameters: Tensor, known: Tensor) -> Tensor | None:
        """Return None: nothing to verify."""
        return None

    def read_check(self) -> None:
        """Fetch nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""

    def mute(self) -> None:
        """Unhook nothing."""

    def close(self) -> None:
        """Free nothing."""
