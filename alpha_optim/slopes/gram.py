"""Linear layers under plain SGD: a contraction with a gradient through inner products of samples.

The gradient of a linear layer is the sum of b_j a_j^T over samples j, so that contracted with it sample i
contributes the sum over j of (a_i . a_j)(b_i . b_j). For few samples and wide layers that is cheaper than
the product with the gradient: N^2 (in + out) multiplications instead of N in out. The gradient of the
previous step, along which the end is measured, is known by the factors kept from there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.scalars import Scalar
from alpha_optim.observe.step_direction import Direction, same_tensors
from alpha_optim.slopes.layers import LayerCall, version_of


@dataclass(frozen=True)
class Factors:
    """Inputs ``[N, in]`` and output gradients ``[N, out]`` of one call: a gradient as a product.

    Attributes:
        inputs: The inputs.
        gradients: The gradients of the outputs.
        versions: Versions of the two at the call.
    """

    inputs: Tensor
    gradients: Tensor
    versions: tuple[int, int]

    @classmethod
    def now(cls, inputs: Tensor, gradients: Tensor) -> Factors:
        """Take two tensors as they are now."""
        return cls(inputs, gradients, (version_of(inputs), version_of(gradients)))

    @classmethod
    def of(cls, call: LayerCall) -> Factors | None:
        """Factors of a call of a linear layer on plain rows; None for anything else."""
        gradient = call.output_gradient
        if type(call.layer.module) is not nn.Linear or not call.args or gradient.dim() != 2:
            return None
        if call.args[0].dtype != gradient.dtype or gradient.element_size() < 4:
            return None
        return cls.now(call.args[0], gradient)

    def cheap(self) -> bool:
        """Whether inner products with these samples take fewer multiplications than the product."""
        wide_in, wide_out = self.inputs.shape[1], self.gradients.shape[1]
        return len(self.inputs) * (wide_in + wide_out) < wide_in * wide_out

    def intact(self) -> bool:
        """Whether nobody has written to them since: the next batch may go into the same memory."""
        return (version_of(self.inputs), version_of(self.gradients)) == self.versions

    def along(self, other: Factors) -> Tensor:
        """Contract every sample with the gradient that ``other`` is, float64 ``[N]``."""
        return ((self.inputs @ other.inputs.T) * (self.gradients @ other.gradients.T)).sum(1).double()


class GradientsAsFactors:
    """Gradients of linear weights as products: those of this step as they come, and those of the step before.

    A weight has none where it is used twice or a hook of the user's changes its gradient, nor has a step that
    is no multiple of the gradient of one pass.
    """

    def __init__(self) -> None:
        """Start with nothing known."""
        self._now: dict[int, Factors | None] = {}
        self._last: dict[int, Factors] = {}
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}  # of a resumed run, by index of the parameter
        self._overwritten = False  # inputs or output gradients are written to between steps
        self._used = self._off = False
        self.factor: Scalar = 1.0
        """What the gradients were multiplied by before that step."""

    def begin(self, params: Sequence[Tensor]) -> None:
        """Take the parameters of the optimizer, by which a resumed run knows its last step."""
        for index, saved in self._saved.items():
            inputs, gradients = (tensor.to(params[index].device) for tensor in saved)
            self._last[id(params[index])] = Factors.now(inputs, gradients)
        self._saved = {}

    def discard(self) -> None:
        """Forget the gradients of this step so far."""
        self._now = {}

    def note(self, weight: Tensor, factors: Factors | None) -> None:
        """Take note of a call that a weight was used in."""
        again = id(weight) in self._now
        self._now[id(weight)] = None if again or self._off or _has_hooks(weight) else factors

    def along_last_step(self, weight: Tensor, factors: Factors | None) -> Tensor | None:
        """Contract a call with the change of the weight in the last step, up to its rate ``[N]``.

        None where that is not known or not cheaper than the product.
        """
        last = self._last.get(id(weight))
        if factors is None or last is None:
            return None
        if not last.intact():
            self._overwritten = True
            return None
        self._used = True
        return factors.along(last) * self.factor

    def along_gradient(self, weight: Tensor) -> Tensor | None:
        """Contract the one call of a weight with its gradient ``[N]``; None as above."""
        factors = self._now.get(id(weight))
        if factors is None or not factors.cheap():
            return None
        self._used = True
        return factors.along(factors)

    def stepped(
        self, direction: Direction, gradients: LossGradients, passes: int, failed: Collection[int]
    ) -> str | None:
        """A step was made with these gradients.

        Args:
            direction: The step.
            gradients: Gradients of the loss.
            passes: Number of backward passes.
            failed: ``id`` of parameters of which not all calls were seen.

        Returns:
            Why it is no multiple of the gradient of one pass; None if it is.
        """
        now, self._now, self._last = self._now, {}, {}
        if not direction.of_gradient:
            return "the optimizer is not plain SGD"
        if passes != 1:
            return "several backward passes per step"
        if not same_tensors(direction.bases, gradients.tensors):
            return "the step is no multiple of the gradient"
        self.factor = 1.0 if gradients.factor is None else gradients.factor
        if not self._overwritten:
            self._last = {
                key: factors
                for key, factors in now.items()
                if factors is not None and key not in failed and factors.cheap()
            }
        return None

    def ended(self) -> None:
        """The end of the last step has been seen: nothing of it is needed any more."""
        self._last = {}

    def give_up(self) -> bool:
        """Do without from now on, as samples did not add up; whether that can have been the reason."""
        used, self._used, self._off = self._used, False, True
        self._now, self._last = {}, {}
        return used

    def state_dict(self, index: dict[int, int]) -> dict[str, Any]:
        """Return what is known of the last step; ``index`` gives parameters their place."""
        kept = {index[key]: f for key, f in self._last.items() if key in index and f.intact()}
        # Copies: the tensors may be views of the user's whole data, or written to by the next batch.
        last = {place: (f.inputs.clone(), f.gradients.clone()) for place, f in kept.items()}
        return {"factor": self.factor, "last": last, "overwritten": self._overwritten, "off": self._off}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what is known of the last step."""
        self.factor, self._saved = state["factor"], dict(state["last"])
        self._overwritten, self._off = bool(state["overwritten"]), bool(state["off"])


def _has_hooks(weight: Tensor) -> bool:
    """Whether somebody besides us may change the gradient of a weight on its way."""
    ours = 1
    return (
        bool(weight._backward_hooks) or len(getattr(weight, "_post_accumulate_grad_hooks", None) or ()) > ours
    )
