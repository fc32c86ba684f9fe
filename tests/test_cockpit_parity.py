"""Ours beside Cockpit itself, on the same seeds; all cases run with `make parity`."""

import pytest
import torch

from tests.parity import CASES, EVERY, RATES, SHORT, SIZES, TOLERANCE, backends, compare
from tests.problems import MODELS, OPTIMIZERS


def check(case, dtype):
    for backend in backends(case[1]):
        worst = compare(*case, backend, dtype)
        assert max(worst.values()) <= TOLERANCE[dtype], (backend, worst)


@pytest.mark.parametrize("case", SHORT, ids=lambda case: "-".join(map(str, case)))
def test_float64(case):
    check(case, torch.float64)


@pytest.mark.parametrize("case", SHORT[::4], ids=lambda case: "-".join(map(str, case)))
def test_float32(case):
    check(case, torch.float32)


def test_the_short_list_touches_every_value_of_every_axis():
    for axis, values in enumerate((MODELS, OPTIMIZERS, RATES, SIZES, EVERY)):
        assert {case[axis] for case in SHORT} == set(values)
    assert len(SHORT) >= 40
    assert len(CASES) == 540
