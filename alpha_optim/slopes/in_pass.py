"""What backends share that contract calls of layers while the backward pass runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPass, BackwardPasses
from alpha_optim.observe.step_direction import Change, Direction
from alpha_optim.slopes.base import Names
from alpha_optim.slopes.layers import KnownLayers, LayerCall, layers_of
from alpha_optim.slopes.recorder import SampleRecorder


class InPass(ABC):
    """Hooks the layers of a model for one iteration at a time, and knows the step that it ends."""

    def __init__(self, model: nn.Module, names: Names, sampled: bool) -> None:
        """Prepare; see `SampleRecorder` for the arguments."""
        self._recorder = SampleRecorder(names, sampled)
        self._layers = KnownLayers(lambda wanted: layers_of(model, wanted))
        self._params: Sequence[Tensor] = ()
        self._index: dict[int, int] = {}
        self._end_of: Change | None = None
        self._start = False
        self.unaccounted = self._recorder.unaccounted
        self.discard()

    def begin(self, passes: BackwardPasses, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the layers."""
        self.discard()
        self._params, self._start = params, start
        self._index = {id(param): index for index, param in enumerate(params)}
        # Shorter than the parameters if a group was added; then the pair is dropped.
        change = None if end_of is None else end_of.change()
        self._end_of = None if change is None or len(change.bases) != len(params) else change
        self._recorder.begin(passes, self._layers.of(params), self._called)

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""
        self._recorder.mute()

    def close(self) -> None:
        """Remove every hook and free what was collected."""
        self.discard()
        self._end_of = None
        self._params = ()
        self._recorder.close()

    @abstractmethod
    def discard(self) -> None:
        """Forget the passes so far."""

    @abstractmethod
    def _called(self, entry: BackwardPass, call: LayerCall, samples: int) -> None:
        """Take a layer's call, of which so many samples are wanted."""
