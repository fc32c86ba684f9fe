"""Slopes of the samples of one layer call along changes of the layer's parameters.

With input a_i, gradient b_i of the output and change D of the parameters, sample i contributes

    c_i = <b_i, J(a_i) D>,

J being the derivative of the layer's output with respect to its parameters. For layers that are linear in
their parameters J D is the layer itself with D in place of the parameters, so c_i costs one forward pass
of the layer and no individual gradient (N times the parameters) is formed. Normalisation layers have so
few parameters that the sums over positions, one number per sample and parameter, are formed at once; so
have convolutions of few channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field writes it so

from alpha_optim.observe.inner_products import at_least_float32
from alpha_optim.observe.module_copy import reparametrised
from alpha_optim.slopes.layers import LayerCall, UnsupportedLayerError
from alpha_optim.slopes.shares import has_shares, shares_of

Values = dict[str, Tensor]


class Contraction(Protocol):
    """One call of a layer, ready to be contracted with changes of its parameters."""

    def along(self, changes: Values) -> Tensor:
        """Contract every row.

        Args:
            changes: Changes by local name of the parameter, a missing one is zero.

        Returns:
            One number per row, float64 ``[rows]``.
        """


def has_rule(module: nn.Module) -> bool:
    """Whether calls of a layer can be contracted."""
    return (has_shares(module) or type(module) in _PRODUCTS) and not reparametrised(module)


def contraction_of(call: LayerCall, rows: int) -> Contraction:
    """Prepare the first rows of a call; memory of the others is not held.

    Args:
        call: The call.
        rows: How many rows of dimension 0 are wanted.

    Raises:
        UnsupportedLayerError: If it cannot be had; the text says why.
    """
    module = call.layer.module
    call.check_unaltered()
    if not call.args or not has_rule(module):
        raise UnsupportedLayerError("there is no rule for such a call")
    shares = shares_of(call, rows)
    return Product(call.first(rows), _PRODUCTS[type(module)]) if shares is None else shares


class Product:
    """The layer applied with the changes in place of its parameters."""

    def __init__(self, call: LayerCall, apply: Callable[[LayerCall, Values, Tensor], Tensor]) -> None:
        """Keep the rows of the call."""
        self._call, self._apply = call, apply

    def along(self, changes: Values) -> Tensor:
        """See `Contraction`."""
        call = self._call
        call.check_unaltered()
        gradient = at_least_float32(call.output_gradient)
        with torch.autocast(gradient.device.type, enabled=False):
            changes = {name: change.to(gradient.dtype) for name, change in changes.items()}
            return self._apply(call, changes, gradient)


def rowwise(output: Tensor, gradient: Tensor) -> Tensor:
    """Inner product of every row, float64 ``[rows]``; ``output`` is used up."""
    # Summed in the working precision, which is at least float32; a row has few elements.
    product = output.mul_(gradient)
    return (product.flatten(1).sum(1) if product.dim() > 1 else product).double()


def _linear_in_parameters(call: LayerCall, changes: Values, gradient: Tensor) -> Tensor:
    """Layers whose output is linear in weight and bias together."""
    weight = changes.get("weight")
    if weight is None:
        return bias_rows(call.layer.module, changes["bias"], gradient)
    args = tuple(_wide_to(value, gradient.dtype) for value in call.args)
    kwargs = {name: _wide_to(value, gradient.dtype) for name, value in call.kwargs.items()}
    return rowwise(layer_on(call.layer.module, changes, args, kwargs), gradient)


def layer_on(module: nn.Module, changes: Values, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Tensor:
    """Apply a layer that is linear in its parameters with changes in place of them."""
    standin = copy.copy(module)
    standin._parameters = {"weight": changes["weight"], "bias": changes.get("bias")}  # type: ignore[dict-item] # - tensors do
    output: Tensor = standin.forward(*args, **(kwargs or {}))
    return output


def _linear(call: LayerCall, changes: Values, gradient: Tensor) -> Tensor:
    if call.kwargs or "weight" not in changes:
        return _linear_in_parameters(call, changes, gradient)
    rows = rowwise(F.linear(call.args[0].to(gradient.dtype), changes["weight"]), gradient)
    # Apart, or a copy of the bias for every row would be made first.
    return rows if "bias" not in changes else rows + bias_rows(call.layer.module, changes["bias"], gradient)


def bias_rows(module: nn.Module, bias: Tensor, gradient: Tensor) -> Tensor:
    """What a change of the bias contributes to every row, float64 ``[rows]``."""
    if isinstance(module, CONVOLUTIONS):
        return (gradient.flatten(2).sum(2) @ bias).double()
    along = gradient @ bias
    return (along.flatten(1).sum(1) if along.dim() > 1 else along).double()


def _embedding(call: LayerCall, changes: Values, gradient: Tensor) -> Tensor:
    module = call.layer.module
    assert isinstance(module, nn.Embedding)
    if module.scale_grad_by_freq:
        raise UnsupportedLayerError("scale_grad_by_freq makes a sample's gradient depend on the others")
    indices = call.args[0]
    moved = F.embedding(indices, changes["weight"])
    if module.padding_idx is not None:  # its row gets no gradient, whatever moves it
        moved = moved * torch.ne(indices, module.padding_idx).unsqueeze(-1)
    return rowwise(moved, gradient)


CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_PRODUCTS: dict[type[nn.Module], Callable[[LayerCall, Values, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Bilinear: _linear_in_parameters,
    **dict.fromkeys(CONVOLUTIONS, _linear_in_parameters),
}


def _wide_to(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
