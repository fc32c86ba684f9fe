"""Any optimizer: individual gradients cached at both ends and reduced right after the step.

The reference: plain, complete and hungry for memory (N times the parameters while an iteration is
watched; afterwards only the direction and numbers per sample).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPass, BackwardPasses
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.step_direction import Change, Direction
from alpha_optim.slopes.base import Expected, Names, SampleSlopes, in_pass_cost
from alpha_optim.slopes.individual import NEEDS_OUTPUT, individual_gradients
from alpha_optim.slopes.layers import KnownLayers, LayerCall, layers_of
from alpha_optim.slopes.recorder import SampleRecorder, add_to, project
from alpha_optim.slopes.verification import Verification, Verified


class CachedBackend(Verified):
    """Caches the individual gradients of the iteration."""

    name = "cached"

    def __init__(self, model: nn.Module, names: Names, sample_dim: int, sampled: bool) -> None:
        """Prepare; see `SampleRecorder` for the arguments."""
        self._recorder = SampleRecorder(names, sampled, NEEDS_OUTPUT)
        self._layers = KnownLayers(lambda wanted: layers_of(model, wanted))
        self._sampled = sampled
        self._gradients: dict[BackwardPass, dict[int, Tensor]] = {}
        self._params: Sequence[Tensor] = ()
        self.unaccounted = self._recorder.unaccounted
        super().__init__(Verification(model, sample_dim))

    def cost(self, samples: int) -> float:
        """See `Backend`; there is no hurry for a reference."""
        return in_pass_cost(samples, self._sampled)

    def begin(self, passes: BackwardPasses, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the model."""
        self._params = params
        self._gradients = {}
        self._recorder.begin(passes, self._layers.of(params), self._called)

    def accumulated(self, param: Tensor) -> None:
        """Note that the pass reached a parameter."""
        self._recorder.accumulated(param)

    def discard(self) -> None:
        """Forget the passes so far."""
        self._gradients = {}
        self._recorder.discard()

    def end_slopes(self, direction: Direction, point: Sequence[Tensor]) -> SampleSlopes | None:
        """Reduce the cached gradients along the previous step."""
        if self._check.objection is not None:
            return None
        return self._reduce(direction.change())

    def start_slopes(self, direction: Direction, gradients: LossGradients, expected: Expected) -> SampleSlopes | None:
        """Reduce the cached gradients along the step just made."""
        slopes = self._reduce(direction.change())
        return self._verified(self._recorder.passes, self._params, direction, expected, slopes)

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

    def _reduce(self, change: Change) -> SampleSlopes | None:
        changes = dict(zip(map(id, self._params), change.tensors(), strict=True))

        def projections_of(entry: BackwardPass) -> list[Tensor] | None:
            cache = self._gradients.get(entry, {})
            if self._recorder.missing(entry, set(cache)):
                return None
            return [
                project(values, change) for key, values in cache.items() if (change := changes.get(key)) is not None
            ]

        return self._recorder.combine(projections_of)
