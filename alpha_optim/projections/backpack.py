"""Plain SGD: projections inside the backward pass, on BackPACK's individual gradients.

For plain SGD the step is known before it is made: -lr times the gradient. As soon as the gradient of
a parameter is complete, its individual gradients are projected onto it (start) and onto the previous
step (end) and freed. Kept are numbers per sample and parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alpha_optim.direction import Direction, inner_product
from alpha_optim.passes import BackwardPass, PassLog
from alpha_optim.projections.base import Names, SampleSlopes
from alpha_optim.projections.recorder import SampleRecorder, add_gradients, project

PARALLEL = 1e-4
"""Relative squared distance up to which a clipped gradient counts as a multiple of the gradient."""

_Projections = dict[BackwardPass, dict[int, Tensor]]


class BackpackBackend:
    """Projects individual gradients while the backward pass runs."""

    name = "backpack"

    def __init__(self, model: nn.Module, names: Names, log: PassLog, sampled: bool) -> None:
        """Prepare; see `SampleRecorder` for the arguments."""
        self._recorder = SampleRecorder(model, names, log, sampled)
        self._log = log
        self._params: Sequence[Tensor] = ()
        self._changes: dict[int, Tensor | None] = {}
        self._start = False
        self.unaccounted = self._recorder.unaccounted
        self.discard()

    def begin(self, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the model."""
        self.discard()
        self._params, self._start = params, start
        changes = end_of.changes if end_of is not None else []
        # Shorter than the parameters if a group was added; then the pair is dropped.
        self._changes = dict(zip(map(id, params), changes, strict=False))
        self._recorder.begin(params, self._store)

    def accumulated(self, param: Tensor) -> None:
        """Project and free the individual gradients of a parameter whose gradient is complete."""
        entry = self._recorder.accumulated(param)
        gradients = self._buffers.get(entry, {}).pop(id(param), None)
        if gradients is None or param.grad is None:
            return
        key = id(param)
        change = self._changes.get(key)
        if change is not None:
            self._at_end.setdefault(entry, {})[key] = project(gradients, change)
        if self._start:
            self._at_start.setdefault(entry, {})[key] = project(gradients, param.grad)
        self._projected.setdefault(entry, set()).add(key)

    def discard(self) -> None:
        """Forget the passes so far."""
        self._buffers: _Projections = {}
        self._at_end: _Projections = {}
        self._at_start: _Projections = {}
        self._projected: dict[BackwardPass, set[int]] = {}
        self._recorder.discard()

    def end_slopes(self, direction: Direction) -> SampleSlopes | None:
        """Per-sample slopes along the previous step."""
        return self._recorder.combine(
            lambda entry: None if self._missing(entry) else list(self._at_end.get(entry, {}).values())
        )

    def start_slopes(self, direction: Direction, gradients: Sequence[Tensor | None]) -> SampleSlopes | None:
        """Per-sample slopes along the step just made, from projections on the gradient.

        With several backward passes the gradient was not complete when the first was projected; those
        measurements keep the slopes of the gradients.
        """
        if len(self._log.reached) != 1:
            several = "several backward passes per step; backend='cached' can"
            self.unaccounted.add(["all parameters"], several)
            return None

        def projections_of(entry: BackwardPass) -> list[Tensor] | None:
            if self._missing(entry):
                return None
            projections = self._at_start.get(entry, {})
            return [
                _multiple(change, gradient).to(projections[id(param)].device) * projections[id(param)]
                for param, change, gradient in zip(self._params, direction.changes, gradients, strict=True)
                if id(param) in projections and change is not None and gradient is not None
            ]

        return self._recorder.combine(projections_of)

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""
        self._recorder.mute()

    def close(self) -> None:
        """Remove every hook and free the numbers."""
        self.discard()
        self._recorder.close()

    def _missing(self, entry: BackwardPass) -> bool:
        """Whether a parameter has no projections, or was not watched (unfrozen after the step)."""
        unfinished = bool(self._buffers.get(entry))
        return self._recorder.missing(entry, self._projected.get(entry, set())) or unfinished

    def _store(self, entry: BackwardPass, param: Tensor, gradients: Tensor) -> None:
        add_gradients(self._buffers.setdefault(entry, {}), param, gradients)


def _multiple(change: Tensor, gradient: Tensor) -> Tensor:
    """Factor between a gradient and the step made of it; nan if it is not a multiple.

    It is -lr, times a common factor after clipping by norm. Clipping by value turns the direction; then
    the projections on the gradient are not those on the step.
    """
    along, squared = inner_product([change], [gradient]), inner_product([gradient], [gradient])
    length = inner_product([change], [change])
    factor = torch.where(squared == 0, 0.0, along / squared)
    aside = length - factor * along
    return torch.where(aside <= PARALLEL * length, factor, torch.nan)
