"""Where the loss over a climbing rate was lowest, for advice from histories."""

import math

import numpy as np
import pytest

from alpha_optim import Observation, measure_alpha
from alpha_optim.alpha.loss_trace import LossTrace, room_above


def test_the_trace_knows_where_the_loss_was_lowest_and_when_it_rose():
    trace = LossTrace(4, first=2.0)
    losses = [2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 1.0, 1.0, 1.0, 1.2, 1.4]
    for position, loss in enumerate(losses):
        trace.add(loss + 0.001 * (-1) ** position, float(position), 0.01)
    assert not trace.risen()
    assert trace.lowest() == pytest.approx(6.5, abs=0.6)
    for position in range(11, 15):
        trace.add(1.9, float(position), 0.01)
    assert trace.risen()


def test_noise_alone_is_no_rise():
    trace = LossTrace(10, first=1.0)
    for n in range(300):
        trace.add(1.0 + 0.3 * math.sin(12.9 * n * n), 0.01 * n, 0.3)
    assert not trace.risen()


def test_a_noisy_stretch_without_progress_is_not_taken_for_the_lowest():
    trace = LossTrace(5, first=1.0)
    for n in range(30):
        trace.add(1.0 + 0.3 * math.sin(12.9 * n * n), 0.1 * n, 0.3)
    assert not trace.has_fallen()
    for n in range(30, 40):
        trace.add(0.1, 0.1 * n, 0.3)
    assert trace.has_fallen()


@pytest.mark.parametrize("seed", range(6))
def test_every_answer_is_that_of_all_windows_looked_at_anew(seed):
    """The losses fall, stand and rise, with little or much noise; asked after every one of them."""
    rng = np.random.default_rng(seed)
    size, first, noise = 4 + seed, 3.0, (0.01, 0.3)[seed % 2]
    losses = np.interp(np.arange(60), [0, 25, 35, 59], [3.0, 1.0, 1.0, 4.0]) + noise * rng.normal(size=60)
    where, error = np.linspace(-5.0, 2.0, 60), 0.05
    trace, said = LossTrace(size, first), set()
    for count in range(1, 61):
        trace.add(float(losses[count - 1]), float(where[count - 1]), error)
        windows = [slice(end - size, end) for end in range(size, count + 1)]
        if not windows:
            assert (trace.best, trace.lowest(), trace.risen(), trace.has_fallen()) == (None, None, False, False)
            continue
        means = np.array([losses[window].mean() for window in windows])
        place = int(means.argmin())
        deviation = max(error, losses[windows[place]].std(ddof=1))
        assert trace.best == pytest.approx((means[place], deviation, size))
        apart = deviation * math.sqrt(2.0 / size)
        risen = means[-1] - means[place] > max(0.5 * (first - means[place]), 4.0 * apart)
        assert trace.risen() == risen
        for errors in (2.0, 4.0):
            assert trace.has_fallen(errors) == (means[0] - means[place] > errors * apart)
        good = means <= means[place] + deviation / math.sqrt(size)
        middles = np.array([where[window].mean() for window in windows])
        assert trace.lowest() == pytest.approx(middles[good].mean())
        said |= {("risen", bool(risen)), ("fallen", trace.has_fallen())}
    assert said == {(name, answer) for name in ("risen", "fallen") for answer in (True, False)}


def test_the_room_above_grows_with_the_batch_within_bounds():
    assert room_above(32) == 0.0
    assert room_above(64) == pytest.approx(0.3 * math.log(2.0))
    assert room_above(1) == room_above(8) == pytest.approx(-0.3 * math.log(4.0))
    assert room_above(10**6) == room_above(256) == pytest.approx(0.3 * math.log(8.0))


@pytest.mark.parametrize(("variance", "expected"), [(0.9, math.sqrt(0.9 / 9)), (None, 0.0)])
def test_a_measurement_brings_its_own_error(variance, expected):
    end = Observation(9, 0.1, 1.0, 1.0, variance)
    trace = LossTrace(2, first=1.0)
    for _ in range(2):
        trace.see(measure_alpha(0, 1.0, Observation(9, -1.0, 1.0, 2.0, variance), end, (0.1,)), -3.0)
    assert trace.best == pytest.approx((2.0, expected, 2))
    assert trace.lowest() == -3.0
