"""What is special about each policy."""

import math
import warnings

import pytest

from alpha_optim import (
    Bounded,
    CalibrateThenAnneal,
    GuardEvent,
    Observation,
    OvershootBackoff,
    TargetAlpha,
    WithWarmup,
    measure_alpha,
)


def seen(alpha, n=0, lr=0.1):
    return measure_alpha(n, 1.0, Observation(0, -1.0), Observation(0, alpha), (lr,))


def test_target_alpha_moves_the_log_rate_in_proportion_and_slower_up_than_down():
    assert TargetAlpha(0.1, gain=0.2, window=1)(seen(0.4)) == pytest.approx(math.exp(-0.2 * 0.3))
    assert TargetAlpha(0.1, gain=0.2, window=1)(seen(-0.2)) == pytest.approx(math.exp(0.1 * 0.3))
    assert TargetAlpha(0.1, gain=0.2, window=1)(seen(1e9)) == pytest.approx(math.exp(-0.2))


def test_target_alpha_settles_where_alpha_is_the_target():
    # A parabola with its minimum at rate 0.02: alpha = lr / 0.02 - 1.
    policy, lr = TargetAlpha(0.1, gain=0.2, window=5), 1e-4
    for n in range(400):
        lr *= policy(seen(lr / 0.02 - 1.0, n, lr))
    assert lr == pytest.approx(0.022, rel=0.01)


def test_overshoot_backoff_answers_one_bad_stretch_once():
    policy = OvershootBackoff(limit=0.7, factor=0.5, window=5)
    factors = [policy(seen(1.5 + 0.01 * n)) for n in range(5)]
    assert factors == [1.0] * 4 + [0.5]
    assert all(policy(seen(0.3)) == 1.0 for _ in range(20))
    assert 0.5 in [policy(seen(1.5)) for _ in range(10)]


def test_bounded_cuts_the_product():
    policy = Bounded(lambda m: 3.0, lowest=0.5, highest=10.0)
    assert [policy(seen(0.0)) for _ in range(4)] == pytest.approx([3.0, 3.0, 10 / 9, 1.0])


def test_warmup_holds_the_policy_back_and_lets_the_rate_grow():
    policy = WithWarmup(lambda m: 2.0, steps=4)
    assert [policy.envelope(n) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [policy(seen(0.0, n)) for n in (2, 3, 4)] == [1.0, 1.0, 2.0]


def calibrate(initial, knee, steps=1000, width=1.0):
    """Run the policy on a caricature: alpha rises with the log rate through 0 at the knee."""
    policy, lr = CalibrateThenAnneal(steps), initial
    pending = []
    for n in range(steps):
        pending.append((n, lr * policy.envelope(n) if n < policy.calibration_steps else lr))
        if n >= 1:  # measurement n-1 is known after step n
            m, rate = pending[n - 1]
            level = max(-0.7, min(0.3, math.log(rate / knee) / width))
            lr *= policy(seen(level + 0.05 * math.sin(7.0 * m), m, rate))
    return policy, lr


@pytest.mark.parametrize("initial", [1e-6, 1e-3, 0.1, 10.0])
def test_calibration_finds_the_rate_from_either_side(initial):
    _, lr = calibrate(initial, knee=0.02)
    assert 0.02 / 3 < lr < 0.02 * 3


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("steps", [20, 60, 600])
def test_short_runs_and_sparse_measurements_do_not_end_below_a_rate_that_is_too_low_already(steps, every):
    policy, lr = CalibrateThenAnneal(steps), 1e-3
    rates = {}
    for n in range(policy.calibration_steps + 3):
        annealed = 1.0 if n < policy.calibration_steps else (steps - n) / (steps - policy.calibration_steps)
        rates[n] = lr * policy.envelope(n) / annealed
        if n >= 1 and (n - 1) % every == 0:
            level = max(-0.7, min(0.3, math.log(rates[n - 1] / 0.5)))
            lr *= policy(seen(level + 0.01 * (n % 3), n - 1, rates[n - 1]))
    assert rates[n] >= 1e-3 * (1 - 1e-9)


def test_where_alpha_says_nothing_the_users_rate_is_used():
    policy, product = CalibrateThenAnneal(500), 1.0
    for n in range(200):
        product *= policy(seen(0.5 * (-1) ** n, n))
    assert product == pytest.approx(1.0)
    silent = CalibrateThenAnneal(500)
    assert silent.envelope(99) < 0.1
    assert silent.envelope(100) == 1.0


def test_calibration_ends_and_then_anneals_to_zero():
    policy, _ = calibrate(1e-3, knee=0.02, steps=500)
    assert policy(seen(5.0, 400)) == 1.0
    start = policy.calibration_steps
    envelope = [policy.envelope(n) for n in range(501)]
    assert CalibrateThenAnneal(500).envelope(0) < 0.1  # until the first alpha is known
    assert envelope[: start + 1] == [1.0] * (start + 1)
    assert envelope[start:500] == sorted(envelope[start:500], reverse=True)
    assert 0.0 < envelope[499] < 0.01


def test_past_the_horizon_the_last_rate_is_held_with_one_warning():
    policy = CalibrateThenAnneal(100)
    last = policy.envelope(99)
    with pytest.warns(UserWarning, match="more steps than total_steps=100: the last learning rate is held"):
        assert policy.envelope(101) == last
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.envelope(5000) == last


def test_a_step_taken_back_counts_as_above_the_knee():
    policy = CalibrateThenAnneal(1000)
    for n in range(20):
        policy(seen(-0.8 + 0.01 * (n % 3), n))
    policy.on_event(GuardEvent(21, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5))
    assert policy.state_dict()["search"]["sign"] == 1
    assert len(policy.state_dict()["search"]["crossings"]) == 1
