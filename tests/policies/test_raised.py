"""A rate that was raised is taken back at once where half of all progress is lost."""

import json
import math

import numpy as np
import pytest

from alpha_optim import GuardEvent
from alpha_optim.alpha.loss_level import Level, level_of
from alpha_optim.policies import base
from alpha_optim.policies.calibrate.raised import LOOK, Raised
from tests.policies.test_loss_watch import WINDOW, Held

STEPS = 20


def watched(losses, seed=0, start=math.inf):
    """After how many of the losses it says that too much is lost; None if never. Those before lie at 1 +- 0.1."""
    raised = Raised()
    before = 1.0 + 0.1 * np.random.default_rng(1000 + seed).normal(size=STEPS)
    raised.progress_from(Level(start, 0.1, 10))
    raised.begin(-1.0, level_of(before.tolist()), STEPS)
    for count, loss in enumerate(losses, start=1):
        if raised.loses(float(loss)):
            assert raised.before == -1.0
            return count
    assert len(losses) < STEPS or raised.before is None
    return None


def test_noise_around_the_level_before_does_not_rise():
    found = [watched(1.0 + 0.1 * np.random.default_rng(seed).normal(size=STEPS), seed) for seed in range(500)]
    assert sum(count is not None for count in found) <= 10  # one in a hundred is meant, and what chance adds to that


@pytest.mark.parametrize("rise", [0.03, 0.1, 0.3])
def test_a_rise_is_seen_within_a_few_steps(rise):
    """By this much at every step, where losses scatter by 0.1, and it is not known where they began."""
    found = []
    for seed in range(100):
        noise = 0.1 * np.random.default_rng(seed).normal(size=STEPS)
        found.append(watched(1.0 + rise * np.arange(STEPS) + noise, seed))
    assert None not in found
    assert np.median(found) <= max(LOOK, 2 + 0.35 / rise)


@pytest.mark.parametrize(("level", "lost"), [(1.4, False), (1.65, True)])
def test_half_of_all_progress_has_to_be_lost(level, lost):
    """A loss that has surely risen by less is that of longer steps, which are good for the run."""
    found = [watched(level + 0.05 * np.random.default_rng(seed).normal(size=STEPS), seed, 2.0) for seed in range(100)]
    assert sum(count is not None for count in found) == (100 if lost else 0)


def test_after_a_window_nothing_is_watched():
    assert watched([1.0] * STEPS + [9.0] * STEPS) is None
    assert watched([1.0] * (STEPS - LOOK) + [9.0] * STEPS) < STEPS


def test_before_a_rate_was_raised_nothing_rises():
    assert not any(Raised().loses(loss) for loss in (1.0, 2.0, 1e9, math.inf))


def raised(level=0.9):
    """A policy that has just raised its rate, since the loss fell fast to 0.5; and the rate before."""
    run = Held()
    state = run.policy.state_dict()
    state["held"]["raised"]["start"] = 1.0 * run.good
    run.policy.load_state_dict(state)
    before = run.rate
    rates = run.feed(1.0, level, 0.5)
    run.decide()
    assert rates[-2] == pytest.approx(before)
    assert run.policy.state_dict()["held"]["position"] > math.log(before / run.given) + 0.1
    return run, before


@pytest.mark.parametrize("high", [0.8, 50.0])
def test_a_rate_that_was_too_high_is_held_for_some_steps_only_and_costs_nothing_more(high):
    run, before = raised()
    rates = run.feed(high, 0.5, 0.4, 0.1)
    assert max(rates[:4]) > 1.1 * before
    assert rates[2 * LOOK] == pytest.approx(before)
    assert rates[-1] == pytest.approx(before)  # not lowered for the window of the higher rate, and not raised again
    assert min(rates) == pytest.approx(before)
    assert sum("was lost since the rate was raised" in text for _, text in run.policy.story) == 1


def test_a_rate_that_is_as_good_is_kept():
    run, before = raised()
    rates = run.feed(0.5, 0.49)
    assert rates[-1] > 1.1 * before
    assert not any("since the rate was raised" in text for _, text in run.policy.story)


@pytest.mark.parametrize(("windows", "lowered"), [(0, 0.0), (2, math.log(0.5))])
def test_an_explosion_costs_what_the_rate_was_raised_by_and_later_half_of_it(windows, lowered):
    run, before = raised()
    run.feed(*[0.5] * windows)
    held = run.policy.state_dict()["held"]["position"]
    base.tell_event(run.policy, GuardEvent(run.n, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5))
    expected = math.log(before / run.given) if windows == 0 else held + lowered
    assert run.policy.state_dict()["held"]["position"] == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, LOOK - 1, WINDOW])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_it_goes_on_from_a_state(count, level):
    one, _ = raised()
    losses = one.good * (level + 0.01 * np.sin(np.arange(2 * WINDOW)))

    def go_on(policy, n, some):
        for loss in some:
            base.step_factor_of(policy, n, float(loss))
            n += 1
        return n

    n = go_on(one.policy, one.n, losses[:count])
    two = Held()
    two.policy.load_state_dict(json.loads(json.dumps(one.policy.state_dict())))
    go_on(one.policy, n, losses[count:])
    go_on(two.policy, n, losses[count:])
    assert one.policy.state_dict() == two.policy.state_dict()


def test_where_the_guard_accepts_a_level_nothing_is_watched_any_more():
    run, _ = raised()
    event = GuardEvent(run.n, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5)
    base.tell_event(run.policy, event)
    base.tell_event(run.policy, GuardEvent(run.n, "no_effect", 1.0, 9.0, restored=False))
    run.decide()
    given_back = run.policy.state_dict()["held"]["position"]
    run.feed(20.0, 20.0)
    assert run.policy.state_dict()["held"]["position"] == given_back
