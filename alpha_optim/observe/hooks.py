"""Hooks that leave no trace: a copied or pickled module carries nothing of the wrapper with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alpha_optim.observe.interrupts import uninterrupted
from alpha_optim.observe.memory import goes_on


def inert(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing; what a hook becomes in a copied or unpickled module."""


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method as a hook on something that outlives its object, and must not keep it."""
    kept = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = kept()
        return None if alive is None else alive(*args)

    return call


Failed = Callable[[BaseException], None]
"""Told of what was raised while something was seen, so that it is not used."""


def harmless(call: Callable[..., Any], failed: Failed) -> Callable[..., Any]:
    """A function that only looks, as a hook in the user's loop: what it raises is told, and goes no further.

    Ctrl-C waits for its end, and then goes on; so do warnings that the user wants to be errors.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if being_captured():
            return None
        with uninterrupted():
            try:
                return call(*args, **kwargs)
            except BaseException as error:
                failed(error)
                if goes_on(error):
                    raise
                return None

    return run


def of_gradient(call: Callable[[Tensor], Any], failed: Failed) -> Callable[[Tensor | None], Any]:
    """A hook on a tensor for `Tensor.register_hook`, called with the gradient that reaches the tensor; see `harmless`.

    Torch calls it with None, too: for an output that nobody used of a function with several, `unbind` or cuDNN's LSTM.
    """
    guarded = harmless(call, failed)

    def run(gradient: Tensor | None) -> Any:
        return None if gradient is None else guarded(gradient)

    return run


class Hook:
    """A forward hook bound to one module.

    Copies of the module (an EMA model, a checkpoint of the whole module) would otherwise drag the
    optimizer along and report calls of the copy as calls of the original.
    """

    def __init__(self, call: Callable[..., Any], owner: nn.Module, failed: Failed) -> None:
        """Bind ``call`` to ``owner``; see `harmless`."""
        self._call = harmless(call, failed)
        self._owner = owner

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Forward the call if it comes from the module that was hooked."""
        # While somebody traces, or inside a transform of torch.func, the call is not one of the training loop's.
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if module is not self._owner or traced or inside_functorch():
            return None
        return self._call(module, *args)

    @property
    def __name__(self) -> str:
        """Asked for by `torch.jit.script`, which compiles the hooks of a module along with it.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(
            "torch.jit.script compiles the hooks of a module, and this model is watched: call optimizer.detach() first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """Become inert in a deep copy."""
        return inert

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Become inert in a pickle."""
        return (_make_inert, ())


def _make_inert() -> Callable[..., None]:
    return inert


def being_captured() -> bool:
    """Whether work for CUDA is being recorded into a graph: replays run no Python, and nothing may be waited for."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def inside_functorch() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp, ...) is active."""
    return bool(torch._C._functorch.peek_interpreter_stack() is not None)


def ours(hook: Any) -> bool:
    """Whether a hook on a tensor is one of this package's."""
    return str(getattr(hook, "__module__", "")).split(".")[0] == __name__.split(".")[0]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested value, in order; those of a mapping in its order; of other objects, attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from tensors_in(getattr(value, one.name, None))
    elif not isinstance(value, nn.Module):
        # Attributes that are tensors themselves: an object may lead to any other one, and back to itself.
        yield from (entry for entry in getattr(value, "__dict__", {}).values() if isinstance(entry, Tensor))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to the tensors in a value and in plain tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:
        return {name: map_tensors(function, entry) for name, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, entry) for entry in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a PackedSequence, say
        return type(value)(*(map_tensors(function, entry) for entry in value))
    return value


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; tensors made in inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def versions_of(tensors: Any) -> tuple[int, ...]:
    """Versions of the tensors in a nested value."""
    return tuple(map(version_of, tensors_in(tensors)))
