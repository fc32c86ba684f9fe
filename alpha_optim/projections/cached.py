"""Any optimizer: individual gradients cached at both ends and reduced right after the step.

The reference: plain, complete and hungry for memory (N times the parameters while an iteration is
watched; afterwards only the direction and numbers per sample).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alpha_optim.direction import Direction
from alpha_optim.passes import BackwardPass, PassLog
from alpha_optim.projections.base import Names, SampleSlopes
from alpha_optim.projections.recorder import SampleRecorder, project


class CachedBackend:
    """Caches the individual gradients of the iteration."""

    name = "cached"

    def __init__(self, model: nn.Module, names: Names, log: PassLog, sampled: bool) -> None:
        """Prepare; see `SampleRecorder` for the arguments."""
        self._recorder = SampleRecorder(model, names, log, sampled)
        self._gradients: dict[BackwardPass, dict[int, Tensor]] = {}
        self._params: Sequence[Tensor] = ()
        self.unaccounted = self._recorder.unaccounted

    def begin(self, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the model."""
        self._params = params
        self._gradients = {}
        self._recorder.begin(params, self._store)

    def accumulated(self, param: Tensor) -> None:
        """Note that the pass reached a parameter."""
        self._recorder.accumulated(param)

    def discard(self) -> None:
        """Forget the passes so far."""
        self._gradients = {}
        self._recorder.discard()

    def end_slopes(self, direction: Direction) -> SampleSlopes | None:
        """Reduce the cached gradients along the previous step."""
        return self._reduce(direction)

    def start_slopes(self, direction: Direction, gradients: Sequence[Tensor | None]) -> SampleSlopes | None:
        """Reduce the cached gradients along the step just made."""
        return self._reduce(direction)

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""
        self._recorder.mute()

    def close(self) -> None:
        """Remove every hook and free the gradients."""
        self._gradients = {}
        self._recorder.close()

    def _store(self, entry: BackwardPass, param: Tensor, gradients: Tensor) -> None:
        cache = self._gradients.setdefault(entry, {})
        earlier = cache.get(id(param))
        if earlier is None or len(earlier) == len(gradients):  # else the pass is mixed, and refused
            cache[id(param)] = gradients if earlier is None else earlier + gradients

    def _reduce(self, direction: Direction) -> SampleSlopes | None:
        if self._recorder.refused():
            return None
        parts, taken = [], 0
        changes = dict(zip(map(id, self._params), direction.changes, strict=True))
        for entry in self._recorder.sampled_passes():
            cache = self._gradients.get(entry, {})
            if self._recorder.missing(entry, set(cache)):
                return None
            projections = [
                project(values, change)
                for key, values in cache.items()
                if (change := changes.get(key)) is not None
            ]
            if projections:
                total = torch.stack([value.to(projections[0].device) for value in projections]).sum(0)
                parts.append(total * self._recorder.scale(entry))
                taken += self._recorder.taken[entry]
        if not parts:
            return None
        return SampleSlopes(torch.cat(parts), complete=taken == self._recorder.total_samples())
