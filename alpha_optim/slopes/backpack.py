"""Plain SGD: projections inside the backward pass, by products of BackPACK's derivatives.

For plain SGD the step is known before it is made: -lr times the gradient. As soon as the gradient of a
parameter is complete, the layer's derivative is applied to it (start) and to the previous step (end), and
everything but one number per sample and parameter is let go.

BackPACK's product for a convolution unfolds its input, nine times its memory for a 3x3 kernel; there, and
for normalisation layers in training mode, the layer itself does the same, see `contractions`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPass
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.inner_products import at_least_float32
from alpha_optim.observe.step_direction import Direction, same_tensors
from alpha_optim.slopes.base import ALL, Expected, Names, SampleSlopes, in_pass_cost
from alpha_optim.slopes.contractions import Contraction, contraction_of
from alpha_optim.slopes.in_pass import InPass
from alpha_optim.slopes.individual import backpack_rules
from alpha_optim.slopes.layers import LayerCall
from alpha_optim.slopes.recorder import BySample, add_to, by_sample
from alpha_optim.slopes.verification import Verification, Verified


class BackpackBackend(InPass, Verified):
    """Projects onto the gradient and onto the previous step while the backward pass runs."""

    name = "backpack"

    def __init__(self, model: nn.Module, names: Names, sample_dim: int, sampled: bool) -> None:
        """Prepare; see `SampleRecorder` for the arguments."""
        InPass.__init__(self, model, names, sampled)
        Verified.__init__(self, Verification(model, sample_dim))
        self._sampled = sampled

    def cost(self, samples: int) -> float:
        """See `Backend`."""
        return in_pass_cost(samples, self._sampled)

    def accumulated(self, param: Tensor) -> None:
        """Project and let go what waits for a parameter whose gradient is complete."""
        entry, key = self._recorder.accumulated(param), id(param)
        waiting = self._waiting.get(entry, {}).pop(key, [])
        for projection in waiting:
            if (at_end := self._along_end(projection, param)) is not None:
                add_to(self._at_end.setdefault(entry, {}), key, at_end)
            if self._start and param.grad is not None:
                add_to(self._at_start.setdefault(entry, {}), key, projection.along(param.grad))
            self._projected.setdefault(entry, set()).add(key)

    def _along_end(self, waiting: _Waiting, param: Tensor) -> Tensor | None:
        if self._end_of is None:
            return None
        index = self._index[id(param)]
        base, rate = self._end_of.bases[index], self._end_of.rates[index]
        return None if base is None else waiting.along(base) * rate

    def discard(self) -> None:
        """Forget the passes so far."""
        self._waiting: dict[BackwardPass, dict[int, list[_Waiting]]] = {}
        self._at_end: BySample = {}
        self._at_start: BySample = {}
        self._projected: dict[BackwardPass, set[int]] = {}
        self._recorder.discard()

    def end_slopes(self, direction: Direction, point: Sequence[Tensor]) -> SampleSlopes | None:
        """Slopes along the previous step."""
        if self._check.objection is not None:
            return None
        return self._combine(self._at_end, lambda values, key: values)

    def start_slopes(self, direction: Direction, gradients: LossGradients, expected: Expected) -> SampleSlopes | None:
        """Slopes along the step just made, from projections on the gradient.

        With several backward passes the gradient was not complete when the first was projected, and with
        gradients changed by more than a factor the step is no multiple of it; those measurements keep the
        slopes of the gradients.
        """
        change = direction.change()
        if not change.of_gradient:
            return None  # the optimizer is no longer plain SGD
        reason = None
        if len(self._recorder.passes.reached) != 1:
            reason = "several backward passes per step"
        elif not same_tensors(change.bases, gradients.tensors):
            reason = "the step is no multiple of the gradient"
        if reason is not None:
            self.unaccounted.add(ALL, f"{reason}; backend='layerwise' can")
            return None
        rates = {id(param): rate for param, rate in zip(self._params, change.rates, strict=True)}
        factor = 1.0 if gradients.factor is None else gradients.factor

        # What made the step is the gradient times what happened to it since the backward pass.
        slopes = self._combine(self._at_start, lambda values, key: values * rates[key] * factor)
        return self._verified(self._recorder.passes, self._params, direction, expected, slopes)

    def _combine(self, store: BySample, scaled: Callable[[Tensor, int], Tensor]) -> SampleSlopes | None:
        by_parameter = {
            entry: {key: scaled(values, key) for key, values in groups.items()} for entry, groups in store.items()
        }
        return self._recorder.combine(
            lambda entry: None if self._missing(entry) else list(by_parameter.get(entry, {}).values())
        )

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
                waiting.setdefault(id(param), []).append(_Waiting(name, per_sample, contraction))


@dataclass(frozen=True)
class _Waiting:
    """A call that waits until the gradient of a parameter is complete."""

    name: str
    per_sample: int
    contraction: Contraction

    def along(self, change: Tensor) -> Tensor:
        """Contract with a change of the parameter, one number per sample."""
        return by_sample(self.contraction.along({self.name: change}), self.per_sample)


class BackpackProduct:
    """A linear layer's derivative times changes of its parameters, by the rule of our BackPACK extension."""

    def __init__(self, call: LayerCall, rows: int) -> None:
        """Keep the rows of the call on a stand-in, where BackPACK looks for them."""
        call.check_unaltered()
        call = call.first(rows)
        self._gradient = at_least_float32(call.output_gradient)
        self._standin = copy.copy(call.layer.module)
        self._standin.input0 = call.args[0].to(self._gradient.dtype)
        self._standin.output = self._gradient

    def along(self, changes: dict[str, Tensor]) -> Tensor:
        """See `Contraction`."""
        rule, gradient = _linear_rule(), self._gradient
        parts = [
            rule.along(self._standin, name, gradient, change.to(gradient.dtype)) for name, change in changes.items()
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


@lru_cache(maxsize=1)
def _linear_rule() -> Any:
    from alpha_optim.slopes.backpack_extension import LayerSlopes

    return LayerSlopes(backpack_rules()[nn.Linear])
