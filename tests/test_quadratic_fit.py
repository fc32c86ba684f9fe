"""The fit against least squares solvers that share no code with it."""

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from alpha_optim import Observation, fit_quadratic
from alpha_optim.alpha.quadratic_fit import VARIANCE_FLOOR
from tests.reference.exact_fit import exact_alpha


def observations(losses, slopes, loss_variances, slope_variances, samples=(16, 16)):
    return [
        Observation(n, slope, slope_variance, loss, loss_variance)
        for n, loss, slope, loss_variance, slope_variance in zip(
            samples, losses, slopes, loss_variances, slope_variances, strict=True
        )
    ]


def weighted_design(t, noise):
    """Rows of the design matrix divided by the standard deviations of the means."""
    rows = np.array([[1, 0, 0], [1, t, t * t], [0, 1, 0], [0, 1, 2 * t]], dtype=float)
    return rows / np.sqrt(np.array(noise))[:, None]


@pytest.mark.parametrize("solver", ["numpy", "scipy"])
def test_fit_equals_weighted_least_squares(solver):
    rng = np.random.default_rng(0)
    for _ in range(200):
        t = 10.0 ** rng.uniform(-2, 2)
        losses, slopes = rng.normal(size=2), rng.normal(size=2)
        loss_variances, slope_variances = rng.uniform(0.1, 3, size=2), rng.uniform(0.1, 3, size=2)
        samples = rng.integers(2, 200, size=2)
        start, end = observations(losses, slopes, loss_variances, slope_variances, samples.tolist())
        noise = [*(loss_variances / samples), *(slope_variances / samples)]
        design = weighted_design(t, noise)
        target = np.array([*losses, *slopes]) / np.sqrt(noise)
        solve = np.linalg.lstsq if solver == "numpy" else scipy.linalg.lstsq
        options = {"rcond": None} if solver == "numpy" else {}
        _, w1, w2 = solve(design, target, **options)[0]
        covariance = np.linalg.inv(design.T @ design)
        to_slopes = np.array([[0, 1, 0], [0, 1, 2 * t]])
        expected = to_slopes @ covariance @ to_slopes.T

        fit = fit_quadratic(t, start, end)
        spread = math.sqrt(expected[1, 1])
        assert fit.slope_start == pytest.approx(w1, abs=1e-9 * (abs(w1) + spread))
        assert fit.slope_end == pytest.approx(w1 + 2 * t * w2, abs=1e-9 * (abs(w1) + spread))
        assert fit.half_curvature == pytest.approx(w2, abs=1e-9 * (abs(w2) + spread / t))
        assert fit.covariance == pytest.approx((expected[0, 0], expected[0, 1], expected[1, 1]), rel=1e-7)


def test_two_slopes_alone_are_met_exactly():
    start, end = Observation(0, -2.0), Observation(0, 0.5)
    fit = fit_quadratic(0.1, start, end)
    assert (fit.slope_start, fit.slope_end) == (-2.0, 0.5)
    assert all(math.isnan(entry) for entry in fit.covariance)


def test_slopes_with_variances_keep_their_own_noise():
    start, end = Observation(10, -2.0, 1.0), Observation(40, 0.5, 2.0)
    assert fit_quadratic(0.1, start, end).covariance == pytest.approx((0.1, 0.0, 0.05))


@pytest.mark.parametrize("step_length", [1e-30, 1e-12, 1e-3, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("curvature", [0.3, 1.0, 1.9])
def test_well_conditioned_for_steps_of_any_length(step_length, curvature):
    # The same parabola in the variable u = x / t: rise -1 at the start, curvature - 1 at the end.
    losses = [5.0, 5.0 - 1.0 + 0.5 * curvature]
    slopes = [-1.0 / step_length, (curvature - 1.0) / step_length]
    slope_variances = [2.0 / step_length**2, 3.0 / step_length**2]
    start, end = observations(losses, slopes, [1.0, 2.0], slope_variances)
    fit = fit_quadratic(step_length, start, end)
    assert -fit.slope_end / fit.slope_start == pytest.approx(curvature - 1.0, abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8])
def test_an_offset_of_the_loss_costs_only_what_the_losses_themselves_lose(offset):
    losses = [offset + 5.0, offset + 4.25]
    slopes, loss_variances, slope_variances = [-1.5, 0.25], [1.0, 2.0], [0.5, 0.25]
    start, end = observations(losses, slopes, loss_variances, slope_variances)
    fit = fit_quadratic(1.0, start, end)
    expected = exact_alpha(1.0, losses, slopes, loss_variances, slope_variances)
    assert -fit.slope_end / fit.slope_start == pytest.approx(expected, rel=1e-13)


def test_zero_variance_becomes_the_floor_before_it_is_divided_by_the_samples():
    start, end = observations([1.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [1.0, 0.0], samples=(4, 8))
    floored = observations([1.0, 0.0], [-2.0, 0.0], [VARIANCE_FLOOR, 1.0], [1.0, VARIANCE_FLOOR], (4, 8))
    assert fit_quadratic(0.7, start, end) == fit_quadratic(0.7, *floored)


number = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))
positive = st.floats(1e-3, 1e3).map(lambda x: round(x, 6))


@settings(max_examples=300, deadline=None)
@given(positive, number, number, number, number, positive, positive, positive, positive)
def test_fit_equals_exact_rational_solution(t, f0, f1, s0, s1, v0, v1, w0, w1):
    losses, slopes, loss_variances, slope_variances = [f0, f1], [s0, s1], [v0, v1], [w0, w1]
    start, end = observations(losses, slopes, loss_variances, slope_variances, (1, 1))
    fit = fit_quadratic(t, start, end)
    exact = exact_alpha(t, losses, slopes, loss_variances, slope_variances)
    scale = max(abs(f0), abs(f1)) / t + abs(s0) + abs(s1)
    if exact is None or abs(fit.slope_start) < 1e-9 * scale or fit.slope_end <= fit.slope_start:
        return
    assert -fit.slope_end / fit.slope_start == pytest.approx(exact, rel=1e-6, abs=1e-9)
