"""Linear layers under plain SGD: a contraction with a gradient through inner products of samples.

The gradient of a linear layer is the sum of b_j a_j^T over samples j, so that contracted with it sample i
contributes the sum over j of (a_i . a_j)(b_i . b_j). For few samples and wide layers that is cheaper than
the product with the gradient: N^2 (in + out) multiplications instead of N in out. The gradient of the
previous step, along which the end is measured, is known by the factors kept from there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from alpha_optim.projections.layers import LayerCall


@dataclass(frozen=True)
class Factors:
    """Inputs ``[N, in]`` and output gradients ``[N, out]`` of one call: a gradient as a product."""

    inputs: Tensor
    gradients: Tensor

    @classmethod
    def of(cls, call: LayerCall) -> Factors | None:
        """Factors of a call of a linear layer on plain rows; None for anything else."""
        gradient = call.output_gradient
        if type(call.layer.module) is not nn.Linear or not call.args or gradient.dim() != 2:
            return None
        if call.args[0].dtype != gradient.dtype or gradient.element_size() < 4:
            return None
        return cls(call.args[0], gradient)

    def cheaper_than_product(self, other: Factors) -> bool:
        """Whether inner products with the samples of ``other`` take fewer multiplications."""
        wide_in, wide_out = self.inputs.shape[1], self.gradients.shape[1]
        return len(other.inputs) * (wide_in + wide_out) < wide_in * wide_out

    def along(self, other: Factors) -> Tensor:
        """Contract every sample with the gradient that ``other`` is, float64 ``[N]``."""
        return ((self.inputs @ other.inputs.T) * (self.gradients @ other.gradients.T)).sum(1).double()
