"""Objects to plain values and back: nothing is lost, and what is no such state is refused by name."""

import importlib
import json
import math
import pathlib
import pkgutil
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import alpha_optim
from alpha_optim.alpha.states import Remembers, from_plain, to_plain


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(NamedTuple):
    mean: float
    count: int


@dataclass(frozen=True)
class Inner:
    place: Literal["start", "best"] | None
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    colour: Colour
    by_name: dict[str, list[float]]
    pair: tuple[int, bool] | None = None


class Part(Remembers):
    newest: deque[tuple[float, float]]
    _seen: set[str]
    late: float = 0.5

    def __init__(self):
        self.newest, self._seen = deque(maxlen=3), set()
        self.of_this_process = object()


class Whole(Remembers, names={"colour": "paint"}):
    colour: Colour
    _part: Part
    anything: Any
    outer: Outer | None

    def __init__(self):
        self.colour, self._part, self.anything, self.outer = Colour.RED, Part(), None, None


numbers = st.floats(allow_nan=False)
levels = st.builds(Level, numbers, st.integers())
outers = st.builds(
    Outer,
    st.builds(Inner, st.sampled_from([None, "start", "best"]), st.lists(levels, max_size=3).map(tuple)),
    st.sampled_from(Colour),
    st.dictionaries(st.text(), st.lists(numbers, max_size=3), max_size=3),
    st.none() | st.tuples(st.integers(), st.booleans()),
)


@settings(max_examples=50, deadline=None)
@given(outers, st.lists(st.tuples(numbers, numbers)), st.sets(st.text()), st.sampled_from(Colour))
def test_there_and_back_by_way_of_json(outer, newest, seen, colour):
    one, other = Whole(), Whole()
    one.outer, one.colour, one.anything = outer, colour, {"a": [1, None]}
    one._part.newest.extend(newest)
    one._part._seen, one._part.late = seen, 3.0
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert (other.outer, other.colour, other.anything) == (outer, colour, {"a": [1, None]})
    assert list(other._part.newest) == newest[-3:]
    assert other._part.newest.maxlen == 3
    assert (other._part._seen, other._part.late) == (seen, 3.0)
    assert other.state_dict() == one.state_dict()


def test_names_are_those_of_the_state():
    assert set(Whole().state_dict()) == {"paint", "part", "anything", "outer"}
    assert set(Part().state_dict()) == {"newest", "seen", "late"}


def test_what_versions_before_did_not_have_is_as_the_class_says():
    part = Part()
    part.late = 7.0
    part.load_state_dict({"newest": [], "seen": []})
    assert part.late == 0.5
    found = from_plain(Outer, {"inner": {"place": None}, "colour": "red", "by_name": {}}, "outer")
    assert found == Outer(Inner(None), Colour.RED, {})


@pytest.mark.parametrize("missing", ["newest", "seen"])
def test_what_always_was_there_must_not_be_missing(missing):
    state = Part().state_dict()
    del state[missing]
    with pytest.raises(KeyError, match=missing):
        Part().load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True),
        (int, 1.5),
        (float, True),
        (float, "1.5"),
        (bool, 1),
        (bool, "true"),
        (str, 1),
        (Level, [1.0]),
        (Level, [1.0, 2.5]),
        (tuple[int, bool], [1, True, 3]),
        (tuple[float, ...], [1.0, None]),
        (list[int], "12"),
        (list[int], 3),
        (dict[str, int], [1]),
        (dict[str, int], {"a": 0.5}),
        (float | None, "none"),
        (Literal["start"], "end"),
        (Inner, []),
        (Inner, {"place": "nowhere"}),
    ],
)
def test_another_type_is_refused_by_name(kind, value):
    with pytest.raises(TypeError, match=r"^\w+ should be .+, got "):
        from_plain(kind, value, "it")


def test_a_field_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match=r"inner should have place, levels and nothing else, got .*plaice"):
        from_plain(Inner, {"place": None, "plaice": 1}, "inner")


def test_no_member_of_an_enum():
    with pytest.raises(ValueError, match="green"):
        from_plain(Colour, "green", "it")


def test_whole_numbers_are_numbers():
    found = from_plain(tuple[float, ...], [1, math.inf], "it")
    assert found == (1.0, math.inf)
    assert isinstance(found[0], float)
    assert to_plain((1, {"a": (Colour.RED,)})) == [1, {"a": ["red"]}]


def kinds():
    for module in pkgutil.walk_packages([str(pathlib.Path(alpha_optim.__file__).parent)], "alpha_optim."):
        if module.name.split(".")[-1] != "__main__" and ".integrations." not in module.name:
            importlib.import_module(module.name)
    return sorted(Remembers.__subclasses__(), key=lambda kind: kind.__qualname__)


def test_a_class_that_remembers_declares_something():
    ours = [kind for kind in kinds() if kind.__module__.startswith("alpha_optim.")]
    assert len(ours) > 10
    for kind in ours:
        assert kind._remembered, kind
