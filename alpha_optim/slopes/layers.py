"""Hooks on the layers that own parameters: inputs and output gradients of every call.

Nothing is left on the modules but forward hooks, and those only while samples are watched. The output
gradient comes from a tensor hook on the layer's output; it is bound to the value that the layer
returned, so an in-place activation behind it does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alpha_optim.observe.hooks import Failed, Hook, map_tensors, of_gradient, tensors_in, versions_of

UNITS: tuple[type[nn.Module], ...] = (nn.MultiheadAttention,)
"""Modules that use parameters of their children without calling them; treated as one layer."""


class UnsupportedLayerError(Exception):
    """The slopes of single samples cannot be had for this call; the text says why."""


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
        versions: Versions of the tensors among the arguments at the call.
        output: The output, detached; only where a layer's rule needs it.
        output_index: Which tensor of a nested output the gradient belongs to.
        output_gradient: Gradient of what was sent backward with respect to that tensor.
        creates_graph: Whether this backward pass will be differentiated itself.
        random: State of the random numbers before the call, if it drew any and may be repeated.
    """

    layer: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[int, ...]
    output: Tensor | None
    output_index: int
    output_gradient: Tensor
    creates_graph: bool

    def rows_per_sample(self, samples: int) -> int:
        """How many rows of the output belong to one sample.

        Raises:
            UnsupportedLayerError: If dimension 0 is not that of the samples, or the output is complex.
        """
        gradient = self.output_gradient
        if gradient.is_complex():
            raise UnsupportedLayerError("its output is complex")
        if gradient.dim() == 0 or gradient.shape[0] % samples or gradient.shape[0] == 0:
            raise UnsupportedLayerError(
                f"dimension 0 of its output (shape {list(gradient.shape)}) is neither the number of "
                f"samples {samples} nor a multiple of it"
            )
        rows = gradient.shape[0]
        if not any(has_rows(value, rows) for value in tensors_in((self.args, self.kwargs))):
            raise UnsupportedLayerError("none of its inputs has the samples along dimension 0")
        return rows // samples

    def reads_from(self, storages: set[int]) -> bool:
        """Whether its input may come from the model's: indices have to lie in it, activations may.

        Positions 0 ... T - 1 looked up once for the whole batch look like k rows per sample where T is k N.
        """
        given = list(tensors_in((self.args, self.kwargs)))
        return any(tensor.is_floating_point() or tensor.untyped_storage().data_ptr() in storages for tensor in given)

    def first(self, rows: int) -> LayerCall:
        """The call with the first rows only, in memory of its own; itself if these are all."""
        whole = self.output_gradient.shape[0]
        if rows >= whole:
            return self

        def cut(value: Any) -> Any:
            return value[:rows].clone() if has_rows(value, whole) else value

        args = map_tensors(cut, self.args)
        kwargs = {name: map_tensors(cut, value) for name, value in self.kwargs.items()}
        versions = versions_of((args, kwargs))
        gradient = self.output_gradient[:rows].clone()
        return replace(self, args=args, kwargs=kwargs, versions=versions, output_gradient=gradient)

    def check_unaltered(self) -> None:
        """Refuse a call whose input has been written to since.

        Raises:
            UnsupportedLayerError: If it has.
        """
        if versions_of((self.args, self.kwargs)) != self.versions:
            raise UnsupportedLayerError("its input was changed in place after the call")


def layers_of(model: nn.Module, wanted: set[int]) -> list[Layer]:
    """List the layers of a model that use parameters of the optimizer.

    Args:
        model: The model.
        wanted: ``id`` of the parameters of the optimizer.
    """
    layers = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        as_one = isinstance(module, UNITS)
        params = wanted_parameters(module, wanted, recurse=as_one)
        if as_one:
            inside |= {id(child) for child in module.modules()}
        if params:
            layers.append(Layer(module, params))
    return layers


def wanted_parameters(module: nn.Module, wanted: set[int], recurse: bool) -> dict[str, Tensor]:
    """Parameters of a module that belong to the optimizer, by local name; shared ones under each."""
    named = module.named_parameters(recurse=recurse, remove_duplicate=False)
    return {name: param for name, param in named if id(param) in wanted}


class KnownLayers:
    """The layers of a model, found anew when the parameters of the optimizer change."""

    def __init__(self, find: Callable[[set[int]], list[Layer]]) -> None:
        """Take the function that finds them, given the ``id`` of the parameters."""
        self._find = find
        self._known: list[Layer] = []
        self._key: tuple[int, ...] | None = None

    def of(self, params: Sequence[Tensor]) -> list[Layer]:
        """Layers that use these parameters."""
        key = tuple(map(id, params))
        if key != self._key:
            self._known, self._key = self._find(set(key)), key
        return self._known


class LayerHooks:
    """Hooks on layers; reports each call when its output gradient arrives."""

    def __init__(
        self,
        on_forward: Callable[[], None],
        on_call: Callable[[LayerCall], None],
        failed: Failed,
        keep_output: tuple[type[nn.Module], ...] = (),
    ) -> None:
        """Prepare; nothing is hooked before `attach`.

        Args:
            on_forward: Called at every forward call of a layer.
            on_call: Called inside the backward pass.
            failed: Told of what was raised while a call was seen.
            keep_output: Layer types whose output is kept for ``on_call``.
        """
        self._on_forward = on_forward
        self._on_call = on_call
        self._failed = failed
        self._keep_output = keep_output
        self._handles: list[RemovableHandle] = []
        self._muted = False

    def attach(self, layers: list[Layer]) -> None:
        """Hook the layers."""
        for layer in layers:
            hook = Hook(_Seen(self, layer), layer.module, self._failed)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def active(self) -> bool:
        """Whether calls are to be seen now."""
        return not self._muted and torch.is_grad_enabled()

    def seen(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> None:
        """Take note of a forward call; one with tensors that have no plain rows is none of those that count."""
        if any(tensor.is_nested or tensor.layout != torch.strided for tensor in tensors_in((args, kwargs, output))):
            return
        self._on_forward()
        if not args and "input" in kwargs and type(layer.module).__module__.startswith("torch.nn"):
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        kept_args = map_tensors(Tensor.detach, args)
        kept_kwargs = {name: map_tensors(Tensor.detach, value) for name, value in kwargs.items()}
        versions = versions_of((kept_args, kept_kwargs))
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
                                versions,
                                kept,
                                index,
                                gradient.detach(),
                                torch.is_grad_enabled(),
                            )
                        )

                tensor.register_hook(of_gradient(arrived, self._failed))

    def _report(self, call: LayerCall) -> None:
        self._muted = True  # recomputing a layer calls modules that may carry our hooks
        try:
            with torch.no_grad():
                self._on_call(call)
        finally:
            self._muted = False


class _Seen:
    """The hook of one layer."""

    def __init__(self, hooks: LayerHooks, layer: Layer) -> None:
        self._hooks, self._layer = hooks, layer

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._hooks.active():
            self._hooks.seen(self._layer, args, kwargs, output)


def has_rows(value: Any, rows: int) -> bool:
    """Whether a value is a tensor with so many rows along dimension 0."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
