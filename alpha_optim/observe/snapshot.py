"""What a forward pass may change beside tensors that it returns, kept and put back.

Attributes of modules and of helper objects they hold, contents of containers however nested, tensors and arrays among
them, random generators of their own, values on the classes of modules; and Python's and NumPy's global random numbers.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST = 20_000
"""So many objects are followed at most; a module that holds more is one that holds data."""
_FOREIGN = ("torch", "numpy", "builtins", "collections", "typing", "functools", "types", "threading", "logging")


class Snapshot:
    """The state reachable from some objects."""

    def __init__(self, most: float = math.inf) -> None:
        """Start with nothing kept.

        Args:
            most: Tensors and arrays of more elements are data, which nobody changes.
        """
        self._most = most
        self._undo: list[Callable[[], None]] = []
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # so that no id is used twice
        self.modules: list[nn.Module] = []
        """Modules that were met: they are not registered as children of another."""

    def keep(self, value: Any) -> None:
        """Keep what is reachable from a value."""
        waiting = [value]
        while waiting and len(self._seen) < MOST:
            entry = waiting.pop()
            if id(entry) in self._seen or isinstance(entry, (int, float, str, bytes, bool, type(None), type)):
                continue
            self._seen.add(id(entry))
            self._alive.append(entry)
            waiting.extend(self._keep_one(entry))

    def _keep_one(self, entry: Any) -> list[Any]:
        """Keep one object; returns what it holds."""
        if isinstance(entry, nn.Module):
            self.modules.append(entry)
            return []
        if isinstance(entry, Tensor):
            self._keep_tensor(entry)
            return []
        if isinstance(entry, torch.Generator):
            state = entry.get_state()

            def set_state() -> None:
                entry.set_state(state)

            self._undo.append(set_state)
            return []
        if isinstance(entry, (list, deque)):
            items = list(entry)
            self._undo.append(lambda: _refill(entry, items))
            return items
        if isinstance(entry, dict):
            pairs = dict(entry)
            self._undo.append(lambda: _update(entry, pairs))
            return list(pairs.values())
        if isinstance(entry, set):
            members = set(entry)
            self._undo.append(lambda: _update(entry, members))
            return list(members)
        if isinstance(entry, tuple):
            return list(entry)
        return self._keep_object(entry)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if tensor.is_inference() or tensor.layout != torch.strided or tensor.is_nested or tensor.numel() > self._most:
            return
        copy = tensor.detach().clone()

        def undo() -> None:
            # Not by versions: batch normalisation updates its statistics without counting.
            if not torch.equal(tensor, copy):
                with torch.no_grad():
                    tensor.detach().copy_(copy)

        self._undo.append(undo)

    def _keep_object(self, entry: Any) -> list[Any]:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(entry, numpy.ndarray):
            if entry.size > self._most:
                return []
            copy = entry.copy()
            self._undo.append(lambda: numpy.copyto(entry, copy) if entry.flags.writeable else None)
            return []
        if numpy is not None and isinstance(entry, numpy.random.Generator):
            state = entry.bit_generator.state
            self._undo.append(lambda: setattr(entry.bit_generator, "state", state))
            return []
        if numpy is not None and isinstance(entry, numpy.random.RandomState):
            legacy = entry.get_state()
            self._undo.append(lambda: entry.set_state(legacy))
            return []
        if isinstance(entry, random.Random):
            drawn = entry.getstate()
            self._undo.append(lambda: entry.setstate(drawn))
            return []
        if type(entry).__module__.split(".")[0] in _FOREIGN:
            return []
        held = getattr(entry, "__dict__", None)
        found: list[Any] = []
        if isinstance(held, dict):
            values = dict(held)
            self._undo.append(lambda: put_back(held, values))
            found += values.values()
        return found + self.keep_slots(entry)

    def keep_slots(self, entry: Any) -> list[Any]:
        """Keep the slots of an object; returns what they hold."""
        found: list[Any] = []
        for name in _slots_of(type(entry)):
            if hasattr(entry, name):
                value = getattr(entry, name)
                self._undo.append(lambda name=name, value=value: object.__setattr__(entry, name, value))  # type: ignore[misc] # - no type
                found.append(value)
        return found

    def keep_class(self, kind: type) -> None:
        """Keep the plain values that a class of the user's holds."""
        if kind in (object, nn.Module) or kind.__module__.split(".")[0] == "torch" or id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        for name, value in list(vars(kind).items()):
            if name.startswith("__") or callable(value) or isinstance(value, (property, staticmethod, classmethod)):
                continue
            self._undo.append(lambda name=name, value=value: _set_back(kind, name, value))  # type: ignore[misc] # - no type
            self.keep(value)
        for base in kind.__bases__:
            self.keep_class(base)

    def keep_attributes(self, entry: Any) -> None:
        """Keep the attributes of an object that may hold data, and of what they hold generators and what is small."""
        held = getattr(entry, "__dict__", None)
        if not isinstance(held, dict) or id(entry) in self._seen:
            return
        self._seen.add(id(entry))
        self._alive.append(entry)
        values = dict(held)
        self._undo.append(lambda: put_back(held, values))
        for value in values.values():
            if _is_small_state(value, self._most):
                self.keep(value)

    def restore(self) -> None:
        """Put everything back."""
        for undo in reversed(self._undo):
            undo()


def _is_small_state(value: Any, most: float) -> bool:
    kind = type(value).__module__
    if isinstance(value, (Tensor, torch.Generator, random.Random)) or kind.startswith("numpy"):
        return True
    return isinstance(value, (list, dict, set, deque)) and len(value) <= most


def put_back(namespace: dict[str, Any], values: dict[str, Any]) -> None:
    """Give the attributes of an object, or a dictionary like them, back in their order; never empty in between."""
    namespace.update(values)
    for name in [name for name in namespace if name not in values]:
        del namespace[name]
    if list(namespace) != list(values):
        for name, value in values.items():
            del namespace[name]
            namespace[name] = value


def _refill(container: Any, items: list[Any]) -> None:
    container.clear()
    container.extend(items)


def _update(container: Any, values: Any) -> None:
    container.clear()
    container.update(values)


def _set_back(kind: type, name: str, value: Any) -> None:
    if vars(kind).get(name) is not value:
        setattr(kind, name, value)


def _slots_of(kind: type) -> list[str]:
    names: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


@contextmanager
def other_random_numbers_untouched() -> Iterator[None]:
    """Leave Python's and NumPy's global random numbers as they were."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
