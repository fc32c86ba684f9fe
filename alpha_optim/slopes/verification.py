"""Are the slopes that rules of layers give those of single samples? The model as a whole is the judge.

What flows through the rows of a layer's call that belong to a sample is the slope of that sample's loss, as long as
samples do not meet elsewhere in the model (a graph's adjacency, attention across the batch). So now and then the model
is differentiated as a whole, with all samples, and both are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from alpha_optim.alpha.states import Remembers
from alpha_optim.observe.backward_passes import BackwardPasses
from alpha_optim.observe.model_calls import innermost
from alpha_optim.observe.numbers import read
from alpha_optim.observe.step_direction import Direction
from alpha_optim.slopes.base import ALL, INTERACT, OTHER_TERMS, Expected, SampleSlopes, Unaccounted
from alpha_optim.slopes.derivative import Line
from alpha_optim.slopes.forward_mode import ForwardMode, mixes_samples

TOLERANCE, TOLERANCE_HALF = 1e-2, 1e-1
"""Deviation of a sample's slope relative to the largest; in 16 bits."""
LATER = 64
"""The first check after the first; those that follow lie twice as far apart each time."""
NO_CHECK = "the rules of layers cannot be checked, for the call of the model cannot be repeated"
SHARES = "what flows through the rows of a sample is not the slope of its loss: samples meet in the model"


class Verification(Remembers):
    """Compares now and then; what was found stands until the next comparison.

    Attributes:
        objection: What was wrong with the slopes of samples when they were compared last; None if nothing was.
    """

    objection: str | None = None
    _count: int  # answers so far
    _forward: ForwardMode

    def __init__(self, model: nn.Module, sample_dim: int) -> None:
        """Prepare for a model."""
        self._model = model
        self._forward = ForwardMode(model, sample_dim, exact=True)
        self._count = 0

    def due(self) -> bool:
        """Whether the next answer is checked: after an objection sooner."""
        count = self._count
        soonest = LATER if self.objection is None else 1
        return count == 0 or (count >= soonest and count & (count - 1) == 0)

    def checked(
        self,
        passes: BackwardPasses,
        params: Sequence[Tensor],
        direction: Direction,
        expected: Expected,
        slopes: SampleSlopes | None,
    ) -> SampleSlopes | None:
        """Look at the slopes of samples at the start of a step.

        Args:
            passes: Backward passes of the iteration.
            params: Parameters of the optimizer.
            direction: The step.
            expected: What the mean over all samples has to be.
            slopes: What the rules of layers gave.

        Returns:
            The slopes to go on with, None where there is an objection. Those of all samples where they have to add up
            to what only all ranks together know.
        """
        due = self.due()
        self._count += 1
        if due and slopes is not None and passes.forwards:  # layers may be called one by one, or inside a checkpoint
            line = Line.along(self._forward.names, params, direction.start(), direction.change().tensors())
            if line.point:
                slopes, self.objection = self._compared(passes, line, expected, slopes)
        return slopes if self.objection is None else None

    def _compared(
        self, passes: BackwardPasses, line: Line, expected: Expected, slopes: SampleSlopes
    ) -> tuple[SampleSlopes | None, str | None]:
        judge, reason = self._forward.slopes(passes.reached, line, expected, anew=True)
        if judge is None and reason is None:
            return None, NO_CHECK
        if reason in (INTERACT, OTHER_TERMS):
            return None, reason
        if judge is None or not judge.repeated:
            return slopes, None
        if not self._agree(judge, slopes):
            return None, SHARES
        return judge if expected.slope is None and judge.complete else slopes, None

    def _agree(self, judge: SampleSlopes, slopes: SampleSlopes) -> bool:
        """Whether both give the same samples the same slopes."""
        if mixes_samples(innermost(self._model)) or len(judge.values) < len(slopes.values):
            return True  # on the statistics of a batch the share of each position is taken
        all_of_them = judge.values[: len(slopes.values)]
        size = judge.values.abs().max()
        limit = (TOLERANCE_HALF if self._forward.half else TOLERANCE) * size
        apart = (all_of_them - slopes.values.to(all_of_them.device)).abs().max() > limit
        return not read([apart])[0]


class Verified:
    """The part of a backend whose slopes of samples are checked now and then."""

    unaccounted: Unaccounted

    def __init__(self, check: Verification) -> None:
        """Take what checks them."""
        self._check = check

    @property
    def records(self) -> bool:
        """Whether calls of the model are to be kept for a repetition."""
        return self._check.due()

    def check_due(self) -> bool:
        """Whether losses are to be followed back to the model's outputs in the coming iteration."""
        return self._check.due()

    def doubted(self, reason: str) -> None:
        """Say so of all parameters."""
        self.unaccounted.add(ALL, reason)

    def _verified(
        self,
        passes: BackwardPasses,
        params: Sequence[Tensor],
        direction: Direction,
        expected: Expected,
        slopes: SampleSlopes | None,
    ) -> SampleSlopes | None:
        """The slopes of samples at the start of a step unless there is an objection; see `Verification.checked`."""
        slopes = self._check.checked(passes, params, direction, expected, slopes)
        if self._check.objection is not None:
            self.unaccounted.add(ALL, self._check.objection)
        return slopes

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about the model."""
        return self._check.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was learned; a backend that was not checked in versions before has learned nothing."""
        if state:
            self._check.load_state_dict(state)
