"""Plain SGD: projections inside the backward pass, by products of BackPACK's derivatives.

For plain SGD the step is known before it is made: -lr times the gradient. As soon as the gradient of a
parameter is complete, the layer's derivative is applied to it (start) and to the previous step (end), and
everything but one number per sample and parameter is let go.

BackPACK's product for a convolution unfolds its input, nine times its memory for a 3x3 kernel; there, and
for normalisation layers in training mode, the layer itself does the same, see `contractions`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from alpha_optim.direction import Direction
from alpha_optim.gradient_watch import LossGradients
from alpha_optim.passes import BackwardPass, PassLog
from alpha_optim.projections.base import Names, SampleSlopes
from alpha_optim.projections.contractions import Contraction, contraction_of, layers_to_contract, rowwise
from alpha_optim.projections.layers import KnownLayers, LayerCall
from alpha_optim.projections.recorder import SampleRecorder, add_to

_BySample = dict[BackwardPass, dict[int, Tensor]]


class BackpackBackend:
    """Projects onto the gradient and onto the previous step while the backward pass runs."""

    name = "backpack"

    def __init__(self, model: nn.Module, names: Names, log: PassLog, sampled: bool) -> None:
        """Prepare; see `SampleRecorder` for the arguments."""
        self._recorder = SampleRecorder(names, log, sampled)
        self._layers = KnownLayers(partial(layers_to_contract, model))
        self._log = log
        self._params: Sequence[Tensor] = ()
        self._end_of: Direction | None = None
        self._start = False
        self.unaccounted = self._recorder.unaccounted
        self.discard()

    def begin(self, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the model."""
        self.discard()
        self._params, self._start = params, start
        # Shorter than the parameters if a group was added; then the pair is dropped.
        self._end_of = None if end_of is None or len(end_of.bases) != len(params) else end_of
        self._index = {id(param): index for index, param in enumerate(params)}
        self._recorder.begin(self._layers.of(params), self._called)

    def accumulated(self, param: Tensor) -> None:
        """Project and let go what waits for a parameter whose gradient is complete."""
        entry, key = self._recorder.accumulated(param), id(param)
        for name, per_sample, contraction in self._waiting.get(entry, {}).pop(key, []):
            base = None if self._end_of is None else self._end_of.bases[self._index[key]]
            if self._end_of is not None and base is not None:
                values = contraction.along({name: base}) * self._end_of.rates[self._index[key]]
                add_to(self._at_end.setdefault(entry, {}), key, _by_sample(values, per_sample))
            if self._start and param.grad is not None:
                values = contraction.along({name: param.grad})
                add_to(self._at_start.setdefault(entry, {}), key, _by_sample(values, per_sample))
            self._projected.setdefault(entry, set()).add(key)

    def discard(self) -> None:
        """Forget the passes so far."""
        self._waiting: dict[BackwardPass, dict[int, list[tuple[str, int, Contraction]]]] = {}
        self._at_end: _BySample = {}
        self._at_start: _BySample = {}
        self._projected: dict[BackwardPass, set[int]] = {}
        self._recorder.discard()

    def end_slopes(self, direction: Direction) -> SampleSlopes | None:
        """Per-sample slopes along the previous step."""
        return self._recorder.combine(
            lambda entry: None if self._missing(entry) else list(self._at_end.get(entry, {}).values())
        )

    def start_slopes(self, direction: Direction, gradients: LossGradients) -> SampleSlopes | None:
        """Per-sample slopes along the step just made, from projections on the gradient.

        With several backward passes the gradient was not complete when the first was projected, and with
        gradients changed by more than a factor the step is no multiple of it; those measurements keep the
        slopes of the gradients.
        """
        reason = None
        if not direction.of_gradient:
            return None  # the optimizer is no longer plain SGD
        if len(self._log.reached) != 1:
            reason = "several backward passes per step; backend='layerwise' can"
        elif not all(
            base is gradient for base, gradient in zip(direction.bases, gradients.tensors, strict=True)
        ):
            reason = "the step is no multiple of the gradient; backend='layerwise' can"
        if reason is not None:
            self.unaccounted.add(["all parameters"], reason)
            return None
        rates = {id(param): rate for param, rate in zip(self._params, direction.rates, strict=True)}

        def projections_of(entry: BackwardPass) -> list[Tensor] | None:
            if self._missing(entry):
                return None
            projections = self._at_start.get(entry, {})
            # What made the step is the gradient times what happened to it since the backward pass.
            return [values * rates[key] * gradients.factor for key, values in projections.items()]

        return self._recorder.combine(projections_of)

    def verified(self, of_parameters: Tensor, known: Tensor) -> Tensor | None:
        """Return None: parameters without projections are known by name already."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""
        self._recorder.mute()

    def close(self) -> None:
        """Remove every hook and free the numbers."""
        self.discard()
        self._recorder.close()

    def _missing(self, entry: BackwardPass) -> bool:
        """Whether a parameter has no projections, or was not watched (unfrozen after the step)."""
        unfinished = any(self._waiting.get(entry, {}).values())
        return self._recorder.missing(entry, self._projected.get(entry, set())) or unfinished

    def _called(self, entry: BackwardPass, call: LayerCall, samples: int) -> None:
        assert entry.samples is not None
        per_sample = call.rows_per_sample(entry.samples)
        linear = type(call.layer.module) is nn.Linear and bool(call.args)
        make: Any = BackpackProduct if linear else contraction_of
        contraction = make(call, samples * per_sample)
        waiting = self._waiting.setdefault(entry, {})
        for name, param in call.layer.params.items():
            if param.requires_grad:
                waiting.setdefault(id(param), []).append((name, per_sample, contraction))


class BackpackProduct:
    """A linear layer's derivative times changes of its parameters, by BackPACK."""

    def __init__(self, call: LayerCall, rows: int) -> None:
        """Keep the rows of the call on a stand-in, where BackPACK looks for them."""
        call.check_unaltered()
        call = call.first(rows)
        half = call.output_gradient.element_size() == 2
        self._gradient = call.output_gradient.float() if half else call.output_gradient
        self._standin = copy.copy(call.layer.module)
        self._standin.input0 = call.args[0].to(self._gradient.dtype)
        self._standin.output = self._gradient

    def along(self, changes: dict[str, Tensor], made: float | Tensor = 0.0) -> Tensor:
        """See `Contraction`."""
        rule, total = _linear_rule(), None
        for name, change in changes.items():
            product = rule.weight_jac_mat_prod if name == "weight" else rule.bias_jac_mat_prod
            mat = change.to(self._gradient.dtype)
            moved = rowwise(product(self._standin, (), (self._gradient,), mat), self._gradient)
            total = moved if total is None else total + moved
        assert total is not None
        return total


@lru_cache(maxsize=1)
def _linear_rule() -> Any:
    from backpack.core.derivatives.linear import LinearDerivatives

    return LinearDerivatives()


def _by_sample(rows: Tensor, per_sample: int) -> Tensor:
    return rows if per_sample == 1 else rows.reshape(-1, per_sample).sum(1)
