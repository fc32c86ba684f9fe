"""By how much rates fall after steps taken back, as plain arithmetic."""

import itertools
import json
import math

import pytest

from alpha_optim.alpha.records import GuardEvent, GuardReason
from alpha_optim.steer.explosions import GROWS, LOWER_AGAIN, LOWER_ONCE, PROBATION, SOON, ExplosionCuts


class Heard:
    """In place of a guard: hears of rises that came from the data."""

    def __init__(self):
        self.rises = []

    def came_from_data(self, rise):
        self.rises.append(rise)


def explosion(iteration, rise=5.0):
    return GuardEvent(iteration, GuardReason.LOSS_ROSE, 1.0, 1.0 + rise, restored=True)


def grown(cuts, begin, steps):
    """The product of what is given back in so many steps."""
    product = 1.0
    for n in range(begin, begin + steps):
        product *= cuts.give_back(n)
    return product


def test_one_explosion_halves_and_all_of_it_comes_back_long_after():
    cuts = ExplosionCuts()
    assert cuts.taken_back(explosion(100), False, None) == LOWER_ONCE
    assert grown(cuts, 100, PROBATION + 1) == 1.0
    assert cuts.give_back(100 + PROBATION + 1) == GROWS
    assert GROWS * grown(cuts, 100 + PROBATION + 2, 200) == pytest.approx(1 / LOWER_ONCE)


@pytest.mark.parametrize(("gap", "again"), [(SOON, True), (SOON + 1, False)])
def test_another_one_soon_after_lowers_by_more_and_a_third_for_good(gap, again):
    cuts, second = ExplosionCuts(), LOWER_AGAIN if again else LOWER_ONCE
    cuts.taken_back(explosion(0, 5.0), False, None)
    assert cuts.taken_back(explosion(gap, 50.0), False, None) == second
    other = ExplosionCuts()
    other.load_state_dict(cuts.state_dict())
    assert grown(cuts, gap, PROBATION + 500) == pytest.approx(1 / (LOWER_ONCE * second))
    other.taken_back(explosion(2 * gap, 500.0), False, None)
    assert grown(other, 2 * gap, PROBATION + 500) == pytest.approx(1.0 if again else 1 / LOWER_ONCE**3)


def test_the_very_first_one_is_no_second_one():
    assert ExplosionCuts().taken_back(explosion(0), False, None) == LOWER_ONCE


@pytest.mark.parametrize(("rise", "alike"), [(5.0, True), (14.9, True), (15.1, False), (1.7, True), (1.6, False)])
def test_one_as_high_as_the_last_long_after_it_came_from_the_data(rise, alike):
    cuts, guard = ExplosionCuts(), Heard()
    cuts.taken_back(explosion(0, 5.0), False, guard)
    assert cuts.taken_back(explosion(50, rise), False, guard) == (1 / LOWER_ONCE if alike else LOWER_ONCE)
    assert guard.rises == ([pytest.approx(rise)] if alike else [])


def test_nothing_is_owed_where_the_policy_decides():
    cuts = ExplosionCuts()
    assert [cuts.taken_back(explosion(n), True, None) for n in (0, 5, 50)] == [LOWER_ONCE, LOWER_AGAIN, LOWER_ONCE]
    assert grown(cuts, 50, PROBATION + 100) == 1.0


def test_a_cut_without_effect_is_undone_once():
    cuts = ExplosionCuts()
    cuts.taken_back(explosion(0), False, None)
    assert cuts.without_effect() == 1 / LOWER_ONCE
    assert cuts.without_effect() == 1.0
    assert grown(cuts, 0, PROBATION + 100) == 1.0
    assert cuts.taken_back(explosion(3), False, None) == LOWER_ONCE  # as if there had been none


@pytest.mark.parametrize("cut", range(8))
def test_a_resumed_run_answers_as_one_that_was_not_interrupted(cut):
    """Through JSON, at every place of a sequence."""
    calls = [
        lambda cuts: cuts.taken_back(explosion(0, 5.0), False, None),
        lambda cuts: cuts.taken_back(explosion(40, 50.0), False, None),
        lambda cuts: cuts.without_effect(),
        lambda cuts: cuts.taken_back(explosion(60, 50.0), False, None),
        lambda cuts: grown(cuts, 60, PROBATION + 5),
        lambda cuts: cuts.taken_back(explosion(300, 49.0), False, None),
        lambda cuts: cuts.taken_back(explosion(305, 2.0), False, None),
        lambda cuts: cuts.without_effect(),
    ]
    whole, interrupted = ExplosionCuts(), ExplosionCuts()
    expected = [call(whole) for call in calls]
    found = [call(interrupted) for call in itertools.islice(calls, cut)]
    resumed = ExplosionCuts()
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert found + [call(resumed) for call in calls[cut:]] == expected
    assert resumed.state_dict() == whole.state_dict()


def test_a_state_from_before_cuts_were_remembered_owes_nothing():
    cuts = ExplosionCuts()
    cuts.load_state_dict({"last_event": 10})
    assert cuts.taken_back(explosion(15), False, None) == LOWER_AGAIN
    again = ExplosionCuts()
    again.load_state_dict({"last_event": 10})
    assert again.without_effect() == 1.0
    assert grown(again, 10, PROBATION + 50) == 1.0


@pytest.mark.parametrize("between", [None, GuardReason.LOSS_ROSE])
def test_all_that_was_lowered_for_broken_batches_is_given_back_at_once(between):
    """Of others, and of what came before another explosion, only the last cut."""
    cuts, scale = ExplosionCuts(), 1.0
    events = [
        (5, GuardReason.LOSS_NOT_FINITE),
        (9, GuardReason.GRADIENT_NOT_FINITE),
        (60, between),
        (90, GuardReason.LOSS_NOT_FINITE),
    ]
    before = 1.0
    for iteration, reason in events:
        if reason is None:
            continue
        event = GuardEvent(iteration, reason, 1.0, 9.0 if reason is GuardReason.LOSS_ROSE else math.nan, restored=True)
        before = scale if iteration == 90 else before
        scale *= cuts.taken_back(event, False, None)
        cuts_again = ExplosionCuts()
        cuts_again.load_state_dict(json.loads(json.dumps(cuts.state_dict())))
        cuts = cuts_again
    assert scale < 0.1
    assert scale * cuts.without_effect() == pytest.approx(1.0 if between is None else before)
