"""Linear layers under plain SGD: a contraction with a gradient through inner products of samples.

The gradient of a linear layer is the sum of b_j a_j^T over samples j, so that contracted with it sample i
contributes the sum over j of (a_i . a_j)(b_i . b_j). For few samples and wide layers that is cheaper than
the product with the gradient: N^2 (in + out) multiplications instead of N in out. The gradient of the
previous step, along which the end is measured, is known by the factors kept from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alpha_optim.direction import Direction
from alpha_optim.gradient_watch import LossGradients
from alpha_optim.projections.layers import LayerCall, version_of
from alpha_optim.scalars import Scalar


@dataclass(frozen=True)
class Factors:
    """Inputs ``[N, in]`` and output gradients ``[N, out]`` of one call: a gradient as a product.

    Attributes:
        inputs: The inputs.
        gradients: The gradients of the outputs.
        version: Version of the inputs at the call.
    """

    inputs: Tensor
    gradients: Tensor
    version: int

    @classmethod
    def of(cls, call: LayerCall) -> Factors | None:
        """Factors of a call of a linear layer on plain rows; None for anything else."""
        gradient = call.output_gradient
        if type(call.layer.module) is not nn.Linear or not call.args or gradient.dim() != 2:
            return None
        if call.args[0].dtype != gradient.dtype or gradient.element_size() < 4:
            return None
        return cls(call.args[0], gradient, version_of(call.args[0]))

    def cheaper_than_product(self, other: Factors) -> bool:
        """Whether inner products with the samples of ``other`` take fewer multiplications."""
        wide_in, wide_out = self.inputs.shape[1], self.gradients.shape[1]
        return len(other.inputs) * (wide_in + wide_out) < wide_in * wide_out

    def intact(self) -> bool:
        """Whether nobody has written to the inputs since: the next batch may go into the same memory."""
        return version_of(self.inputs) == self.version

    def along(self, other: Factors) -> Tensor:
        """Contract every sample with the gradient that ``other`` is, float64 ``[N]``."""
        return ((self.inputs @ other.inputs.T) * (self.gradients @ other.gradients.T)).sum(1).double()


class GradientsAsFactors:
    """Gradients of linear weights as products: those of this step as they come, and those of the step before.

    A weight that is used twice has none, nor has a step that is no multiple of the gradient of one pass.
    """

    def __init__(self) -> None:
        """Start with nothing known."""
        self._now: dict[int, Factors | None] = {}
        self._last: dict[int, Factors] = {}
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}  # of a resumed run, by index of the parameter
        self.factor: Scalar = 1.0
        """What the gradients were multiplied by before that step."""

    def begin(self, params: Sequence[Tensor]) -> None:
        """Take the parameters of the optimizer, by which a resumed run knows its last step."""
        for index, saved in self._saved.items():
            inputs, gradients = (tensor.to(params[index].device) for tensor in saved)
            self._last[id(params[index])] = Factors(inputs, gradients, version_of(inputs))
        self._saved = {}

    def discard(self) -> None:
        """Forget the gradients of this step so far."""
        self._now = {}

    def note(self, weight: Tensor, factors: Factors | None) -> None:
        """Take note of a call that a weight was used in."""
        self._now[id(weight)] = None if id(weight) in self._now else factors

    def along_last_step(self, weight: Tensor, factors: Factors | None) -> Tensor | None:
        """Contract a call with the change of the weight in the last step, up to its rate ``[N]``.

        None where that is not known or not cheaper than the product.
        """
        last = self._last.get(id(weight))
        if factors is None or last is None or not (last.intact() and factors.cheaper_than_product(last)):
            return None
        return factors.along(last) * self.factor

    def along_gradient(self, weight: Tensor) -> Tensor | None:
        """Contract the one call of a weight with its gradient ``[N]``; None as above."""
        factors = self._now.get(id(weight))
        return factors.along(factors) if factors is not None and factors.cheaper_than_product(factors) else None

    def stepped(self, direction: Direction, gradients: LossGradients, passes: int) -> str | None:
        """A step was made with these gradients.

        Returns:
            Why it is no multiple of the gradient of one pass; None if it is.
        """
        now, self._now, self._last = self._now, {}, {}
        reason = None
        if not direction.of_gradient:
            reason = "the optimizer is not plain SGD"
        elif passes != 1:
            reason = "several backward passes per step"
        elif not all(base is own for base, own in zip(direction.bases, gradients.tensors, strict=True)):
            reason = "the step is no multiple of the gradient"
        else:
            self._last = {key: factors for key, factors in now.items() if factors is not None}
            self.factor = 1.0 if gradients.factor is None else gradients.factor
        return reason

    def state_dict(self, index: dict[int, int]) -> dict[str, Any]:
        """Return what is known of the last step; ``index`` gives parameters their place."""
        kept = {index[key]: factors for key, factors in self._last.items() if factors.intact()}
        last = {place: (factors.inputs, factors.gradients) for place, factors in kept.items()}
        return {"factor": self.factor, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what is known of the last step."""
        self.factor, self._saved = state["factor"], dict(state["last"])
