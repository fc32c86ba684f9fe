"""The fit as tensor operations against the one on floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alpha_optim import AlphaGuided, AlphaStatus, Observation, measure_alpha
from alpha_optim.measure.tensor_fit import alpha_of

number = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, math.nan, math.inf, -math.inf]))
variance = st.one_of(st.floats(0.0, 1e6), st.sampled_from([0.0, math.nan, math.inf]))
point = st.tuples(number, variance, number, variance)
seen = st.sampled_from([(True, True, True), (True, True, False), (True, False, True), (False, False, False)])


def on_floats(length, start, end, samples, observed):
    def observation(values, count, which):
        loss, loss_variance, slope, slope_variance = values
        usable = which[2] and not (math.isnan(slope_variance) and math.isfinite(slope))
        return Observation(
            count,
            slope,
            slope_variance if usable else None,
            loss if which[0] else None,
            loss_variance if which[1] else None,
        )

    ends = [observation(*each) for each in zip((start, end), samples, observed, strict=True)]
    return measure_alpha(0, length, *ends, (0.1,))


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(st.floats(1e-6, 1e6), st.just(0.0)), point, point,
    st.tuples(st.integers(2, 99), st.integers(2, 99)), seen, seen,
)  # fmt: skip
def test_the_same_alpha_as_on_floats(length, start, end, samples, seen_start, seen_end):
    observed = (seen_start, seen_end)
    expected = on_floats(length, start, end, samples, observed)
    numbers = torch.tensor([length, length != 0.0, 0.0, *start, *end], dtype=torch.float64)
    found = float(alpha_of(numbers, samples, observed))
    close = abs(expected.fitted_slope_end - expected.fitted_slope_start) <= 1e-9 * abs(
        expected.fitted_slope_start
    )
    if not close:  # on the border to concave rounding decides
        assert found == pytest.approx(expected.alpha, rel=1e-9, abs=1e-12, nan_ok=True)


def test_many_steps_at_once_and_dropped_ones():
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    ends[:, [1, 3, 5, 7]] = ends[:, [1, 3, 5, 7]].square()
    head = torch.tensor([[0.3, 1.0, 0.0]], dtype=torch.float64).expand(50, 3).clone()
    head[7, 2] = 2.0
    both = ((True, True, True), (True, True, True))
    found = alpha_of(torch.cat([head, ends], 1), (16, 32), both)
    expected = [
        math.nan if k == 7 else on_floats(0.3, row[:4], row[4:], (16, 32), both).alpha
        for k, row in enumerate(ends.tolist())
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert sum(alpha == -1.0 for alpha in expected) > 5


def test_the_newest_alpha_is_there_without_reading_the_history():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.01), model, loss_fn)
    assert guided.latest_alpha() is None
    for _ in range(4):
        guided.zero_grad()
        loss_fn(model(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
        guided.step()
    newest = guided.latest_alpha()
    assert isinstance(newest, torch.Tensor)
    assert newest.item() == pytest.approx(guided.alpha_history[-1].alpha, rel=1e-12)
    assert guided.alpha_history[-1].status is not AlphaStatus.NOT_FINITE
