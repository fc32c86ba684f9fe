"""Hooks on the layers that own parameters: inputs and output gradients of every call.

Nothing is left on the modules but forward hooks, and those only while an iteration is watched. The
output gradient comes from a tensor hook on the layer's output; it is bound to the value that the
layer returned, so an in-place activation behind it does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alpha_optim.hooks import Hook

UNITS: tuple[type[nn.Module], ...] = (nn.MultiheadAttention,)
"""Modules that use parameters of their children without calling them; treated as one layer."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A module together with the parameters it uses itself.

    Attributes:
        module: The module that is called.
        params: Local name (``"weight"``, ``"out_proj.weight"``) -> parameter.
    """

    module: nn.Module
    params: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer, seen when the gradient of its output is known.

    Attributes:
        layer: The layer.
        args: Positional arguments, detached.
        kwargs: Keyword arguments, detached.
        output: The output, detached; only where a layer's rule needs it.
        output_index: Which tensor of a nested output the gradient belongs to.
        output_gradient: Gradient of what was sent backward with respect to that tensor.
        creates_graph: Whether this backward pass will be differentiated itself.
    """

    layer: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None
    output_index: int
    output_gradient: Tensor
    creates_graph: bool


def layers_of(model: nn.Module, wanted: set[int]) -> list[Layer]:
    """List the layers of a model that use parameters of the optimizer.

    Args:
        model: The model.
        wanted: ``id`` of the parameters of the optimizer.
    """
    layers = []
    inside_unit: set[int] = set()
    for module in model.modules():
        if id(module) in inside_unit:
            continue
        unit = isinstance(module, UNITS)
        if unit:
            inside_unit |= {id(child) for child in module.modules()}
        named = module.named_parameters(recurse=unit, remove_duplicate=False)
        params: dict[str, Tensor] = {name: param for name, param in named if id(param) in wanted}
        if params:
            layers.append(Layer(module, params))
    return layers


class LayerTap:
    """Hooks on layers; reports each call when its output gradient arrives."""

    def __init__(
        self,
        on_forward: Callable[[], None],
        on_call: Callable[[LayerCall], None],
        keep_output: tuple[type[nn.Module], ...] = (),
    ) -> None:
        """Prepare; nothing is hooked before `attach`.

        Args:
            on_forward: Called at every forward call of a layer.
            on_call: Called inside the backward pass.
            keep_output: Layer types whose output is kept for ``on_call``.
        """
        self._on_forward = on_forward
        self._on_call = on_call
        self._keep_output = keep_output
        self._handles: list[RemovableHandle] = []
        self._muted = False

    def attach(self, layers: list[Layer]) -> None:
        """Hook the layers."""
        for layer in layers:
            hook = Hook(_Seen(self, layer), owner=layer.module)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def seen(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> None:
        """Take note of a forward call."""
        if self._muted or not torch.is_grad_enabled():
            return
        self._on_forward()
        kept_args = tuple(_detached(arg) for arg in args)
        kept_kwargs = {name: _detached(value) for name, value in kwargs.items()}
        keep = isinstance(layer.module, self._keep_output)
        for index, tensor in enumerate(tensors_in(output)):
            if tensor.requires_grad:
                kept = tensor.detach() if keep else None

                # Default arguments: the closure must not hold the output itself (a cycle).
                def arrived(gradient: Tensor, index: int = index, kept: Tensor | None = kept) -> None:
                    if self._handles:
                        self._report(
                            LayerCall(
                                layer,
                                kept_args,
                                kept_kwargs,
                                kept,
                                index,
                                gradient.detach(),
                                torch.is_grad_enabled(),
                            )
                        )

                tensor.register_hook(arrived)

    def _report(self, call: LayerCall) -> None:
        self._muted = True  # recomputing a layer calls modules that may carry our hooks
        try:
            with torch.no_grad():
                self._on_call(call)
        finally:
            self._muted = False


@dataclass(frozen=True)
class _Seen:
    tap: LayerTap
    layer: Layer

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.tap.seen(self.layer, args, kwargs, output)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_detached(entry) for entry in value)
    return value
