"""Repeats a module's call without a trace on the module: parameters shared, everything else its own."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def stand_in(module: nn.Module) -> nn.Module:
    """A copy that shares parameters but has buffers of its own and none of the user's forward hooks.

    Hooks that run before a forward pass stay: old-style weight normalisation makes its weight there.
    """
    copied: nn.Module = object.__new__(type(module))  # parametrised modules refuse copy.copy
    copied.__dict__ = dict(module.__dict__)
    copied._forward_hooks = OrderedDict()
    copied._backward_hooks, copied._backward_pre_hooks = OrderedDict(), OrderedDict()
    copied._parameters = dict(module._parameters)
    copied._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    copied._modules = {name: None if child is None else stand_in(child) for name, child in module._modules.items()}
    return copied


def reparametrised(module: nn.Module) -> bool:
    """Whether old-style weight normalisation or pruning makes its weight from other parameters.

    The type of the module stays what it was, but its rules would look for parameters that are not there.
    """
    return "weight_g" in module._parameters or "weight_orig" in module._parameters
