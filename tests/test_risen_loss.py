"""Which of three it was, a hard batch, a bad step or a new task, as plain arithmetic."""

import json
import math

import pytest
from scipy.special import stdtrit

from alpha_optim.alpha.loss_level import ROUNDING
from alpha_optim.steer.readings import Reading
from alpha_optim.steer.risen_loss import PATIENCE, RisenLoss


def reading(loss):
    return Reading(loss, None, 0)


def calm(steps=60):
    """After some losses around 1 that differ by 0.1."""
    risen = RisenLoss()
    for n in range(steps):
        risen.used(1.0 + 0.1 * (n % 2))
    return risen


def one_batch(risen, loss, stepped=True):
    """What a guard does about a batch whose loss follows one of 1."""
    rose = risen.seen(reading(loss), reading(1.0), stepped)
    if rose and risen.confirmed:
        risen.step_taken_back(True)
        return "taken back"
    if rose and risen.first_seen(loss - 1.0):
        return "skipped"
    return "no effect" if risen.settled(rose) else "used"


def test_a_hard_batch_is_skipped_once_and_the_next_of_its_size_is_not_looked_at():
    risen = calm()
    assert [one_batch(risen, loss) for loss in (9.0, 1.0, 9.0, 30.0)] == ["skipped", "used", "used", "skipped"]


def test_a_bad_step_is_taken_back_after_two_batches():
    risen = calm()
    assert [one_batch(risen, loss) for loss in (9.0, 9.0, 1.0)] == ["skipped", "taken back", "used"]


def test_where_going_back_does_not_help_the_level_is_accepted_and_in_the_end_nothing_is_judged():
    risen = calm()
    for _ in range(PATIENCE):
        assert not risen.gave_up
        assert [one_batch(risen, 9.0) for _ in range(3)] == ["skipped", "taken back", "no effect"]
    assert risen.gave_up
    assert [one_batch(risen, 1e9) for _ in range(3)] == ["used", "used", "used"]


def test_a_return_that_helps_begins_the_count_anew():
    risen = calm()
    for _ in range(PATIENCE - 1):
        assert [one_batch(risen, 9.0) for _ in range(3)][-1] == "no effect"
    assert [one_batch(risen, loss) for loss in (9.0, 9.0, 1.0)][-1] == "used"
    for _ in range(PATIENCE - 1):
        assert [one_batch(risen, 9.0) for _ in range(3)][-1] == "no effect"
    assert not risen.gave_up
    assert [one_batch(risen, 9.0) for _ in range(3)][-1] == "no effect"
    assert risen.gave_up


def test_where_no_step_was_made_and_nothing_is_in_doubt_nothing_has_risen():
    assert one_batch(calm(), 9.0, stepped=False) == "used"
    risen = calm()
    assert one_batch(risen, 9.0) == "skipped"
    assert one_batch(risen, 9.0, stepped=False) == "taken back"  # the second batch at that point


def test_a_step_that_cannot_be_taken_back_leaves_nothing_in_doubt():
    risen = calm()
    assert one_batch(risen, 9.0) == "skipped"
    risen.step_taken_back(False)
    assert one_batch(risen, 9.0) == "skipped"


def test_without_points_nothing_is_in_doubt():
    for forget in (RisenLoss.forget, RisenLoss.moved):
        risen = calm()
        assert one_batch(risen, 9.0) == "skipped"
        forget(risen)
        assert one_batch(risen, 9.0, stepped=False) == "used"
        assert one_batch(risen, 9.0) == "skipped"  # the first of another question


def test_a_rise_that_came_from_the_data_is_not_looked_at_again():
    risen = calm()
    risen.came_from_data(8.0)
    assert one_batch(risen, 9.0) == "used"
    assert one_batch(risen, 30.0) == "skipped"


def test_a_loss_that_is_not_known_has_not_risen():
    risen = calm()
    assert not risen.seen(reading(None), reading(1.0), True)
    assert not risen.seen(reading(9.0), reading(None), True)


def edge(before, now):
    """The smallest rise above a loss of 1 that is seen where losses have not differed before, by bisection."""
    risen = RisenLoss()
    for _ in range(60):
        risen.used(1.0)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        seen = risen.seen(now._replace(loss=1.0 + middle), before._replace(loss=1.0), True)
        low, high = (low, middle) if seen else (middle, high)
    return high


@pytest.mark.parametrize(("first", "second"), [(8, 8), (8, 32), (64, 8)])
def test_the_noise_of_two_batches_is_that_of_their_samples(first, second):
    """A rise is seen beyond Student's t of as many degrees of freedom, times the error of the difference."""
    before, now = Reading(1.0, 0.3, first), Reading(1.0, 0.3, second)
    noise = math.sqrt(0.3 / first + 0.3 / second)
    assert edge(before, now) == pytest.approx(stdtrit(first + second - 2, 1.0 - 1e-3) * noise, rel=1e-6)


def test_it_is_the_scatter_at_the_point_before_that_counts():
    at_once = edge(Reading(1.0, 0.3, 8), Reading(1.0, 0.3, 8))
    assert edge(Reading(1.0, 0.3, 8), Reading(1.0, 1e6, 8)) == pytest.approx(at_once)
    assert edge(Reading(1.0, None, 8), Reading(1.0, 0.3, 8)) == pytest.approx(at_once)


@pytest.mark.parametrize(("before", "now"), [((None, 8), (None, 8)), ((0.3, 0), (0.3, 8)), ((0.3, 8), (0.3, 0))])
def test_where_it_is_not_known_consecutive_losses_alone_tell(before, now):
    assert edge(Reading(1.0, *before), Reading(1.0, *now)) == pytest.approx(ROUNDING)


@pytest.mark.parametrize("fits", [True, False])
def test_a_state_goes_on_where_it_was_unless_its_point_is_gone(fits):
    one, two = calm(), RisenLoss()
    assert one_batch(one, 9.0) == "skipped"
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    if not fits:
        two.forget()
    assert one_batch(two, 9.0) == ("taken back" if fits else "skipped")
    assert two._scatter.state_dict() == one._scatter.state_dict()
