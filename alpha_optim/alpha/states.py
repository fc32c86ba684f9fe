"""What a resumed run needs of an object: to plain values, and back.

Plain values are what JSON knows, tensors aside: None, bool, int, float, str, lists and dictionaries. An enum stands
there as its value, a named tuple as a list, a dataclass as a dictionary.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints


class Remembers:
    """An object whose state are the attributes that its class declares in its body.

    A state has them without leading underscores, or under the name that the class says: ``class Some(Remembers,
    names={"attribute": "in_a_state"})``, since versions before called them so. One that the class body gives a value
    may be missing, since versions before had none: then it has that value.
    """

    _remembered: ClassVar[Mapping[str, tuple[str, Any]]]

    def __init_subclass__(cls, names: Mapping[str, str] | None = None) -> None:
        """Note what the class declares: by attribute, the name in a state and the type."""
        kinds = {name: kind for name, kind in get_type_hints(cls).items() if get_origin(kind) is not ClassVar}
        cls._remembered = {name: ((names or {}).get(name, name.lstrip("_")), kind) for name, kind in kinds.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as plain values."""
        return {key: to_plain(getattr(self, name)) for name, (key, _) in self._remembered.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what is remembered.

        Raises:
            KeyError: If something is missing.
            TypeError: If something is of another type; what is then half loaded has to be loaded anew.
            ValueError: If something is none of the values that there are.
        """
        for name, (key, kind) in self._remembered.items():
            present = getattr(self, name)
            if isinstance(present, Remembers):
                present.load_state_dict(state[key])
            elif key not in state and hasattr(type(self), name):
                setattr(self, name, getattr(type(self), name))
            else:
                value = from_plain(kind, state[key], key)
                length = present.maxlen if isinstance(present, deque) else None
                setattr(self, name, value if length is None else deque(value, length))


def to_plain(value: Any) -> Any:
    """Plain values for an object; what is none of those that are known here stays as it is."""
    if isinstance(value, Remembers):
        return value.state_dict()
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(map(to_plain, value)) if isinstance(value, (list, tuple, deque)) else value


def from_plain(kind: Any, value: Any, name: str) -> Any:
    """The object that plain values stand for.

    Args:
        kind: Its type, as in an annotation.
        value: What `to_plain` returned, perhaps after a detour by way of JSON.
        name: What it is called, for messages.

    Raises:
        KeyError: If a field of a dataclass that has no default is missing.
        TypeError: If it is of another type, or has a field that its dataclass does not have.
        ValueError: If it is none of the members of an enum, or none of the values of a literal.
    """
    origin, of = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        (of,) = (other for other in of if other is not types.NoneType)
        return None if value is None else from_plain(of, value, name)
    if origin is Literal and value in of:
        return value
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        return kind(**_fields(kind, value, name))
    if isinstance(value, (list, tuple)) and (built := _sequence(kind, value, name)) is not None:
        return built
    if origin is dict and isinstance(value, Mapping):
        return {from_plain(of[0], key, name): from_plain(of[1], entry, name) for key, entry in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return kind(value)
    raise TypeError(f"{name} should be {_said(kind)}, got {value!r:.100}")


@cache
def _kinds(kind: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass or a named tuple; a log holds thousands of them."""
    return get_type_hints(kind)


def _said(kind: Any) -> str:
    """A type, in a message."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def _sequence(kind: Any, value: Any, name: str) -> Any:
    """A tuple, named or not, list, deque or set; None if the type is none of them, or has another length."""
    origin, of = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and hasattr(kind, "_make"):  # a named tuple
        of, origin = tuple(_kinds(kind).values()), kind._make
    elif origin in (list, deque, set) or of[1:] == (...,):
        of = of[:1] * len(value)
    elif origin is not tuple:
        return None
    if len(of) != len(value):
        return None
    return origin([from_plain(each, entry, name) for each, entry in zip(of, value, strict=True)])


def _fields(kind: Any, state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values for the fields of a dataclass; those that a state of an older version lacks are left to their defaults.

    Raises:
        TypeError: If there is one that the dataclass does not have.
    """
    kinds = _kinds(kind)
    known = [field.name for field in fields(kind)]
    if not set(state) <= set(known):
        raise TypeError(f"{name} should have {', '.join(known)} and nothing else, got {sorted(state, key=str)!r:.100}")
    optional = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
    return {
        field: from_plain(kinds[field], state[field], field)
        for field in known
        if field in state or field not in optional
    }
