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
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field writes it so
from torch.nn.modules.batchnorm import _BatchNorm

from alpha_optim.projections.forward_mode import ForwardMode
from alpha_optim.projections.layers import (
    Layer,
    LayerCall,
    UnsupportedLayerError,
    layers_of,
    uses_its_children,
)

Values = dict[str, Tensor]

SHORT_PATCH = 32
"""Inputs per output of a convolution up to which unfolding it is cheap: the first layer of most networks."""


class Contraction(Protocol):
    """One call of a layer, ready to be contracted with changes of its parameters."""

    def along(self, changes: Values, made: float | Tensor = 0.0) -> Tensor:
        """Contract every row.

        Args:
            changes: Changes by local name of the parameter, a missing one is zero.
            made: By which multiple of the changes the parameters have moved since the call.

        Returns:
            One number per row, float64 ``[rows]``.
        """


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
    if not call.args:
        return ForwardMode(call, rows)
    if _fewer_weights_than_inputs(call):
        return Shares(_convolution(call, rows))
    if type(module) in _SHARES:
        return Shares(_SHARES[type(module)](call, rows))
    if type(module) in _PRODUCTS:
        return Product(call.first(rows), _PRODUCTS[type(module)])
    return ForwardMode(call, rows)


def layers_to_contract(model: nn.Module, wanted: set[int]) -> list[Layer]:
    """List the layers of a model; those without a rule are repeated as a whole, children included.

    Args:
        model: The model.
        wanted: ``id`` of the parameters of the optimizer.
    """

    def repeated(module: nn.Module, owns_parameters: bool) -> bool:
        known = type(module) in _SHARES or type(module) in _PRODUCTS
        return uses_its_children(module, owns_parameters) or (owns_parameters and not known)

    return [
        replace(layer, replayed=repeated(layer.module, owns_parameters=True))
        for layer in layers_of(model, wanted, repeated)
    ]


class Product:
    """The layer applied with the changes in place of its parameters."""

    def __init__(self, call: LayerCall, apply: Callable[[LayerCall, Values, Tensor], Tensor]) -> None:
        """Keep the rows of the call."""
        self._call, self._apply = call, apply

    def along(self, changes: Values, made: float | Tensor = 0.0) -> Tensor:
        """See `Contraction`; what is linear in the parameters does not ask where they are."""
        call = self._call
        call.check_unaltered()
        gradient = _wide(call.output_gradient)
        with torch.autocast(gradient.device.type, enabled=False):
            changes = {name: change.to(gradient.dtype) for name, change in changes.items()}
            return self._apply(call, changes, gradient)


class Shares:
    """Individual gradients of the few parameters of a normalisation layer ``[rows, *shape]``."""

    def __init__(self, shares: Values) -> None:
        """Keep the shares."""
        self._shares = shares

    def along(self, changes: Values, made: float | Tensor = 0.0) -> Tensor:
        """See `Contraction`; what is linear in the parameters does not ask where they are."""
        parts = [
            self._shares[name].flatten(1) @ change.to(self._shares[name].dtype).flatten()
            for name, change in changes.items()
        ]
        return torch.stack(parts).double().sum(0)


def rowwise(output: Tensor, gradient: Tensor) -> Tensor:
    """Inner product of every row, float64 ``[rows]``."""
    # Summed in the working precision, which is at least float32; a row has few elements.
    return (output * gradient).flatten(1).sum(1).double() if output.dim() > 1 else (output * gradient).double()


def _linear_in_parameters(call: LayerCall, changes: Values, gradient: Tensor) -> Tensor:
    """Layers whose output is linear in weight and bias together."""
    weight = changes.get("weight")
    if weight is None:
        return _bias_only(call, changes["bias"], gradient)
    standin = copy.copy(call.layer.module)
    standin._parameters = {"weight": weight, "bias": changes.get("bias")}  # type: ignore[dict-item] # - tensors do
    args = tuple(_wide_to(value, gradient.dtype) for value in call.args)
    kwargs = {name: _wide_to(value, gradient.dtype) for name, value in call.kwargs.items()}
    return rowwise(standin.forward(*args, **kwargs), gradient)


def _linear(call: LayerCall, changes: Values, gradient: Tensor) -> Tensor:
    if call.kwargs or "weight" not in changes:
        return _linear_in_parameters(call, changes, gradient)
    return rowwise(F.linear(call.args[0].to(gradient.dtype), changes["weight"], changes.get("bias")), gradient)


def _bias_only(call: LayerCall, bias: Tensor, gradient: Tensor) -> Tensor:
    channels = 1 if isinstance(call.layer.module, _CONVOLUTIONS) else gradient.dim() - 1
    shape = [1] * gradient.dim()
    shape[channels] = -1
    return rowwise(bias.reshape(shape), gradient)


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


_CONVOLUTIONS = (
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
    **dict.fromkeys(_CONVOLUTIONS, _linear_in_parameters),
}


def _channel_shares(call: LayerCall, rows: int, normalised: Callable[[Tensor], Tensor]) -> Values:
    """Weight and bias per channel (dimension 1)."""
    gradient = _wide(call.output_gradient[:rows])
    positions = list(range(2, gradient.dim()))
    shares = {}
    if "weight" in call.layer.params:
        product = gradient * normalised(call.args[0].to(gradient.dtype))[:rows]
        shares["weight"] = product.sum(positions) if positions else product
    if "bias" in call.layer.params:
        shares["bias"] = gradient.sum(positions) if positions else gradient.clone()
    return shares


def _batch_norm(call: LayerCall, rows: int) -> Values:
    """On batch statistics a sample's loss depends on the others; this is what flows through its position."""
    module = call.layer.module
    assert isinstance(module, _BatchNorm)
    own = module.training or module.running_mean is None

    def normalised(x: Tensor) -> Tensor:
        if own:
            return F.batch_norm(x, None, None, None, None, True, 0.0, module.eps)
        assert module.running_mean is not None
        assert module.running_var is not None
        mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
        return F.batch_norm(x[:rows], mean, var, None, None, False, 0.0, module.eps)

    return _channel_shares(call, rows, normalised)


def _group_norm(call: LayerCall, rows: int) -> Values:
    module = call.layer.module
    assert isinstance(module, nn.GroupNorm)
    groups, eps = module.num_groups, module.eps
    return _channel_shares(call, rows, lambda x: F.group_norm(x[:rows], groups, None, None, eps))


def _instance_norm(call: LayerCall, rows: int) -> Values:
    module = call.layer.module
    if not module.training and module.running_mean is not None:
        raise UnsupportedLayerError("instance normalisation with running statistics in eval mode")
    eps = float(module.eps)  # type: ignore[arg-type] # - nn.Module's attributes are untyped
    return _channel_shares(call, rows, lambda x: F.instance_norm(x[:rows], eps=eps))


def _layer_norm(call: LayerCall, rows: int) -> Values:
    """Weight and bias over the trailing dimensions.

    Raises:
        UnsupportedLayerError: If the samples are among those.
    """
    module = call.layer.module
    assert isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    shape = list(module.normalized_shape)
    gradient = _wide(call.output_gradient[:rows])
    x = call.args[0][:rows].to(gradient.dtype)
    positions = list(range(1, gradient.dim() - len(shape)))
    if gradient.dim() == len(shape):
        raise UnsupportedLayerError("it normalises over the samples")
    shares = {}
    if "weight" in call.layer.params:
        # eps None means that of the input's own precision
        eps = torch.finfo(call.args[0].dtype).eps if module.eps is None else module.eps
        layer = isinstance(module, nn.LayerNorm)
        scaled = F.layer_norm(x, shape, eps=eps) if layer else F.rms_norm(x, shape, eps=eps)
        product = gradient * scaled
        shares["weight"] = product.sum(positions) if positions else product
    if "bias" in call.layer.params:
        shares["bias"] = gradient.sum(positions) if positions else gradient.clone()
    return shares


def _fewer_weights_than_inputs(call: LayerCall) -> bool:
    """Whether a convolution is cheaper contracted over positions first: few weights, short patches."""
    module = call.layer.module
    if type(module) is not nn.Conv2d or module.groups != 1 or call.args[0].dim() != 4:
        return False
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    return module.weight[0].numel() <= SHORT_PATCH and module.weight.numel() <= call.args[0][0].numel()


def _convolution(call: LayerCall, rows: int) -> Values:
    """Weight and bias of a convolution, summed over positions."""
    module = call.layer.module
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    gradient = _wide(call.output_gradient[:rows]).flatten(2)
    shares = {}
    if "weight" in call.layer.params:
        x = call.args[0][:rows].to(gradient.dtype)
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        product = torch.bmm(gradient, patches.transpose(1, 2))
        shares["weight"] = product.reshape(len(product), *module.weight.shape)
    if "bias" in call.layer.params:
        shares["bias"] = gradient.sum(2)
    return shares


_SHARES: dict[type[nn.Module], Callable[[LayerCall, int], Values]] = {
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
}


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _wide_to(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
