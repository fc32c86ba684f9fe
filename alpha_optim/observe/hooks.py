"""Hooks that leave no trace: a copied or pickled module carries nothing of the wrapper with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def inert(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing; what a hook becomes in a copied or unpickled module."""


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method as a hook on something that outlives its object, and must not keep it."""
    kept = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = kept()
        return None if alive is None else alive(*args)

    return call


class Hook:
    """A forward hook bound to one module.

    Copies of the module (an EMA model, a checkpoint of the whole module) would otherwise drag the
    optimizer along and report calls of the copy as calls of the original.
    """

    def __init__(self, call: Callable[..., Any], owner: nn.Module) -> None:
        """Bind ``call`` to ``owner``."""
        self._call = call
        self._owner = owner

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Forward the call if it comes from the module that was hooked."""
        return self._call(module, *args) if module is self._owner else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """Become inert in a deep copy."""
        return inert

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Become inert in a pickle."""
        return (_make_inert, ())


def _make_inert() -> Callable[..., None]:
    return inert


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
