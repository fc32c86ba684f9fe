"""Are the slopes that rules of layers give those of single samples? The model as a whole is the judge.

What flows through the rows of a layer's call that belong to a sample is the slope of that sample's loss, as long as
samples do not meet elsewhere in the model (a graph's adjacency, attention across the batch). So now and then the model
is differentiated as a whole, with all samples, and both are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alpha_optim.alpha.states import Remembers
from alpha_optim.observe.backward_passes import BackwardPasses
from alpha_optim.observe.model_calls import innermost
from alpha_optim.observe.numbers import read
from alpha_optim.observe.step_direction import Direction
from alpha_optim.slopes.base import INTERACT, OTHER_TERMS, Expected, SampleSlopes
from alpha_optim.slopes.derivative import Line
from alpha_optim.slopes.forward_mode import ForwardMode, mixes_samples

TOLERANCE, TOLERANCE_HALF = 1e-2, 1e-1
"""Deviation of a sample's slope relative to the largest; in 16 bits."""
LATER = 64
"""The first check after the first; those that follow lie twice as far apart each time."""
NO_CHECK = "the rules of layers cannot be checked, for the call of the model cannot be repeated"
SHARES = "what flows through the rows of a sample is not the slope of its loss: samples meet in the model"


class Verification(Remembers):
    """Compares now and then."""

    _count: int  # answers so far
    _forward: ForwardMode

    def __init__(self, model: nn.Module, sample_dim: int) -> None:
        """Prepare for a model."""
        self._model = model
        self._forward = ForwardMode(model, sample_dim, exact=True)
        self._count = 0

    def due(self) -> bool:
        """Whether the next answer is checked."""
        count = self._count
        return count == 0 or (count >= LATER and count & (count - 1) == 0)

    def objection(
        self,
        passes: BackwardPasses,
        params: Sequence[Tensor],
        direction: Direction,
        expected: Expected,
        slopes: SampleSlopes | None,
    ) -> str | None:
        """Say what is wrong with the slopes of samples at the start of a step; None if nothing is, or it is not known.

        Args:
            passes: Backward passes of the iteration.
            params: Parameters of the optimizer.
            direction: The step.
            expected: What the mean over all samples has to be.
            slopes: What the rules of layers gave.
        """
        due = self.due()
        self._count += 1
        if not due or slopes is None or not passes.forwards:  # layers may be called one by one, or inside a checkpoint
            return None
        line = Line.along(self._forward.names, params, direction.start(), direction.change().tensors())
        if not line.point:
            return None
        judge, reason = self._forward.slopes(passes.reached, line, expected, anew=True)
        if judge is None and reason is None:
            return NO_CHECK
        if reason in (INTERACT, OTHER_TERMS):
            return reason
        if judge is None or not judge.repeated:
            return None
        if mixes_samples(innermost(self._model)) or len(judge.values) < len(slopes.values):
            return None  # on the statistics of a batch the share of each position is taken
        all_of_them = judge.values[: len(slopes.values)]
        size = judge.values.abs().max()
        limit = (TOLERANCE_HALF if self._forward.half else TOLERANCE) * size
        apart = (all_of_them - slopes.values.to(all_of_them.device)).abs().max() > limit
        return SHARES if read([apart])[0] else None
