"""What is special about each policy."""

import math
import warnings

import pytest

from alpha_optim import (
    Bounded,
    CalibrateThenAnneal,
    Observation,
    OvershootBackoff,
    TargetAlpha,
    WithWarmup,
    measure_alpha,
)
from alpha_optim.policies import base


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


def test_without_anything_to_search_with_the_rate_given_is_annealed():
    policy = CalibrateThenAnneal(50)  # too short for a search
    assert base.decision_of(policy, 0, 0.1).scale == 1.0
    envelope = [policy.envelope(n) for n in range(50)]
    assert envelope[:25] == [1.0] * 25
    assert envelope == sorted(envelope, reverse=True)
    assert 0.0 < envelope[-1] < 0.05


def test_past_the_horizon_the_last_rate_is_held_with_one_warning():
    policy = CalibrateThenAnneal(100)
    last = policy.envelope(99)
    with pytest.warns(UserWarning, match="more steps than total_steps=100: the last learning rate is held"):
        assert policy.envelope(101) == last
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.envelope(5000) == last


def test_a_policy_that_says_nothing_of_itself_is_shown_by_its_name():
    class Mine:
        def __call__(self, measurement):
            return 1.0

    def mine(measurement):
        return 1.0

    class Talks(Mine):
        def __repr__(self):
            return "Talks(at 0x)"

    assert base.shown(Mine()) == base.name_of(Mine())
    assert base.shown(mine) == base.name_of(mine)
    assert " at 0x" not in base.shown(Mine()) + base.shown(mine)
    assert base.shown(Talks()) == "Talks(at 0x)"


@pytest.mark.parametrize("wrap", [lambda policy: Bounded(policy, 0.1, 10.0), lambda policy: WithWarmup(policy, 10)])
def test_wrappers_pass_on_steps_and_their_losses(wrap):
    class Listens:
        def __init__(self):
            self.heard = []

        def __call__(self, measurement):
            return 1.0

        def on_step(self, iteration, loss):
            self.heard.append((iteration, loss))
            return 0.5

    inner = Listens()
    assert wrap(inner).on_step(30, 1.5) == 0.5  # the warm-up is over
    assert inner.heard == [(30, 1.5)]
