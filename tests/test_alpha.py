"""Alpha, its standard error, its interval and its status."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alpha_optim import AlphaStatus, Observation, QuadraticFit, measure_alpha
from alpha_optim.alpha.measurement import fieller_interval


def parabola(minimum, curvature, t, samples=32, noise=1.0, offset=0.0):
    """Noise-free observations of offset + curvature/2 (x - minimum)^2 at 0 and t."""

    def at(x):
        value = offset + 0.5 * curvature * (x - minimum) ** 2
        return Observation(samples, curvature * (x - minimum), noise, value, noise)

    return at(0.0), at(t)


def alpha_of(start, end, t):
    return measure_alpha(0, t, start, end, (0.1,))


# ------------------------------------------------------------------ the table of cases


def test_minimum_mirror_point_and_beyond():
    assert alpha_of(*parabola(2.0, 3.0, 2.0), 2.0).alpha == pytest.approx(0.0, abs=1e-14)
    assert alpha_of(*parabola(2.0, 3.0, 4.0), 4.0).alpha == pytest.approx(1.0)
    assert alpha_of(*parabola(2.0, 3.0, 1.0), 1.0).alpha == pytest.approx(-0.5)
    assert alpha_of(*parabola(2.0, 3.0, 8.0), 8.0).alpha == pytest.approx(3.0)


def test_concave_is_minus_one_with_its_own_status():
    measured = alpha_of(Observation(8, -1.0, 1.0, 1.0, 1.0), Observation(8, -2.0, 1.0, -0.5, 1.0), 1.0)
    assert (measured.alpha, measured.status) == (-1.0, AlphaStatus.CONCAVE)
    assert measured.fitted_slope_end < measured.fitted_slope_start < 0.0


def test_no_step():
    measured = alpha_of(Observation(8, math.nan, None, 1.0, 1.0), Observation(8, math.nan, None, 1.0, 1.0), 0.0)
    assert (measured.alpha, measured.status) == (-1.0, AlphaStatus.NO_STEP)
    assert all(math.isnan(end) for end in measured.interval())


def test_degenerate_when_the_fitted_start_slope_vanishes():
    measured = alpha_of(Observation(0, 0.0), Observation(0, 1.0), 1.0)
    assert math.isnan(measured.alpha)
    assert measured.status is AlphaStatus.DEGENERATE


def test_degenerate_wins_over_concave():
    measured = alpha_of(Observation(0, 0.0), Observation(0, -1.0), 1.0)
    assert measured.status is AlphaStatus.DEGENERATE


def test_straight_line_is_minus_one_and_measured():
    measured = alpha_of(Observation(0, -1.0), Observation(0, -1.0), 1.0)
    assert (measured.alpha, measured.status) == (-1.0, AlphaStatus.MEASURED)


def test_ascent_keeps_its_number():
    measured = alpha_of(Observation(0, 1.0), Observation(0, 2.0), 1.0)
    assert (measured.alpha, measured.status) == (-2.0, AlphaStatus.ASCENT)


def test_concave_wins_over_ascent():
    measured = alpha_of(Observation(0, 1.0), Observation(0, 0.5), 1.0)
    assert (measured.alpha, measured.status) == (-1.0, AlphaStatus.CONCAVE)


@pytest.mark.parametrize("field", ["slope", "loss", "slope_variance", "loss_variance"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(field, value):
    start, end = parabola(1.0, 1.0, 1.0)
    measured = alpha_of(start, replace(end, **{field: value}), 1.0)
    assert math.isnan(measured.alpha)
    assert measured.status is AlphaStatus.NOT_FINITE


def test_not_finite_wins_over_no_step():
    start, end = parabola(1.0, 1.0, 1.0)
    assert alpha_of(start, replace(end, loss=math.nan), 0.0).status is AlphaStatus.NOT_FINITE


def test_information_falls_back_step_by_step():
    start, end = parabola(1.0, 1.0, 0.5)
    assert alpha_of(start, end, 0.5).information == "full"
    no_noise = replace(end, loss_variance=None)
    measured = alpha_of(start, no_noise, 0.5)
    assert measured.information == "slopes+variances"
    assert measured.loss_end == end.loss  # recorded, not used
    assert measured.alpha == -end.slope / start.slope
    single = replace(end, slope_variance=None, loss_variance=None)
    measured = alpha_of(start, single, 0.5)
    assert measured.information == "slopes"
    assert math.isnan(measured.alpha_std)


def test_float_is_alpha():
    measured = alpha_of(*parabola(2.0, 3.0, 1.0), 1.0)
    assert float(measured) == measured.alpha


# ------------------------------------------------------------------ properties

finite = st.floats(-100, 100)
positive = st.floats(0.01, 100)


@st.composite
def measurable(draw):
    t, n0, n1 = draw(positive), draw(st.integers(2, 500)), draw(st.integers(2, 500))
    start = Observation(n0, draw(finite), draw(positive), draw(finite), draw(positive))
    end = Observation(n1, draw(finite), draw(positive), draw(finite), draw(positive))
    measured = alpha_of(start, end, t)
    assume(measured.status is AlphaStatus.MEASURED)
    assume(abs(measured.fitted_slope_start) > 1e-6 and abs(measured.alpha) < 1e6)
    return t, start, end, measured


@settings(max_examples=200, deadline=None)
@given(measurable(), st.floats(-1e3, 1e3))
def test_alpha_does_not_change_when_the_loss_is_shifted(case, shift):
    t, start, end, measured = case
    moved = [replace(seen, loss=seen.loss + shift) for seen in (start, end)]
    slack = 1e-9 * (1 + abs(shift) / t / abs(measured.fitted_slope_start)) * (1 + abs(measured.alpha))
    assert alpha_of(*moved, t).alpha == pytest.approx(measured.alpha, abs=slack)


@settings(max_examples=200, deadline=None)
@given(measurable(), st.floats(1e-3, 1e3))
def test_alpha_does_not_change_when_loss_and_noise_are_scaled_together(case, c):
    t, start, end, measured = case
    scaled = [
        Observation(o.samples, c * o.slope, c * c * o.slope_variance, c * o.loss, c * c * o.loss_variance)
        for o in (start, end)
    ]
    assert alpha_of(*scaled, t).alpha == pytest.approx(measured.alpha, rel=1e-7, abs=1e-7)


@settings(max_examples=200, deadline=None)
@given(measurable(), st.floats(1e-3, 1e3))
def test_alpha_does_not_change_when_the_direction_is_rescaled(case, c):
    t, start, end, measured = case
    scaled = [replace(o, slope=o.slope / c, slope_variance=o.slope_variance / c / c) for o in (start, end)]
    other = alpha_of(*scaled, t * c)
    assert other.alpha == pytest.approx(measured.alpha, rel=1e-7, abs=1e-7)
    assert other.alpha_std == pytest.approx(measured.alpha_std, rel=1e-6, abs=1e-7)


@settings(max_examples=200, deadline=None)
@given(positive, positive, st.floats(-3, 3), positive)
def test_a_parabola_gives_zero_at_its_minimum_and_one_at_the_mirror_point(minimum, curvature, offset, noise):
    at_minimum = alpha_of(*parabola(minimum, curvature, minimum, noise=noise, offset=offset), minimum)
    assert at_minimum.alpha == pytest.approx(0.0, abs=1e-6)
    mirrored = alpha_of(*parabola(minimum, curvature, 2 * minimum, noise=noise, offset=offset), 2 * minimum)
    assert mirrored.alpha == pytest.approx(1.0, abs=1e-6)


# ------------------------------------------------------------------ errors


def simulate(true_alpha, noise, draws, seed):
    """Measurements of a parabola with start slope -1 over a step of length 1; noise known."""
    rng = np.random.default_rng(seed)
    samples = (32, 48)
    slopes = (-1.0, true_alpha)
    losses = (0.0, 0.5 * (true_alpha - 1.0))
    variances = {"loss": (noise, 1.5 * noise), "slope": (2.0 * noise, 0.7 * noise)}
    for _ in range(draws):
        seen = [
            Observation(
                samples[k],
                slopes[k] + rng.normal() * math.sqrt(variances["slope"][k] / samples[k]),
                variances["slope"][k],
                losses[k] + rng.normal() * math.sqrt(variances["loss"][k] / samples[k]),
                variances["loss"][k],
            )
            for k in range(2)
        ]
        yield alpha_of(*seen, 1.0)


@pytest.mark.parametrize("true_alpha", [-0.6, 0.0, 0.8])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_fieller_interval_covers_95_percent(true_alpha, noise):
    covered = sum(
        low <= true_alpha <= high
        for low, high in (m.interval(0.95) for m in simulate(true_alpha, noise, 10_000, seed=int(10 * noise)))
    )
    assert 0.94 <= covered / 10_000 <= 0.96


def test_where_the_start_slope_is_uncertain_the_interval_errs_on_the_safe_side():
    # The exact set is then the outside of an interval; (-inf, inf) is the smallest interval around it.
    covered = sum(low <= 0.3 <= high for low, high in (m.interval(0.95) for m in simulate(0.3, 3.0, 5000, 1)))
    assert 0.95 <= covered / 5000 < 1.0


def test_standard_error_is_the_spread_of_alpha_where_the_start_slope_is_certain():
    runs = list(simulate(0.3, 0.02, 4000, seed=5))
    standardised = np.array([(m.alpha - 0.3) / m.alpha_std for m in runs])
    assert standardised.std() == pytest.approx(1.0, abs=0.04)


def test_interval_is_unbounded_where_the_start_slope_may_be_zero():
    assert fieller_interval(QuadraticFit(1.0, -0.1, 0.5, (1.0, 0.0, 1.0))) == (-math.inf, math.inf)


@pytest.mark.parametrize("level", [0.3, 0.8, 0.99])
@pytest.mark.parametrize(("start", "end"), [(-1.0, 0.2), (-0.5, 3.0), (-40.0, -10.0), (-1e-8, 2e-8)])
def test_the_interval_holds_every_ratio_that_noise_could_have_made(start, end, level):
    """By the definition: a is in it where end + a start lies within z of its own standard errors from 0."""
    scale = max(abs(start), abs(end))
    covariance = (0.01 * start**2, 0.002 * scale * abs(start), 0.02 * scale**2)
    low, high = fieller_interval(QuadraticFit(1.0, start, end, covariance), level)
    z = NormalDist().inv_cdf((1.0 + level) / 2.0)

    def apart(a):
        error = math.sqrt(covariance[2] + 2.0 * a * covariance[1] + a * a * covariance[0])
        return abs(end + a * start) - z * error

    for edge in (low, high):
        assert apart(edge) == pytest.approx(0.0, abs=1e-9 * scale)
    assert apart((low + high) / 2.0) < 0.0
    width = high - low
    assert apart(low - 0.01 * width) > 0.0
    assert apart(high + 0.01 * width) > 0.0


@pytest.mark.parametrize("losses", [True, False])
def test_the_narrowest_interval_is_alpha_itself(losses):
    """Losses are in the one where they are in the other."""
    start = Observation(32, -1.0, 0.5, 2.0 if losses else None, 0.1 if losses else None)
    end = Observation(32, 0.3, 0.4, 1.2 if losses else None, 0.2 if losses else None)
    measured = measure_alpha(0, 0.8, start, end, (0.1,))
    assert measured.information == ("full" if losses else "slopes+variances")
    assert measured.interval(1e-9) == pytest.approx((measured.alpha, measured.alpha), abs=1e-8)
    assert abs(measured.alpha - 0.3) > 0.01 if losses else measured.alpha == pytest.approx(0.3)


def test_interval_without_noise_is_unknown():
    assert all(math.isnan(end) for end in alpha_of(Observation(0, -1.0), Observation(0, 0.5), 1.0).interval())


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_interval_refuses_levels_outside_zero_and_one(level):
    with pytest.raises(ValueError, match="level must lie strictly between 0 and 1"):
        alpha_of(*parabola(1.0, 1.0, 0.5), 0.5).interval(level)


def test_every_status_explains_itself():
    assert all(len(status.explanation) > 20 for status in AlphaStatus)
    assert str(AlphaStatus.MEASURED) == "measured" == AlphaStatus.MEASURED
