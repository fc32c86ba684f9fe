"""Slopes of samples from layer inputs and output gradients, by the rules of layers that have one.

No individual gradient is formed. A layer's call is contracted with the previous step as soon as the
gradient of its output arrives, and with the coming step once that is known; until then inputs and
output gradients of the samples in question are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPass
from alpha_optim.observe.inner_products import common_rate
from alpha_optim.observe.step_direction import Change
from alpha_optim.slopes.base import Names, SampleSlopes
from alpha_optim.slopes.contractions import Contraction, contraction_of, has_rule
from alpha_optim.slopes.in_pass import InPass
from alpha_optim.slopes.layers import Layer, LayerCall, UnsupportedLayerError, layers_of
from alpha_optim.slopes.recorder import BySample, add_to, by_sample


@dataclass(frozen=True)
class _Prepared:
    """A call of a layer, ready to be contracted with a step."""

    layer: Layer
    per_sample: int
    contraction: Contraction


def without_rule(model: nn.Module, wanted: set[int], names: Names) -> list[str]:
    """Names and types of the layers with parameters of the optimizer that have no rule.

    Args:
        model: The model.
        wanted: ``id`` of the parameters.
        names: Names of the parameters.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    return [
        f"{paths[id(layer.module)] or 'the model itself'} ({type(layer.module).__name__})"
        for layer in layers_of(model, wanted)
        if not has_rule(layer.module)
    ]


class LayerRules(InPass):
    """Contracts every layer's call with the change of its parameters."""

    def accumulated(self, param: Tensor) -> None:
        """Note that the pass reached a parameter."""
        self._recorder.accumulated(param)

    def discard(self) -> None:
        """Forget the passes so far."""
        self._at_end: BySample = {}
        self._kept: dict[BackwardPass, list[_Prepared]] = {}
        self._covered: dict[BackwardPass, set[int]] = {}
        self._recorder.discard()

    def end_slopes(self) -> SampleSlopes | None:
        """Slopes along the previous step, contracted while the passes ran."""
        return self._combine(self._at_end)

    def start_slopes(self, change: Change) -> SampleSlopes | None:
        """Contract what was kept with the step just made."""
        at_start: BySample = {}
        for entry, calls in self._kept.items():
            store = at_start.setdefault(entry, {})
            for call in calls:
                try:
                    self._add(store, call, change)
                except UnsupportedLayerError as error:  # noqa: PERF203 - for one call of many
                    self._recorder.failed(entry, call.layer, str(error))
        self._kept = {}
        return self._combine(at_start)

    # ---------------------------------------------------------------- inside the backward pass

    def _called(self, entry: BackwardPass, call: LayerCall, samples: int) -> None:
        assert entry.samples is not None
        per_sample = call.rows_per_sample(entry.samples)
        layer = Layer(call.layer.module, {n: p for n, p in call.layer.params.items() if p.requires_grad})
        prepared = _Prepared(layer, per_sample, contraction_of(call, samples * per_sample))
        if self._end_of is not None:
            self._add(self._at_end.setdefault(entry, {}), prepared, self._end_of)
        if self._start:
            self._kept.setdefault(entry, []).append(prepared)
        self._covered.setdefault(entry, set()).update(map(id, call.layer.params.values()))

    def _add(self, store: dict[int, Tensor], call: _Prepared, change: Change) -> None:
        """Contract one call with a step, and add the result to that of its layer."""
        changes, rate = self._changes(call.layer, change)
        if changes:
            rows = call.contraction.along(changes) * rate
            add_to(store, id(call.layer.module), by_sample(rows, call.per_sample))

    def _changes(self, layer: Layer, change: Change) -> tuple[dict[str, Tensor], Any]:
        """Changes of a layer's parameters by local name, up to one common rate."""
        moved = {}
        for name, param in layer.params.items():
            index = self._index.get(id(param))
            base = None if index is None else change.bases[index]
            if index is not None and base is not None:
                moved[name] = (base, change.rates[index])
        common = common_rate([rate for _, rate in moved.values()])
        if common is not None:
            return {name: base for name, (base, _) in moved.items()}, common
        return {name: base * rate for name, (base, rate) in moved.items()}, 1.0

    # ---------------------------------------------------------------- putting together

    def _combine(self, by_sample: BySample) -> SampleSlopes | None:
        def projections_of(entry: BackwardPass) -> list[Tensor] | None:
            covered = self._covered.get(entry, set())
            if self._recorder.missing(entry, covered):
                return None
            groups = by_sample.get(entry, {})
            if len({len(values) for values in groups.values()}) > 1:
                return None
            return list(groups.values())

        return self._recorder.combine(projections_of)
