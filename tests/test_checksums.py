"""Checksums of states: whatever comes back by an honest way is taken over."""

import copy
import enum
import io
import json
import math
import threading

import numpy as np
import pytest
import torch

from alpha_optim import AlphaGuided, AlphaScheduler
from alpha_optim.steer.checks import check_intact, sealed


class Word(str, enum.Enum):
    ONE = "one"


class Number(enum.IntEnum):
    TWO = 2


STATE = {
    "floats": [1.0, -0.0, 1e-300, math.inf],
    "nans": [1.0, math.nan, math.inf - math.inf, -math.nan],
    "whole": [1, -5, 10**30, True, None],
    "mixed": [1, 1.0, "1", [1], (1.0, 2.0)],
    "words": ["a", "b\0c", "\ud800", ""],
    "enums": [Word.ONE, "two"],
    "number": Number.TWO,
    "numpy": [np.float64(0.5), 1.5],
    "keys": {7: 2, None: 3, True: 4, "x": 5},
    "nothing": {},
    "nested": {"a": [{"b": (1, [2.0])}]},
}


def by_json(state):
    return json.loads(json.dumps(state))


def by_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [by_json, by_torch, copy.deepcopy, lambda state: dict(reversed(state.items()))])
def test_a_state_is_intact_whichever_way_it_took(way):
    check_intact(way(sealed(STATE)), "a test")


@pytest.mark.parametrize("change", [
    {"floats": [1.0, 0.0, 1e-300, math.inf]}, {"whole": [1, -5, 10**30, False, None]}, {"whole": [1, -5, 10**30, True]},
    {"words": ["a", "b", "c", ""]}, {"number": 3}, {"keys": {7: 2, None: 3, True: 4, "y": 5}}, {"nothing": {"a": 1}},
    {"nested": {"a": [{"b": (1, [2.0000000000000004])}]}}, {"more": 1},
])  # fmt: skip
def test_any_other_is_not(change):
    with pytest.raises(
        ValueError, match=r"this state of a test cannot be taken over, and nothing was changed.*checksum"
    ):
        check_intact(sealed(STATE) | change, "a test")


def test_states_of_earlier_versions_tell_nothing():
    check_intact(STATE, "a test")


class Policy:
    """Its state is what it goes on with."""

    def __init__(self, more=None):
        self.state = {"count": [0], "more": more}

    def __call__(self, measurement):
        self.state["count"][0] += 1
        return 1.0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize("more", [None, threading.Lock()])
def test_a_policy_that_goes_on_with_its_state_spoils_no_saved_one(more):
    """One that cannot be copied is returned as it is, without a checksum."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AlphaGuided(torch.optim.SGD([weight], lr=0.1))
    scheduler = AlphaScheduler(optimizer, Policy(more))

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
            scheduler.step()

    steps(4)
    saved = scheduler.state_dict()
    assert ("checksum" in saved) == (more is None)
    count = list(saved["policy"]["count"])
    steps(4)
    if more is None:
        assert saved["policy"]["count"] == count
        scheduler.load_state_dict(saved)
        assert scheduler.policy.state["count"] == count
