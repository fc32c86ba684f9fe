"""A BackPACK extension: what every sample contributes to the slope along a change of the parameters.

BackPACK's own first-order extensions form the gradient of every sample, N times the parameters. Slopes
need one number per sample and parameter:

    extend(model), extend(loss_fn)
    with backpack(SlopesAlong({weight: change})):
        loss_fn(model(x), y).backward()
    weight.slopes_along  # [N], sums to <change, weight.grad>

The backend in `backpack.py` applies the rules of this extension layer by layer, without BackPACK's context:
nothing has to stand around the user's backward pass, and nothing is left on the user's modules.

This file imports BackPACK, so it is itself imported only where used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
from backpack.core.derivatives.linear import LinearDerivatives
from backpack.extensions.firstorder.base import FirstOrderBackpropExtension, FirstOrderModuleExtension
from torch import Tensor, nn

from alpha_optim.slopes.contractions import CONVOLUTIONS, bias_rows, layer_on, rowwise
from alpha_optim.slopes.individual import backpack_rules


class SlopesAlong(FirstOrderBackpropExtension):  # type: ignore[misc] # - BackPACK has no types
    """Saves ``slopes_along``, float64 ``[N]``, on the parameters of linear and convolution layers.

    They are shares of what was sent backward: for a mean loss N times smaller than the samples' own slopes.
    BackPACK warns of other layers with parameters; of a parameter that several layers share it keeps the
    numbers of one of them, as it does with its own extensions.
    """

    def __init__(self, changes: Mapping[Tensor, Tensor] | None = None) -> None:
        """Set the direction.

        Args:
            changes: Parameter -> its change, of the same shape; one that is missing does not move. None:
                every parameter moves along its own gradient of this backward pass.
        """
        rules = {kind: LayerSlopes(backpack_rules()[kind]) for kind in (nn.Linear, *CONVOLUTIONS)}
        super().__init__("slopes_along", rules)
        self._changes = None if changes is None else {id(param): change for param, change in changes.items()}

    def of(self, rule: LayerSlopes, module: nn.Module, name: str, gradient: Tensor) -> Tensor:
        """Slopes ``[N]`` in one parameter of a layer, given the gradient of the layer's output."""
        if self._changes is None:
            return rule.along_gradient(module, name, gradient)
        change = self._changes.get(id(getattr(module, name)))
        return (
            gradient.new_zeros(len(gradient)).double() if change is None else rule.along(module, name, gradient, change)
        )


class LayerSlopes(FirstOrderModuleExtension):  # type: ignore[misc] # - BackPACK has no types
    """One kind of layer; its input is where BackPACK leaves it, in ``module.input0``."""

    def __init__(self, derivatives: BaseParameterDerivatives) -> None:
        """Take BackPACK's derivatives of the layer."""
        super().__init__(["weight", "bias"])
        self._derivatives: Any = derivatives

    @torch.no_grad()
    def weight(self, extension: SlopesAlong, module: nn.Module, _in: Any, g_out: Any, _none: Any) -> Tensor:
        """Slopes in the weight; BackPACK calls this."""
        return extension.of(self, module, "weight", g_out[0].detach())

    @torch.no_grad()
    def bias(self, extension: SlopesAlong, module: nn.Module, _in: Any, g_out: Any, _none: Any) -> Tensor:
        """Slopes in the bias; BackPACK calls this."""
        return extension.of(self, module, "bias", g_out[0].detach())

    def along(self, module: nn.Module, name: str, gradient: Tensor, change: Tensor) -> Tensor:
        """Contract with a change of one parameter.

        Args:
            module: The layer.
            name: Local name of the parameter.
            gradient: Gradient of the layer's output ``[N, ...]``.
            change: Change of the parameter, of its shape.

        Returns:
            One number per sample, float64 ``[N]``.
        """
        if name == "bias":
            return bias_rows(module, change, gradient)
        if isinstance(self._derivatives, LinearDerivatives):
            moved = self._derivatives.weight_jac_mat_prod(module, (), (gradient,), change)
        else:  # BackPACK would unfold the input, nine times its memory for a 3x3 kernel
            moved = layer_on(module, {"weight": change}, (module.input0,))
        return rowwise(moved, gradient)

    def along_gradient(self, module: nn.Module, name: str, gradient: Tensor) -> Tensor:
        """Contract with the parameter's own gradient."""
        if name == "weight" and not isinstance(self._derivatives, LinearDerivatives):
            own = _gradient_of_weight(module, gradient)
        else:
            own = self._derivatives.param_mjp(name, module, (), (gradient,), gradient, sum_batch=True)
        return self.along(module, name, gradient, own)


def _gradient_of_weight(module: nn.Module, gradient: Tensor) -> Tensor:
    """Gradient of a convolution's weight by autograd: BackPACK's knows neither all paddings nor all groups."""
    weight: Any = module.weight
    layer_input: Any = module.input0
    with torch.enable_grad():
        weight = weight.detach().requires_grad_()
        output = layer_on(module, {"weight": weight}, (layer_input.detach(),))
        own: Tensor = torch.autograd.grad(output, weight, gradient)[0]
    return own
