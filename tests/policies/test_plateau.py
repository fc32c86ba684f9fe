"""A loss that rests where the best trial ended: higher rates are tried, and taken back where the loss rises."""

import json
import math

import pytest

from alpha_optim import GuardEvent
from alpha_optim.policies import base
from alpha_optim.policies.calibrate.loss_watch import Seen
from alpha_optim.policies.calibrate.phase import Ended
from alpha_optim.policies.calibrate.plateau import Plateau
from alpha_optim.policies.calibrate.trials import STEP
from tests.policies.test_loss_watch import WINDOW, Held

LEVEL = 3.28
"""Of the plateau; training began at 4.6."""
ENDED = Ended(start=4.6, mean=LEVEL, error=0.02, worse_from=math.inf)


def seen(mean, error=0.01):
    return Seen(False, mean, error, False, False)


def asked(*means, ended=ENDED, error=0.01, position=0.0):
    """What a plateau says after each window."""
    plateau = Plateau()
    plateau.begin(ended)
    return [plateau.higher(seen(mean, error), position) for mean in means]


def test_a_loss_that_rests_where_the_best_trial_ended_asks_for_a_higher_rate():
    assert asked(LEVEL, LEVEL + 0.01) == [None, STEP]  # two windows tell that it rests


@pytest.mark.parametrize(
    ("why", "means"),
    [
        ("it falls", (LEVEL + 0.04, LEVEL)),
        ("it lies above: the noise of the steps keeps it up", (LEVEL + 0.2, LEVEL + 0.2)),
        ("it has fallen since", (LEVEL - 0.2, LEVEL - 0.2)),
        ("it had fallen, and rises again: the rate is too high", (LEVEL - 0.06, LEVEL)),
        ("no window was judged", (math.nan, LEVEL)),
    ],
)
def test_others_do_not(why, means):
    assert asked(*means) == [None, None], why


def test_a_fall_counts_from_two_standard_errors_of_the_difference_on():
    surely = 2.0 * math.sqrt(2.0) * 0.01
    assert asked(LEVEL + 0.9 * surely, LEVEL) == [None, STEP]
    assert asked(LEVEL + 1.1 * surely, LEVEL) == [None, None]


def test_a_window_that_was_not_judged_is_none_to_compare_with():
    assert asked(LEVEL, math.nan, LEVEL, LEVEL) == [None, None, None, STEP]


@pytest.mark.parametrize("level", [0.0, 0.1, 2.2])
def test_a_loss_of_which_more_than_half_is_gone_has_most_likely_arrived(level):
    assert asked(level, level, ended=ENDED._replace(mean=level)) == [None, None]
    assert asked(2.4, 2.4, ended=ENDED._replace(mean=2.4)) == [None, STEP]


def test_of_losses_that_scatter_too_much_to_see_slow_progress_nothing_is_said():
    assert asked(LEVEL, LEVEL, error=0.05) == [None, None]
    assert asked(LEVEL, LEVEL, ended=ENDED._replace(error=0.1)) == [None, None]
    assert asked(LEVEL, LEVEL, ended=ENDED._replace(start=3.6)) == [None, None]  # nothing of note was learned so far


def test_no_rate_is_tried_that_a_trial_has_shown_to_be_worse():
    assert asked(LEVEL, LEVEL, ended=ENDED._replace(worse_from=1.6 * STEP)) == [None, STEP]
    assert asked(LEVEL, LEVEL, ended=ENDED._replace(worse_from=1.4 * STEP)) == [None, None]


def test_without_a_trial_there_is_nothing_to_compare_with():
    assert asked(LEVEL, LEVEL, ended=None) == [None, None]


def resting(**ended):
    """A policy past its search, whose best trial ended at the level that `Held.feed` calls 1."""
    run = Held()
    state = run.policy.state_dict()
    state["held"]["plateau"]["ended"] = list(
        ENDED._replace(start=1.9 * run.good, mean=run.good, error=0.01 * run.good, **ended)
    )
    run.policy.load_state_dict(json.loads(json.dumps(state)))
    return run


def test_rates_are_raised_one_after_the_other_and_held_once_the_loss_falls():
    run = resting()
    found = run.rate
    rates = run.feed(1.0, 1.0, 1.0, 1.0, 0.5, 0.25)
    raised = math.exp(STEP)
    assert rates[2 * WINDOW] == pytest.approx(found)
    assert rates[4 * WINDOW - 10] == pytest.approx(raised * found)
    assert rates[5 * WINDOW - 10] == pytest.approx(raised**2 * found)
    assert rates[-1] == pytest.approx(raised**2 * found)
    assert run.policy.envelope(run.n) == 1.0  # a plateau does not begin the annealing
    assert sum("rests where the best trial ended" in text for _, text in run.policy.story) == 2


def test_a_rate_at_which_the_loss_rises_is_taken_back_and_no_other_is_tried():
    run = resting()
    found = run.rate
    rates = run.feed(1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0)
    assert max(rates) == pytest.approx(math.exp(STEP) * found)
    assert rates[-1] == pytest.approx(found)
    assert max(rates[5 * WINDOW :]) == pytest.approx(found)


def test_an_explosion_at_a_higher_rate_costs_that_rate_and_no_more():
    run = resting()
    found = run.rate
    run.feed(1.0, 1.0, 1.0, 1.0)
    assert run.rate > 1.01 * math.exp(STEP) * found  # on its way to the second
    base.tell_event(run.policy, GuardEvent(run.n, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5))
    run.decide()
    rates = run.feed(9.0, 1.0, 1.0)  # the explosion's own window does not lower the rate once more
    assert max(rates) <= math.exp(STEP) * found * (1 + 1e-9)
    assert rates[-1] == pytest.approx(math.exp(STEP) * found)


@pytest.mark.parametrize("windows", [1, 2, 3, 4])
@pytest.mark.parametrize("level", [1.0, 9.0])
def test_it_goes_on_from_a_state(windows, level):
    one, two = resting(), Held()
    one.feed(*[1.0] * windows)
    two.policy.load_state_dict(json.loads(json.dumps(one.policy.state_dict())))
    two.n = one.n
    two.decide()
    rates = one.feed(level, 1.0, 1.0, 1.0)
    assert rates == two.feed(level, 1.0, 1.0, 1.0)
    assert max(rates) > 1.9 * min(rates)  # something was raised or lowered


def test_states_of_before_hold_what_was_found():
    run = Held()
    state = run.policy.state_dict()
    del state["held"]["plateau"]
    run.policy.load_state_dict(state)
    rates = run.feed(1.0, 1.0, 1.0, 1.0)
    assert max(rates) == min(rates)


def test_at_the_highest_rate_allowed_none_is_raised_and_none_is_said_to_be():
    run = resting()
    run.policy.limit(run.rate / run.given)
    rates = run.feed(1.0, 1.0, 1.0, 1.0)
    assert max(rates) == pytest.approx(min(rates))
    assert not any("rests where the best trial ended" in text for _, text in run.policy.story)
