"""After the calibration: windows of the loss say whether the rate held is too high, too low, or done."""

import logging
import math
import re

import numpy as np
import pytest

from alpha_optim import CalibrateThenAnneal, GuardEvent, Observation, measure_alpha
from alpha_optim.alpha.loss_level import Level
from alpha_optim.policies import base
from alpha_optim.policies.calibrate.held_rate import HeldRate
from alpha_optim.policies.calibrate.high_loss import HighLoss, Remedy
from alpha_optim.policies.calibrate.loss_watch import LossWatch, Seen
from tests.policies.test_search import STEPS, Caricature

WINDOW = STEPS // 20


def too_high(watch, loss, n):
    seen = watch.see(loss, n)
    return seen is not None and seen.high


def test_the_watch_speaks_where_the_loss_stays_above_the_best_level():
    watch = LossWatch(400)
    watch.level = Level(1.0, 0.1, 10)
    answers = [too_high(watch, 2.0, n) for n in range(60)]
    assert [n for n, answer in enumerate(answers) if answer] == [39]  # the first window settles
    assert not any(too_high(watch, 0.9, n) for n in range(60, 120))
    assert sum(too_high(watch, 2.0, n) for n in range(120, 520)) == 10  # every second window


def test_without_a_level_the_first_window_sets_it():
    watch = LossWatch(400)
    assert not any(too_high(watch, 9.0 + 0.01 * math.sin(n), n) for n in range(100))
    assert watch.level.mean == pytest.approx(9.0, abs=0.01)
    assert any(too_high(watch, 10.0, n) for n in range(100, 160))


def test_the_watch_counts_steps_also_where_few_are_measured():
    watch = LossWatch(1000)
    watch.level = Level(1.0, 0.1, 10)
    answers = {n: too_high(watch, 2.0, n) for n in range(0, 200, 10)}
    assert [n for n, answer in answers.items() if answer] == [110]


def judged(losses, total_steps, every=1):
    """What the watch says of a run with these losses."""
    watch = LossWatch(total_steps)
    watch.level = Level(100.0, 0.1, 10)
    seen = [watch.see(float(loss), n * every) for n, loss in enumerate(losses)]
    return [one for one in seen if one is not None]


def windows(*means, length=WINDOW):
    """Windows of a loss with a deviation of 0.1 within."""
    noise = 0.1 * np.random.default_rng(0).normal(size=length * len(means))
    return np.repeat(means, length) + noise


def test_the_watch_knows_a_loss_that_falls_fast_and_one_that_stands():
    seen = judged(windows(3.0, 2.0, 2.1, 1.0, 0.97, 0.5, 0.6), STEPS)
    # The first window settles, and two more are given before the loss may stand.
    assert [one.falls for one in seen] == [False, False, False, True, False, True, False]
    assert [one.stands for one in seen] == [False, False, False, False, False, False, True]


def test_what_every_loss_does_in_a_long_run_is_not_fast():
    """A third of the batch-to-batch deviation in a 20th of the run: sure in 5000 losses, but slow."""
    means = [1.0 - 0.03 * n for n in range(10)]
    assert not any(one.falls or one.stands for one in judged(windows(*means, length=5000), 100_000))
    steep = [1.0 - 0.09 * n for n in range(10)]
    assert all(one.falls for one in judged(windows(*steep, length=5000), 100_000)[2:])


@pytest.mark.parametrize("length", [20, 50, 500])
def test_noise_around_a_level_does_not_fall(length):
    noise = np.random.default_rng(0)
    runs = [judged(noise.normal(1.0, 0.3, size=8 * length), 20 * length) for _ in range(200)]
    assert sum(any(one.falls for one in run) for run in runs) <= 10
    assert sum(any(one.stands for one in run) for run in runs) >= 190


def test_a_window_of_few_losses_says_nothing_of_the_trend():
    falling = [3.0, 2.9, 2.8] * 2 + [1.0, 1.1, 1.2] * 2 + [0.1, 0.2, 0.3] * 2
    assert not any(one.falls or one.stands for one in judged(falling, STEPS, every=10))


def test_the_loss_from_before_the_return_is_not_one_of_the_rate_held():
    run = Caricature(1e-2)
    while not run.policy.calibrated:
        run.step()
    assert run.policy.state_dict()["held"]["watch"]["losses"] == []
    here = run.loss
    run.step()
    assert run.policy.state_dict()["held"]["watch"]["losses"] == pytest.approx([here], abs=0.03)


class Held:
    """A policy past its search, told losses of our choice."""

    def __init__(self, **options):
        run = Caricature(1e-2)
        run.policy = CalibrateThenAnneal(STEPS, **options)
        run.search()
        self.policy, self.given, self.rate, self.n, self.good = run.policy, run.given, run.rate, run.n, run.loss
        self.decide()

    def decide(self):
        self.rate = self.given * base.decision_of(self.policy, self.n, self.given).scale

    def feed(self, *means, told=True, measured=False):
        """Windows of the loss, in units of the best one of the calibration; the rates without the envelope."""
        rates, pending = [], None
        for loss in self.good * windows(*means):
            if pending is not None:
                base.factor_of(self.policy, pending)
            base.step_factor_of(self.policy, self.n, float(loss) if told else math.nan)
            self.decide()
            if measured:  # known a step later
                end = Observation(32, -1e-3, 1e-6, float(loss), 0.01)
                pending = measure_alpha(self.n, self.rate, end, end, (self.rate,))
            rates.append(self.rate)
            self.n += 1
        return rates


def test_the_rate_grows_while_the_loss_falls_fast(caplog):
    run = Held()
    state = run.policy.state_dict()
    state["held"]["highest"] = math.log(1e9)
    run.policy.load_state_dict(state)
    found = run.rate
    with caplog.at_level(logging.INFO, logger="alpha_optim"):
        rates = run.feed(1.0, 0.9, 0.5, 0.1, 0.1)
    assert rates[2 * WINDOW - 2] == pytest.approx(found)
    assert rates[-1] == pytest.approx(found * 1.5**2)
    assert caplog.text.count("falls fast") == 2
    assert f"holds {found:.3g} since step" in repr(run.policy)
    assert f"raised to {rates[-1]:.3g}" in repr(run.policy)


def test_a_loss_counts_once_whether_told_or_measured_or_both():
    falling = (1.0, 0.9, 0.5, 0.1, 0.1, 0.1)
    told, both, measured = Held().feed(*falling), Held().feed(*falling, measured=True), Held()
    assert told == both
    assert told[-1] > 1.1 * told[0]
    # Measurements alone (there is no guard) say the same a step later.
    assert measured.feed(*falling, told=False, measured=True)[1:] == told[:-1]


def test_after_a_step_was_taken_back_the_rate_returns_at_the_same_pace_whether_told_or_measured_or_both():
    rates = []
    for told, measured in [(True, False), (True, True), (False, False), (False, True)]:
        run = Held()
        run.feed(1.0)
        event = GuardEvent(run.n, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.1)
        base.tell_event(run.policy, event)
        run.decide()
        rates.append(run.feed(1.0, told=told, measured=measured))
        assert rates[-1] == rates[0]
    assert len(set(rates[0])) > 5  # step by step
    assert rates[0][-1] == pytest.approx(5 * rates[0][0])


def test_the_rate_grows_no_further_than_the_trials_allow():
    run = Held()
    highest = run.policy.state_dict()["held"]["highest"]
    before = run.rate
    rates = run.feed(1.0, 0.9, *(0.5**n for n in range(1, 7)))
    assert rates[-1] == pytest.approx(1e-2 * math.exp(highest))
    assert rates[-1] > 1.1 * before


def test_the_rate_grows_in_the_first_part_of_a_run_only():
    run = Held()
    loss = 1.0
    while run.n < 0.4 * STEPS:
        run.feed(loss)
        loss -= 0.001
    before = run.rate
    assert run.feed(0.1)[-1] == before
    assert run.policy.envelope(run.n) == 1.0  # it did not stand


def test_what_was_lowered_does_not_grow_again():
    run = Held()
    run.feed(1.0, 0.9)
    event = GuardEvent(run.n, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5)
    base.tell_event(run.policy, event)
    run.decide()
    before = run.rate
    assert max(run.feed(0.5, 0.1)) == pytest.approx(before)
    assert re.search(r"lowered to (\S+) \(a step was taken back: the rate held is lowered to \1\)", repr(run.policy))


def test_a_loss_that_stands_begins_the_annealing_and_ends_the_growth():
    standing, falling = Held(), Held()
    standing.feed(1.0, 0.9, 0.89, 0.95)
    falling.feed(1.0, 0.9, 0.89, 0.88)
    n = standing.n
    assert falling.policy.envelope(n + 50) == 1.0
    left = STEPS - n - 50
    assert standing.policy.envelope(n + 50) == pytest.approx(left / (left + 50), abs=0.01)
    assert standing.policy.envelope(n) == pytest.approx(1.0, abs=0.01)  # without a jump
    before = standing.rate
    assert standing.feed(0.1)[-1] == before


def test_where_nothing_is_annealed_a_standing_loss_changes_nothing():
    run = Held(anneal=False)
    rates = run.feed(1.0, 0.9, 0.89, 0.95, 0.96)
    assert max(rates) == min(rates)
    assert run.policy.envelope(run.n + 100) == 1.0


def test_the_annealing_resumes_where_it_was():
    one, two = Held(), Held()
    one.feed(1.0, 0.9, 0.89, 0.95)
    two.policy.load_state_dict(one.policy.state_dict())
    assert [one.policy.envelope(n) for n in range(200, 1000)] == [two.policy.envelope(n) for n in range(200, 1000)]
    assert math.isfinite(two.policy.envelope(999))


@pytest.mark.parametrize(("ends", "own"), [(0.01, False), (0.03, True)])
def test_the_watch_asks_the_steps_made_since_the_loss_was_lowest(ends, own):
    """A rise by 1 in the 20 steps since then; those before do not count, whatever they did."""
    watch = LossWatch(400)
    watch.level = Level(3.0, 0.1, 10)
    watch.starts_after(-1)
    noise = np.random.default_rng(0)
    answers = []
    for n in range(100):
        watch.stepped(5.0 if n < 60 else ends * (1.0 + 0.01 * noise.normal()))
        answers.append(watch.see((1.2 - 0.1 * (n // 20) if n < 60 else 2.0) + 0.01 * noise.normal(), n))
    seen = [one for one in answers if one is not None]
    assert [one.high for one in seen] == [False, False, False, True, False]
    assert [one.by_itself for one in seen] == [False, False, False, not own, False]
    other = LossWatch(400)
    other.load_state_dict(watch.state_dict())
    assert other.state_dict() == watch.state_dict()


@pytest.mark.parametrize(
    ("ends", "every", "lowered"),
    [(-0.02, 1, False), (0.005, 1, False), (0.2, 1, True), (-0.02, 2, False), (-0.02, 3, True), (-0.02, None, True)],
)
def test_a_rate_is_lowered_for_a_loss_that_the_steps_have_raised_only(ends, every, lowered):
    """Where at least half of them were measured; a rise of 4 in the 100 steps since the loss was lowest."""
    held = HeldRate(1000)
    held.begin(0.0, Level(3.0, 0.1, 10), 0.0)
    held.starts_after(-1)
    noise = np.random.default_rng(0)
    for n in range(150):
        loss = (1.0 if n < 50 else 5.0) + 0.01 * noise.normal()
        if every is not None and n % every == 0:
            start = Observation(32, -1.0, 1e-4, loss, 1e4)
            end = Observation(32, ends * (1.0 + 0.1 * noise.normal()), 1e-4, loss, 1e4)
            held.measured(measure_alpha(n, 1.0, start, end, (1.0,)))
        held.after_step(n, loss)
    assert (held.position < 0.0) == lowered
    assert any("not by the steps made" in text for text in held.said) == (not lowered)
    resumed = HeldRate(1000)
    resumed.load_state_dict(held.state_dict())
    assert resumed.state_dict() == held.state_dict()


def held_through(*parts):
    """A rate held while losses and end slopes are, window after window, ``(loss, end)``; the log rate after each."""
    held = HeldRate(1000)
    held.begin(0.0, Level(3.0, 0.1, 10), 0.0)
    held.starts_after(-1)
    noise, rates, n = np.random.default_rng(0), [], 0
    for mean, slope in parts:
        for _ in range(50):
            loss = mean + 0.01 * noise.normal()
            start = Observation(32, -1.0, 1e-4, loss, 1e4)
            held.measured(measure_alpha(n, 1.0, start, Observation(32, slope, 1e-4, loss, 1e4), (1.0,)))
            held.after_step(n, loss)
            n += 1
        rates.append(held.position)
    return rates


def test_after_a_rise_by_itself_steps_that_raise_the_loss_lower_the_rate():
    rates = held_through((1.0, -0.01), (1.0, -0.01), (3.0, -0.01), (3.0, -0.01), (9.0, 1.0), (9.0, 1.0), (9.0, 1.0))
    assert rates[3] == 0.0
    assert rates[-1] < 0.0


@pytest.mark.parametrize(("end", "lowered"), [(0.002, False), (0.03, True)])
def test_a_rise_of_which_the_steps_may_have_made_half_is_looked_at_once_more(end, lowered):
    """Ends of steps scatter by 0.2: over the 100 steps of a rise of 2 they may have made it, by two standard errors."""
    held, noise = HeldRate(1000), np.random.default_rng(3)
    held.begin(0.0, Level(3.0, 0.1, 10), 0.0)
    held.starts_after(-1)
    for n in range(200):
        scatter = 0.2 * (1.0 if n % 2 else -1.0)
        loss = (1.0 if n < 100 else 3.0) + 0.01 * noise.normal()
        start = Observation(32, -1.0, 1e-4, loss, 1e4)
        held.measured(measure_alpha(n, 1.0, start, Observation(32, end + scatter, 1e-4, loss, 1e4), (1.0,)))
        held.after_step(n, loss)
    assert (held.position < 0.0) == lowered
    assert not any("not by the steps made" in text for text in held.said)


def test_steps_that_went_down_long_ago_do_not_hide_those_that_go_up():
    rates = held_through(*[(1.0, -0.1)] * 6, (6.0, 0.1), (6.0, 0.1))
    assert rates[-1] < 0.0


@pytest.mark.parametrize(
    ("falls_by", "remedy"),
    [(0.0, Remedy.LOWER), (0.9, Remedy.LOWER), (1.1, Remedy.NONE), (5.0, Remedy.NONE)],
)
@pytest.mark.parametrize("error", [0.03, 0.4, 20.0])
def test_a_high_loss_comes_down_when_it_falls_by_more_than_the_error_of_both_windows(falls_by, remedy, error):
    high = HighLoss()
    other = 2.0 * error
    assert high.judge(Seen(True, 100.0, error, False, True), 0.0) is Remedy.LOWER
    assert high.judge(Seen(True, 100.0 - falls_by * math.hypot(error, other), other, False, True), -0.7) is remedy
