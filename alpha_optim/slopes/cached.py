"""Any optimizer: individual gradients cached at both ends and reduced right after the step.

The reference: plain, complete and hungry for memory (N times the parameters while an iteration is
watched; afterwards only the direction and numbers per sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPass, PassLog
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.step_direction import Direction
from alpha_optim.slopes.base import Names, SampleSlopes
from alpha_optim.slopes.individual import NEEDS_OUTPUT, individual_gradients
from alpha_optim.slopes.layers import KnownLayers, LayerCall, layers_of
from alpha_optim.slopes.recorder import SampleRecorder, add_to, project


class CachedBackend:
    """Caches the individual gradients of the iteration."""

    name = "cached"

    def __init__(self, model: nn.Module, names: Names, log: PassLog, sampled: bool) -> None:
        """Prepare; see `SampleRecorder` for the arguments."""
        self._recorder = SampleRecorder(names, log, sampled, NEEDS_OUTPUT)
        self._layers = KnownLayers(partial(layers_of, model))
        self._gradients: dict[BackwardPass, dict[int, Tensor]] = {}
        self._params: Sequence[Tensor] = ()
        self.unaccounted = self._recorder.unaccounted

    def begin(self, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the model."""
        self._params = params
        self._gradients = {}
        self._recorder.begin(self._layers.of(params), self._called)

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

    def start_slopes(self, direction: Direction, gradients: LossGradients) -> SampleSlopes | None:
        """Reduce the cached gradients along the step just made."""
        return self._reduce(direction)

    def verified(self, of_parameters: Tensor, known: Tensor) -> Tensor | None:
        """Return None: what is cached are the parts of the gradient themselves."""
        return None

    def read_check(self) -> None:
        """Fetch nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""
        self._recorder.mute()

    def close(self) -> None:
        """Remove every hook and free the gradients."""
        self._gradients = {}
        self._recorder.close()

    def _called(self, entry: BackwardPass, call: LayerCall, samples: int) -> None:
        assert entry.samples is not None
        cache = self._gradients.setdefault(entry, {})
        for name, values in individual_gradients(call, entry.samples, samples).items():
            add_to(cache, id(call.layer.params[name]), values)

    def _reduce(self, direction: Direction) -> SampleSlopes | None:
        changes = dict(zip(map(id, self._params), direction.changes, strict=True))

        def projections_of(entry: BackwardPass) -> list[Tensor] | None:
            cache = self._gradients.get(entry, {})
            if self._recorder.missing(entry, set(cache)):
                return None
            return [
                project(values, change)
                for key, values in cache.items()
                if (change := changes.get(key)) is not None
            ]

        return self._recorder.combine(projections_of)
