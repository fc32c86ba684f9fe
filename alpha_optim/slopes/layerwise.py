"""Any optimizer, any model: slopes of samples from layer inputs and output gradients.

No individual gradient is formed. A layer's call is contracted with the previous step as soon as the
gradient of its output arrives, and with the coming step once that is known; until then inputs and
output gradients of the samples in question are kept. Where parameters are used outside the calls of the
modules that own them, the model as a whole takes the place of its layers.

What the samples contribute to a group of parameters has to add up to <change, gradient> of that group.
That is checked whenever all samples take part: always with ``variance="exact"``, and at the first end of a
step otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPass, PassLog
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.module_copy import compiled
from alpha_optim.observe.step_direction import Direction, common_rate
from alpha_optim.slopes.base import Names, SampleSlopes
from alpha_optim.slopes.contractions import Contraction, contraction_of, layers_to_contract
from alpha_optim.slopes.forward_mode import ForwardMode
from alpha_optim.slopes.gram import Factors, GradientsAsFactors
from alpha_optim.slopes.layers import (
    KnownLayers,
    Layer,
    LayerCall,
    UnsupportedLayerError,
    wanted_parameters,
)
from alpha_optim.slopes.recorder import BySample, SampleRecorder, add_to
from alpha_optim.slopes.self_check import NOT_ADDED_UP, SelfCheck


@dataclass(frozen=True)
class _Prepared:
    """A call of a layer, ready to be contracted with a step; ``factors`` for inner products of samples."""

    layer: Layer
    per_sample: int
    contraction: Contraction
    factors: Factors | None


class LayerwiseBackend:
    """Contracts every layer's call with the change of its parameters."""

    name = "layerwise"

    def __init__(self, model: nn.Module, names: Names, log: PassLog, sampled: bool) -> None:
        """Prepare; see `SampleRecorder` for the arguments."""
        self._model, self._names = model, names
        self._recorder = SampleRecorder(names, log, sampled)
        self._layers = KnownLayers(self._find)
        self._check = SelfCheck(names)
        self._gram = GradientsAsFactors()
        self._log, self._exact = log, not sampled
        self._whole_model = self._gave_up_layers = compiled(model) is not None
        self._end_of: Direction | None = None
        self._start = False
        self._index: dict[int, int] = {}
        self.unaccounted = self._recorder.unaccounted
        self.discard()

    def _find(self, wanted: set[int]) -> list[Layer]:
        """Layers of the model, or the model as the only one."""
        if self._whole_model:
            inside = compiled(self._model) or self._model
            return [Layer(self._model, wanted_parameters(inside, wanted, recurse=True), replayed=True)]
        return layers_to_contract(self._model, wanted)

    def begin(self, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the model."""
        self.discard()
        if self._gave_up_layers and not self._whole_model:
            self._whole_model, self._check.done = True, True
            self._layers = KnownLayers(self._find)
        layers = self._layers.of(params)
        self._check.watch(layers, params)
        self._start, self._end_of = start, end_of
        # Shorter than the parameters if a group was added; then the pair is dropped.
        if end_of is not None and len(end_of.bases) != len(params):
            self._end_of = None
        self._index = {id(param): index for index, param in enumerate(params)}
        self._gram.begin(params)
        self._recorder.begin(layers, self._called)

    def accumulated(self, param: Tensor) -> None:
        """Note that the pass reached a parameter."""
        self._recorder.accumulated(param)

    def discard(self) -> None:
        """Forget the passes so far."""
        self._at_end: BySample = {}
        self._kept: dict[BackwardPass, list[_Prepared]] = {}
        self._covered: dict[BackwardPass, set[int]] = {}
        self._gram.discard()
        self._recorder.discard()

    def end_slopes(self, direction: Direction) -> SampleSlopes | None:
        """Per-sample slopes along the previous step, contracted while the passes ran."""
        slopes = self._combine(self._at_end)
        self._gram.ended()
        return slopes

    def start_slopes(self, direction: Direction, gradients: LossGradients) -> SampleSlopes | None:
        """Contract what was kept with the step just made; None if the layers have been given up meanwhile."""
        if self._gave_up_layers and not self._whole_model:
            self._kept = {}
            return None
        self._gram.stepped(direction, gradients, len(self._log.reached), self._recorder.incomplete())
        at_start: BySample = {}
        for entry, calls in self._kept.items():
            store = at_start.setdefault(entry, {})
            for call in calls:
                self._contract_start(entry, store, call, direction)
        self._kept = {}
        return self._combine(at_start)

    def _contract_start(
        self, entry: BackwardPass, store: dict[int, Tensor], call: _Prepared, direction: Direction
    ) -> None:
        try:
            self._add(store, call, direction, made=True)
        except UnsupportedLayerError as error:
            self._recorder.failed(entry, call.layer, str(error))

    def verified(self, of_parameters: Tensor, known: Tensor) -> Tensor | None:
        """Whether the samples of the last answer add up to the gradient ``[]``; None if not all took part."""
        passed = self._check.passed(of_parameters, known)
        if passed is not None and passed.device.type == "cpu":
            self.read_check()
        return passed

    def read_check(self) -> None:
        """Fetch the outcome of the check from the device, and draw conclusions where it failed."""
        failed = self._check.read()
        if failed and not self._gram.give_up():
            self._give_up_layers(failed, NOT_ADDED_UP)

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""
        self._recorder.mute()

    def close(self) -> None:
        """Remove every hook and free what was collected."""
        self.discard()
        self._end_of = None
        self._recorder.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about the model."""
        learned = {"whole_model": self._gave_up_layers, "verified": self._check.done}
        return {**learned, **self._gram.state_dict(self._index)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was learned about the model."""
        self._whole_model = self._gave_up_layers = bool(state["whole_model"])
        self._check.done = bool(state["verified"])
        self._layers = KnownLayers(self._find)
        self._gram.load_state_dict(state)

    # ---------------------------------------------------------------- inside the backward pass

    def _called(self, entry: BackwardPass, call: LayerCall, samples: int) -> None:
        assert entry.samples is not None
        per_sample = call.rows_per_sample(entry.samples)
        layer = Layer(call.layer.module, {n: p for n, p in call.layer.params.items() if p.requires_grad})
        make: Any = ForwardMode if self._whole_model else contraction_of
        factors = self._factors(call, per_sample)

        def first(count: int) -> _Prepared:
            return _Prepared(layer, per_sample, make(call, count * per_sample), factors)

        prepared = None
        if self._end_of is not None:
            prepared = first(samples if self._check.done else entry.samples)
            self._add(self._at_end.setdefault(entry, {}), prepared, self._end_of)
        if self._start:
            if prepared is None or (samples < entry.samples and not self._check.done):
                prepared = first(samples)
            self._kept.setdefault(entry, []).append(prepared)
            if "weight" in layer.params:
                self._gram.note(layer.params["weight"], factors)
        self._covered.setdefault(entry, set()).update(map(id, call.layer.params.values()))

    def _factors(self, call: LayerCall, per_sample: int) -> Factors | None:
        """The gradient of the call's weight as a product, where all samples take part."""
        return Factors.of(call) if self._exact and per_sample == 1 and not self._whole_model else None

    def _add(self, store: dict[int, Tensor], call: _Prepared, direction: Direction, made: bool = False) -> None:
        """Contract one call with a step, made or not, and add the result to its group."""
        changes, rate = self._changes(call.layer, direction)
        if not changes:
            return
        rows = None
        if "weight" in changes:
            rows = self._gram.along_last_step(call.layer.params["weight"], call.factors)
        if rows is not None:
            del changes["weight"]
            rows = rows * direction.rates[self._index[id(call.layer.params["weight"])]]
        if changes:
            others = call.contraction.along(changes, rate if made else 0.0) * rate
            rows = others if rows is None else rows + others
        assert rows is not None
        values = rows if call.per_sample == 1 else rows.reshape(-1, call.per_sample).sum(1)
        add_to(store, self._check.group_of(call.layer), values)

    def _changes(self, layer: Layer, direction: Direction) -> tuple[dict[str, Tensor], Any]:
        """Changes of a layer's parameters by local name, up to one common rate."""
        moved = {}
        for name, param in layer.params.items():
            index = self._index.get(id(param))
            base = None if index is None else direction.bases[index]
            if index is not None and base is not None:
                moved[name] = (base, direction.rates[index])
        common = common_rate([rate for _, rate in moved.values()])
        if common is not None:
            return {name: base for name, (base, _) in moved.items()}, common
        return {name: base * rate for name, (base, rate) in moved.items()}, 1.0

    # ---------------------------------------------------------------- putting together

    def _combine(self, by_sample: BySample) -> SampleSlopes | None:
        def projections_of(entry: BackwardPass) -> list[Tensor] | None:
            covered = self._covered.get(entry, set())
            unseen = self._recorder.unseen(entry, covered)
            if unseen and not self._whole_model:
                names = sorted(self._names.get(key, "?") for key in unseen)
                self._give_up_layers(names, "it got a gradient outside the calls of the modules that own it")
                return None
            if self._recorder.missing(entry, covered):
                return None
            groups = by_sample.get(entry, {})
            if len({len(values) for values in groups.values()}) > 1:
                return None
            return list(groups.values())

        slopes = self._recorder.combine(projections_of)
        # Of the whole model everything is accounted for; what is missing does not come through its output (a
        # penalty on the parameters) and is the same for all samples.
        passes = [] if self._whole_model else self._recorder.sampled_passes()
        self._check.collect(slopes, [by_sample.get(entry, {}) for entry in passes])
        return slopes

    def _give_up_layers(self, names: list[str], reason: str) -> None:
        """From the next iteration on the whole model takes the place of its layers."""
        if not self._gave_up_layers:
            reason += "; from here on the whole model is differentiated along the step"
            self._gave_up_layers = True
        self.unaccounted.add(names, reason)
