"""Layers with few parameters: summed over positions first, one number per sample and parameter.

For normalisation layers and convolutions of few channels that is less work and less memory than to apply the
layer to a change of its parameters, and it serves the changes of both ends of a step at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field writes it so
from torch.nn.modules.batchnorm import _BatchNorm

from alpha_optim.observe.inner_products import at_least_float32
from alpha_optim.slopes.layers import LayerCall, UnsupportedLayerError

Values = dict[str, Tensor]

SHORT_PATCH = 32
"""Inputs per output of a convolution up to which unfolding it is cheap: the first layer of most networks."""


class Shares:
    """Individual gradients of the few parameters of a normalisation layer ``[rows, *shape]``."""

    def __init__(self, shares: Values) -> None:
        """Keep the shares."""
        self._shares = shares

    def along(self, changes: Values) -> Tensor:
        """See `Contraction`."""
        parts = [
            self._shares[name].flatten(1) @ change.to(self._shares[name].dtype).flatten()
            for name, change in changes.items()
        ]
        return torch.stack(parts).double().sum(0)


def shares_of(call: LayerCall, rows: int) -> Shares | None:
    """The shares of the first rows of a call; None for a layer that has none.

    Args:
        call: The call.
        rows: How many rows of dimension 0 are wanted.
    """
    rule = _SHARES.get(type(call.layer.module))
    if rule is None and _fewer_weights_than_inputs(call):
        rule = _convolution
    return None if rule is None else Shares(rule(call, rows))


def has_shares(module: nn.Module) -> bool:
    """Whether calls of this type of layer always have shares."""
    return type(module) in _SHARES


def _channel_shares(call: LayerCall, rows: int, normalised: Callable[[Tensor], Tensor]) -> Values:
    """Weight and bias per channel (dimension 1)."""
    gradient = at_least_float32(call.output_gradient[:rows])
    positions = list(range(2, gradient.dim()))
    shares = {}
    if "weight" in call.layer.params:
        product = gradient * normalised(call.args[0].to(gradient.dtype))[:rows]
        shares["weight"] = product.sum(positions) if positions else product
    if "bias" in call.layer.params:
        shares["bias"] = gradient.sum(positions) if positions else gradient.clone()
    return shares


def batch_norm_shares(call: LayerCall, rows: int) -> Values:
    """On batch statistics a sample's loss depends on the others; this is what flows through its position."""
    module = call.layer.module
    assert isinstance(module, _BatchNorm)
    own = module.training or module.running_mean is None

    def normalised(x: Tensor) -> Tensor:
        if own:
            mean, var = _statistics_of_channels(x)
        else:
            assert module.running_mean is not None
            assert module.running_var is not None
            mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
        return F.batch_norm(x[:rows], mean, var, None, None, False, 0.0, module.eps)

    return _channel_shares(call, rows, normalised)


def _statistics_of_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (ddof=0) over samples and positions ``[C]``.

    Over the innermost dimension first: for few rows that costs a tenth of normalising the batch once more.
    """
    values = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    count = values.shape[0] * values.shape[2]
    mean = values.sum(2).sum(0) / count
    spread = torch.linalg.vector_norm(values - mean.unsqueeze(1), dim=2)
    return mean, spread.square().sum(0) / count


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
    gradient = at_least_float32(call.output_gradient[:rows])
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
    gradient = at_least_float32(call.output_gradient[:rows]).flatten(2)
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
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm_shares),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
}
