"""`CalibrateThenAnneal`: jump, climb, trials, and what follows from them."""

import json
import logging
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from alpha_optim import CalibrateThenAnneal, GuardEvent, Observation, WithWarmup, measure_alpha
from alpha_optim.alpha.loss_level import Level, level_of, scatter_of, surely_above
from alpha_optim.policies import base
from alpha_optim.policies.calibrate.climb import Climb
from alpha_optim.policies.calibrate.jump import LONGEST_JUMP, NO_LOSSES, START, Jump
from alpha_optim.policies.calibrate.phase import After
from alpha_optim.policies.calibrate.settings import Settings, trial_length
from alpha_optim.policies.calibrate.trials import STEP, Trials, _vertex

STEPS = 1000


class Caricature:
    """Training whose loss falls with the rate and rises above an edge; a measurement comes a step later."""

    def __init__(self, initial, edge=1.0, steps=STEPS, samples=32, told=True, highest=math.inf, **options):
        self.highest = highest
        self.samples, self.variance, self.told = samples, None if samples == 1 else 0.1, told
        self.policy = CalibrateThenAnneal(steps, **options)
        self.given, self.edge, self.loss, self.n = initial, edge, 2.0, 0
        self.pending, self.kept, self.moves = None, {}, []
        self.scale = self.decision().scale

    @property
    def rate(self):
        """Without the envelope."""
        return self.given * self.scale

    def decision(self):
        base.tell_limit(self.policy, self.highest / self.given)
        return base.decision_of(self.policy, self.n, self.given)

    def step(self):
        lr = self.rate * self.policy.envelope(self.n)
        wobble = 0.02 * math.sin(7.0 * self.n)
        slope, noise = min(0.3, math.log(lr / self.edge)), self.edge**-2
        measurement = measure_alpha(
            self.n,
            lr,
            Observation(self.samples, -1.0 / self.edge, noise, self.loss + wobble, self.variance),
            Observation(self.samples, slope / self.edge, noise, self.loss - wobble, self.variance),
            (lr,),
        )
        start = measurement.loss_start
        self.loss += -0.1 * min(lr, self.edge) * self.loss / self.edge + 0.2 * max(0.0, lr / self.edge - 1.0)
        self.loss = min(self.loss, 5.0)
        if self.pending is not None:
            assert base.factor_of(self.policy, self.pending) == 1.0
        assert base.step_factor_of(self.policy, self.n, start if self.told else math.nan) == 1.0
        self.pending = measurement
        self.n += 1
        self.obey(self.decision())
        return lr

    def obey(self, decision):
        if decision.keep is not None:
            self.kept[decision.keep] = self.loss
        if decision.restore is not None:
            self.moves.append((self.n, decision.restore))
            self.loss, self.pending = self.kept[decision.restore], None
        self.scale = decision.scale

    def search(self):
        """Go on until the search is over; the rates."""
        rates = []
        while not self.policy.calibrated:
            rates.append(self.step())
            assert self.n < 400
        return rates


# ---------------------------------------------------------------- as a whole


@pytest.mark.parametrize("edge", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("initial", [1e-6, 1e-2, 1.0, 100.0])
def test_the_rate_is_found_from_anywhere(initial, edge):
    run = Caricature(initial, edge)
    run.search()
    assert edge / 4 < run.rate < edge * 2
    assert run.n <= 0.35 * STEPS


@pytest.mark.parametrize("initial", [1e-6, 1e-2, 100.0])
@pytest.mark.parametrize("highest", [0.1, 0.3])
def test_no_rate_above_a_bound_is_tried_and_none_is_told(initial, highest):
    free, run = Caricature(initial), Caricature(initial, highest=highest)
    free.search()
    rates = run.search()
    assert max(rates) <= highest * (1 + 1e-9)
    assert run.n <= free.n
    assert highest / 3 < run.rate <= highest  # its edge lies above: the loss was lowest at the bound
    told = [
        float(number)
        for _, text in run.policy.story
        for number in re.findall(r"(?:to|at|is) (\d\S*?)[,:;]?(?= |$)", text)
    ]
    assert len(told) >= 3
    assert max(told) <= highest * 1.01
    assert "which is the highest allowed" in run.policy.story[0][1]
    for n in range(run.n, STEPS):
        assert run.step() <= highest * (1 + 1e-9), n


def test_a_bound_far_above_changes_nothing():
    runs = Caricature(1e-3), Caricature(1e-3, highest=100.0)
    assert runs[0].search() == runs[1].search()
    assert runs[0].policy.story == runs[1].policy.story


@pytest.mark.parametrize("told", [True, False])
def test_losses_come_with_steps_or_with_measurements_alone(told):
    run = Caricature(1e-3, told=told)
    run.search()
    assert 1 / 4 < run.rate < 2
    assert run.policy.wants(run.n - run.n % 10 + 1) is False


def test_losses_of_single_samples_are_searched_by_their_scatter():
    """Batches of one sample have no variance of the loss."""
    run = Caricature(1e-3, samples=1)
    run.search()
    assert 1 / 4 < run.rate < 2


def test_what_is_found_hardly_depends_on_the_initial_rate():
    found = []
    for initial in (1e-6, 1e-3, 1.0, 100.0):
        run = Caricature(initial)
        run.search()
        found.append(run.rate)
    assert max(found) < 1.6 * min(found)


def test_the_first_step_is_tiny_and_the_run_ends_at_zero():
    run = Caricature(1.0)
    rates = run.search()
    rates += [run.step() for _ in range(STEPS - run.n)]
    assert rates[0] == pytest.approx(1e-8)
    top = max(rates[400:])
    assert 0.0 < rates[-1] < 0.01 * top
    assert rates[600:] == sorted(rates[600:], reverse=True)


def test_the_search_leaves_nothing_behind_but_the_best_trial():
    run = Caricature(1e-3)
    run.search()
    assert set(run.kept) == {"start", "best"}
    assert run.loss <= run.kept["best"] + 1e-9
    assert [place for _, place in run.moves[:2]] == ["start", "start"]  # after the climb, after the first trial


@pytest.mark.parametrize("cut", [0, 1, 5, 20, 40, 90, 150, 260, 400])
def test_a_search_resumes_from_json(cut):
    one = Caricature(1e-3)
    for _ in range(cut):
        one.step()
    two = Caricature(1e-3)
    two.scale, two.loss, two.n, two.pending, two.kept = one.scale, one.loss, one.n, one.pending, dict(one.kept)
    two.policy.load_state_dict(json.loads(json.dumps(one.policy.state_dict())))
    assert [one.step() for _ in range(200)] == [two.step() for _ in range(200)]
    assert json.dumps(one.policy.state_dict()) == json.dumps(two.policy.state_dict())


def test_a_search_that_begins_late_takes_its_time():
    """Behind a warm-up that is longer than the search."""
    run = Caricature(1e-3)
    policy = run.policy
    run.policy = WithWarmup(policy, 250)
    for _ in range(250):
        run.step()
    while not policy.calibrated:
        run.step()
    assert 1 / 4 < run.rate < 2


def test_the_story_is_told_in_absolute_rates(caplog):
    run = Caricature(1e-3)
    with caplog.at_level(logging.INFO, logger="alpha_optim"):
        run.search()
    story = run.policy.story
    assert len(story) >= 3
    assert [iteration for iteration, _ in story] == sorted(iteration for iteration, _ in story)
    climbed, last = story[0][1], story[-1][1]
    assert "the rate climbed to" in climbed
    found, held = map(float, re.search(r"the best rate is (\S+); (\S+) is held, two thirds of it", last).groups())
    assert found == pytest.approx(1.5 * run.rate, rel=1e-2)
    assert held == pytest.approx(run.rate, rel=1e-2)
    assert last in caplog.text
    assert f"holds {run.rate:.3g} since step" in repr(run.policy)
    assert not any("{" in text for _, text in story)


def test_steps_are_measured_rarely_once_the_rate_is_known():
    run = Caricature(1.0)
    assert all(run.policy.wants(n) for n in range(30))
    run.search()
    assert [n for n in range(300, 330) if run.policy.wants(n)] == [300, 310, 320]


def test_runs_too_short_for_a_search_keep_the_rate_given():
    run = Caricature(0.3, steps=99)
    assert run.policy.calibrated
    rates = [run.step() for _ in range(99)]
    assert rates[0] == 0.3
    assert rates[-1] < 0.01
    assert run.kept == {}
    assert "too short for a search" in repr(run.policy)


def test_short_runs_climb_and_have_fewer_trials_or_none():
    for steps, most in ((120, 0), (300, 4), (2000, 5)):
        run = Caricature(1e-3, steps=steps)
        run.search()
        assert sum(text.startswith("trial of") for _, text in run.policy.story) <= most
        assert run.n <= max(80, 0.4 * steps)
        assert 1 / 8 < run.rate < 2


def test_trials_take_less_of_longer_runs():
    shares = [trial_length(steps) / steps for steps in (400, 500, 1000, 2500, 5000, 20_000, 10**6)]
    assert shares[0] == pytest.approx(0.06)
    assert shares[1] * 500 == 24
    assert shares[2] == shares[3] == pytest.approx(0.04)
    assert shares == sorted(shares, reverse=True)
    assert shares[4] < 0.03
    assert 4 * shares[5] < 0.06


def test_the_shortest_runs_have_no_trials():
    settings = [Settings(steps, trial_length(steps)) for steps in (100, 200, 236, 238, 250, 300)]
    assert [one.allows(steps=20) for one in settings] == [False, False, False, True, True, True]


def test_without_losses_the_rate_given_is_kept():
    policy = CalibrateThenAnneal(400)
    for n in range(200):
        end = Observation(32, -1.0, 1.0)
        base.factor_of(policy, measure_alpha(n, 1e-3, end, end, (1e-3,)))
        base.step_factor_of(policy, n, math.nan)
        decision = base.decision_of(policy, n + 1)
        if policy.calibrated:
            break
    assert policy.calibrated
    assert (decision.scale, decision.restore) == (1.0, "start")
    assert [text for _, text in policy.story] == [f"{NO_LOSSES}: the rate given is kept"]


def test_where_no_rate_makes_the_loss_fall_the_rate_given_is_kept():
    noise = np.random.default_rng(0)

    class Random(Caricature):
        def step(self):
            self.loss = 2.0 + 0.1 * noise.normal()
            return super().step()

    kept = 0
    for _ in range(20):
        run = Random(0.3)
        run.search()
        kept += run.rate == 0.3 and "rate given is kept" in run.policy.story[-1][1]
    assert kept >= 19


def test_a_climb_that_a_bound_holds_does_not_run_away():
    """A climb ends after a while, whatever the loss did, and no scale is beyond what the scheduler can write."""
    policy, scale = CalibrateThenAnneal(10_000), 1.0
    for n in range(2500):
        loss = 1.0 + 0.01 * math.sin(n)
        end = Observation(32, -1e-3, 1e-6, loss, 0.1)
        base.factor_of(policy, measure_alpha(n, 1e-3, end, end, (1e-3,)))
        base.step_factor_of(policy, n, loss)
        scale = base.decision_of(policy, n + 1).scale
        assert scale <= math.exp(60.0)
    assert policy.calibrated
    assert scale == 1.0


def test_looking_around_a_rate_hears_of_every_loss_once():
    run = Caricature(0.4, around=True)
    for count in range(1, 12):
        run.step()
        assert len(run.policy._phase.losses) == count


def test_around_a_rate_only_its_neighbourhood_is_tried():
    run = Caricature(0.4, around=True)
    first = run.step()
    run.search()
    tried = [float(text.split(" at ")[1].split(":")[0]) for _, text in run.policy.story if text.startswith("trial")]
    assert first == pytest.approx(0.4 / 8)  # a trial grows for a fifth of its 40 steps
    assert tried[0] == pytest.approx(0.4)
    assert all(rate * 1.001 >= 0.04 and rate <= 4.001 for rate in tried)
    assert 1 / 4 < run.rate < 2


@pytest.mark.parametrize("initial", [1e-3, 300.0])
def test_a_rate_far_off_is_moved_by_a_factor_of_ten_at_most_when_looking_around_it(initial):
    run = Caricature(initial, around=True)
    run.search()
    assert initial / 15.1 < run.rate < initial * 10.1  # held at two thirds of what is found


# ---------------------------------------------------------------- climb


def climbed(losses, start=-8.0, **settings):
    """A climb over these losses; what followed from the last, and how many were used."""
    phase = Climb(Settings(STEPS, 60, by_steps=True, **settings), start, 0, (2.0, 2.01, 1.99))
    for count, loss in enumerate(losses, start=1):
        after = phase.stepped(float(loss))
        if not isinstance(after.phase, Climb):
            return phase, after, count
        phase = after.phase
    return phase, None, len(losses)


def valley(noise, count=60):
    """Losses that fall to half, and rise again for good from the 40th on."""
    falling = 2.0 - np.clip((np.arange(count) - 20) / 20, 0, 1)
    rising = np.exp(np.clip(np.arange(count) - 42, 0, None) / 3) - 1
    return falling + rising + noise.normal(0, 0.03, count)


def test_a_climb_ends_soon_after_the_loss_has_risen_and_knows_where_it_was_lowest():
    ends, lows = [], []
    for seed in range(50):
        phase, after, count = climbed(valley(np.random.default_rng(seed)))
        assert isinstance(after.phase, Trials)
        assert after.restore == "start"
        ends.append(count)
        lows.append((phase.lowest() + 8.0) / (math.log(10) / 9))
    assert min(ends) >= 42
    assert max(ends) <= 52
    assert min(lows) > 37
    assert max(lows) < 45


def test_the_level_of_the_start_is_known_well_though_few_steps_were_made_before():
    """From a high rate given one jump may do; two losses say next to nothing about the noise."""
    noise = np.random.default_rng(0)
    phase = Climb(Settings(STEPS, 40, by_steps=True), -8.0, 2, (2.0, 2.4))
    for loss in valley(noise):
        after = phase.stepped(float(loss))
        if not isinstance(after.phase, Climb):
            break
        phase = after.phase
    assert after.phase.level.count == 7
    scores = [after.phase]
    while scores[-1] is not None:
        scores.append(scores[-1]._end(1.0 + 0.1 * abs(scores[-1].position), 0.05).phase)
    assert len(scores) > 2


def test_noise_alone_ends_no_climb():
    ended = 0
    for seed in range(300):
        noise = np.random.default_rng(seed)
        _, after, _ = climbed(2.0 + 0.2 * noise.normal(size=60))
        ended += after is not None
    assert ended <= 9  # a hundredth, and what chance adds to that


def test_a_climb_over_noise_finds_no_lowest_loss():
    found = 0
    for seed in range(200):
        noise = np.random.default_rng(seed)
        phase, _, _ = climbed(2.0 + 0.2 * noise.normal(size=50))
        found += phase.fell()
    assert found <= 6


def test_the_scatter_of_losses_with_a_trend_is_that_around_it():
    noise = np.random.default_rng(0)
    losses = np.linspace(5.0, 1.0, 400) + 0.1 * noise.normal(size=400)
    assert scatter_of(losses.tolist()) == pytest.approx(0.1, rel=0.1)


def test_surely_above_is_welchs_test():
    from scipy.stats import ttest_ind

    noise = np.random.default_rng(0)
    for _ in range(200):
        low, high = noise.normal(0.0, 1.0, 12), noise.normal(1.0, 2.0, 7)
        chance = ttest_ind(high, low, equal_var=False, alternative="greater").pvalue
        assert surely_above(level_of(high.tolist()), level_of(low.tolist()), 1) == (chance < 0.01)


def test_levels_that_are_not_finite_lie_above_all_others():
    known = level_of([1.0, 1.1, 0.9])
    assert surely_above(level_of([1.0, math.inf, 2.0]), known, 10)
    assert surely_above(level_of([math.nan]), known, 10)
    assert not surely_above(known, level_of([math.nan]), 10)
    assert not surely_above(level_of([9.0]), known, 10)  # one loss has no known noise


# ---------------------------------------------------------------- trials


def trials(score, around=0.0, knee=-math.inf, length=20, total=STEPS, steps=0, reached=None, risen=True):
    """Trials whose loss at the end is ``score(log rate)``, None where they explode; all that followed.

    Args:
        reached: The lowest loss of the climb, if it surely fell.
        risen: Whether it rose again.
    """
    settings, fell = Settings(total, length, by_steps=True), reached is not None
    lowest = Level(reached, 0.1, 5) if fell else None
    phase = Trials.begun(settings, around, knee, Level(50.0, 0.1, 10), steps, fell, reached=lowest, risen=risen)
    answers = []
    while phase is not None:
        loss = score(phase.position)
        after = phase.exploded() if loss is None else phase.stepped(loss)
        if after.text:
            answers.append((phase, after))
        phase = after.phase
    return answers


def test_a_trial_grows_for_a_fifth_and_is_annealed_linearly_never_to_zero():
    phase = Trials.begun(Settings(STEPS, 60, by_steps=True), 0.0, -math.inf, Level(2.0, 0.1, 5), 0)
    factors = []
    while phase.scores == ():
        factors.append(phase.factor)
        phase = phase.stepped(1.0).phase
    assert factors[10:] == pytest.approx([(60 - k) / 60 for k in range(10, 60)])
    assert factors[:10] == pytest.approx([(k + 1) / 12 for k in range(10)])


@pytest.mark.parametrize(("length", "scored"), [(20, 10), (49, 10), (60, 12), (200, 40)])
def test_the_score_is_the_mean_of_the_last_losses(length, scored):
    losses = np.random.default_rng(0).uniform(0.0, 1.0, length)
    phase = Trials.begun(Settings(10_000, length, by_steps=True), 0.0, -math.inf, Level(2.0, 0.1, 5), 0)
    for loss in losses:
        phase = phase.stepped(float(loss)).phase
    ((where, score, error),) = phase.scores
    assert where == 0.0
    assert score == pytest.approx(losses[-scored:].mean())
    assert error == pytest.approx(losses[-scored:].std(ddof=1) / math.sqrt(scored))


@pytest.mark.parametrize("best", np.linspace(-3.2, 2.2, 13))
def test_trials_find_the_lowest_score_near_where_they_begin(best):
    answers = trials(lambda where: 1.0 + (where - best) ** 2)
    found = answers[-1][1].found
    if -2.0 < best < 1.2:
        assert found == pytest.approx(best, abs=1e-6)  # a parabola is found exactly
    assert abs(found - best) < 1.5


def test_each_trial_but_the_best_is_taken_back_and_the_best_one_gone_on_from():
    answers = trials(lambda where: 1.0 + (where + STEP) ** 2)  # the second one is best
    assert [phase.position for phase, _ in answers] == pytest.approx([0.0, -STEP, -2 * STEP])
    assert [after.keep for _, after in answers] == ["best", "best", None]
    assert [after.restore for _, after in answers] == ["start", "start", "best"]
    upwards = trials(lambda where: 1.0 + (where - STEP) ** 2, knee=STEP)
    assert [phase.position for phase, _ in upwards] == pytest.approx([0.0, STEP, 2 * STEP][: len(upwards)]) or [
        phase.position for phase, _ in upwards
    ] == pytest.approx([0.0, -STEP, STEP, 2 * STEP][: len(upwards)])


def test_the_last_trial_is_gone_on_from_where_it_ended_if_it_is_the_best():
    answers = trials(lambda where: 5.0 - where if where <= 0.1 else None, knee=-STEP / 2, total=240)
    last = answers[-1][1]
    assert last.restore is None or answers[-1][0].best != answers[-1][0].position


def test_equal_trials_are_gone_on_from_at_the_lower_rate_unless_a_better_one_comes():
    noise = {0: (10.0, 1.0), -1: (10.5, 1.0), 1: (20.0, 1.0), -2: (20.0, 1.0)}

    def follow(scores):
        phase = Trials.begun(Settings(STEPS, 20, by_steps=True), 0.0, -math.inf, Level(50.0, 0.1, 10), 0)
        answers = []
        while phase is not None:
            where = round(phase.position / STEP)
            after = phase._end(*scores[where])
            answers.append((where, after.keep, after.restore))
            phase = after.phase
        return answers, after.found

    answers, found = follow(noise)
    assert answers == [(0, "best", "start"), (-1, "best", "start"), (1, None, "best")]
    assert found == pytest.approx(-STEP / 2)
    answers, found = follow({**noise, 1: (6.0, 0.1), 2: (30.0, 1.0)})  # surely better than both
    assert (1, "best", "start") in answers
    assert answers[-1][2] == "best"
    assert abs(found - STEP) < STEP / 2


def test_nothing_is_tried_far_below_the_knee():
    answers = trials(lambda where: 5.0 + where, knee=0.0)  # lower is always better
    assert min(phase.position for phase, _ in answers) == pytest.approx(-2 * STEP)
    assert len(answers) < len(trials(lambda where: 5.0 + where))


def dead_above(best, edge):
    """Scores of a valley, and 20 at all rates above its edge."""
    return lambda where: 20.0 if where > edge else 5.0 + (where - best) ** 2


@pytest.mark.parametrize("best", [-1.0, 0.5, 2.0])
def test_trials_that_come_to_nothing_far_above_the_knee_go_down_to_it(best):
    """Where outputs are normalised a climb lowers the loss at rates that are absurd for weights as they begin."""
    answers = trials(dead_above(best, 3.0), around=25.0, knee=0.0, reached=6.0)
    assert [phase.position for phase, _ in answers][:2] == pytest.approx([25.0, 2 * STEP])
    assert "it ends at a loss of 20" in answers[0][1].text
    assert abs(answers[-1][1].found - best) < STEP
    assert answers[-1][1].restore in ("best", None)


@pytest.mark.parametrize(("knee", "reached"), [(-math.inf, 6.0), (0.0, 20.5), (0.0, None), (24.0, 6.0)])
def test_trials_go_on_next_to_each_other_where_the_climb_says_nothing_else(knee, reached):
    """No knee is known, or they are as good as the climb was, or it never fell, or they are near the knee."""
    answers = trials(dead_above(0.0, 3.0), around=25.0, knee=knee, reached=reached)
    assert [phase.position for phase, _ in answers][:2] == pytest.approx([25.0, 25.0 - STEP])


@pytest.mark.parametrize(("risen", "second"), [(True, 25.0 - STEP), (False, 2 * STEP)])
def test_a_first_trial_that_explodes_goes_down_to_the_knee_if_the_loss_of_the_climb_never_rose(risen, second):
    """Else where the climb was lowest is trusted, and the knee less: of tiny batches it may be chance."""
    answers = trials(lambda where: None if where > 3.0 else 5.0 + where**2, 25.0, 0.0, reached=6.0, risen=risen)
    assert [phase.position for phase, _ in answers][:3] == pytest.approx(
        [25.0, second, 2 * STEP] if risen else [25.0, second, STEP]
    )


def test_without_time_for_another_trial_the_next_lower_rate_is_taken_from_the_start():
    answers = trials(dead_above(0.0, 3.0), around=25.0, knee=2.0, reached=6.0, length=20, total=STEPS, steps=310)
    assert [phase.position for phase, _ in answers] == pytest.approx([25.0, 2.0 + 2 * STEP])
    last = answers[-1][1]
    assert last.restore == "start"
    assert last.found == last.highest == pytest.approx(2.0 + STEP)
    assert "no trial came near what the climb had reached" in last.text


def test_a_trial_far_away_says_nothing_about_the_shape_of_the_valley():
    """A parabola through a neighbour eleven decades away has its vertex between them."""
    phase = Trials.begun(Settings(STEPS, 20, by_steps=True), 0.0, -math.inf, Level(50.0, 0.1, 10), 0)
    scores = ((25.0, 20.0, 0.01), (0.0, 5.0, 0.01), (-STEP, 10.0, 0.01))
    assert replace(phase, scores=scores).found() == (0.0, 0.0)
    assert replace(phase, scores=((STEP, 20.0, 0.01), *scores[1:])).found()[0] != 0.0


def test_without_a_knee_nothing_is_too_low_to_be_tried():
    _, after, _ = climbed(valley(np.random.default_rng(0)))
    assert after.phase.lowest == -math.inf


def test_the_lowest_of_many_windows_is_low_by_chance_and_its_neighbours_end_no_climb():
    """A loss that has fallen once and scatters since: of 60 such climbs at most two may end by chance."""
    ended = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(0, 0.25, 150)
        losses = np.concatenate([np.linspace(2.0, 1.2, 30), np.full(120, 1.2)]) + noise
        _, after, used = climbed(losses)
        ended += after is not None and used < 150
    assert ended <= 2


def test_a_climb_ends_far_above_the_knee_though_the_loss_goes_on_falling():
    noise = np.random.default_rng(0)
    phase = Climb(Settings(10 * STEPS, 60, by_steps=True), -8.0, 0, (2.0, 2.01, 1.99))
    while isinstance(phase, Climb):
        here = phase.position
        loss = 2.0 - 0.01 * len(phase.losses) + 0.001 * noise.normal()
        start = Observation(32, -1.0, 0.01, loss, 1e4)
        end = Observation(32, -0.5 if here < -3.0 else 0.5, 0.01, loss, 1e4)
        after = phase.stepped(loss)
        if isinstance(after.phase, Climb):
            measurement = measure_alpha(len(phase.losses), math.exp(here), start, end, (math.exp(here),))
            after = after.phase.measured(measurement, here)
        last, phase = here, after.phase
    assert last == pytest.approx(-3.0 + math.log(1e3), abs=1.0)
    assert phase.reached.mean == pytest.approx(loss, abs=0.1)


def test_two_equal_trials_give_the_rate_between_them():
    scores = {0: 1.0, -1: 1.0, 1: 2.0, -2: 2.0}
    answers = trials(lambda where: scores[round(where / STEP)])
    assert answers[-1][1].found == pytest.approx(-STEP / 2)


def test_a_trial_that_explodes_is_hopeless_and_something_between_is_tried():
    answers = trials(lambda where: None if where > 0.7 * STEP else 1.0 - 0.1 * where)
    positions = [round(phase.position / STEP, 6) for phase, _ in answers]
    assert positions == [0.0, -1.0, 1.0, 0.5]
    assert "hopeless" in answers[2][1].text
    assert answers[-1][1].found == pytest.approx(STEP / 2)
    assert answers[-1][1].highest == answers[-1][1].found


@pytest.mark.parametrize("around", np.random.default_rng(0).normal(0.0, 10.0, 40))
def test_something_between_is_tried_wherever_the_rates_lie(around):
    """Half a step is half a step, though sums of floats differ by their rounding."""
    answers = trials(lambda where: None if where > around + 0.7 * STEP else 1.0 - 0.1 * (where - around), around)
    assert [round((phase.position - around) / STEP, 6) for phase, _ in answers] == [0.0, -1.0, 1.0, 0.5]


def test_where_all_trials_are_hopeless_the_rate_given_is_kept():
    answers = trials(lambda where: None)
    last = answers[-1][1]
    assert (last.phase, last.restore, last.found) == (None, "start", None)
    assert "every trial was hopeless" in last.text
    assert len(answers) <= 5


def test_a_trial_whose_loss_surely_rises_ends_early():
    answers = trials(lambda where: 1.0 if where < 0 else 60.0, length=50)
    assert "trial of 6 steps" in answers[0][1].text
    assert "hopeless" in answers[0][1].text


def curve(phase, ends, noise):
    """A loss that falls from 3 to ``ends[log rate]``, 1 where nothing else is said."""
    done = phase.made / phase.settings.trial
    return 3.0 + (ends.get(round(phase.position / STEP), 1.0) - 3.0) * done + 0.02 * noise.normal()


def scored(ends, seed=0, length=60):
    """Pairs of log rate in steps and length of all trials, and what was found."""
    noise = np.random.default_rng(seed)
    phase = Trials.begun(Settings(2000, length, by_steps=True), 0.0, -math.inf, Level(3.0, 0.02, 10), 0)
    made = []
    while phase is not None:
        after = phase.stepped(curve(phase, ends, noise))
        if after.text:
            made.append((round(phase.position / STEP), int(after.text.split()[2])))
        phase = after.phase
    return made, after.found


def test_a_trial_surely_behind_the_best_ends_in_its_second_half():
    made, found = scored({0: 1.0, -1: 2.0, 1: 2.5, -2: 2.9})
    assert made[0] == (0, 60)
    assert [where for where, _ in made] == [0, -1, 1]
    assert all(30 <= length < 40 for _, length in made[1:])
    assert abs(found) < STEP / 2


def test_a_trial_that_is_as_good_as_the_best_is_heard_to_the_end():
    early = 0
    for seed in range(100):
        made, _ = scored({}, seed)
        early += any(length < 60 for _, length in made)
    assert early <= 3  # a hundredth, and what chance adds to that


def test_trials_end_when_the_budget_is_spent():
    answers = trials(lambda where: 1.0 - where, length=60, total=1000, steps=150)
    assert len(answers) == 4 - 1  # 150 + 3 * 60 is below 350, and a fourth would not be


def test_a_run_too_short_for_a_trial_has_none():
    assert Trials.begun(Settings(150, trial_length(150)), 0.0, -math.inf, Level(1.0, 0.1, 5), 30) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_vertex_is_that_of_the_parabola_through_three_points(seed):
    noise = np.random.default_rng(seed)
    a, b = -noise.uniform(0.3, 2.0), noise.uniform(0.3, 2.0)
    fa, fb = noise.uniform(0.0, 2.0, 2)
    c2, c1, _ = np.polyfit([a, 0.0, b], [fa, 0.0, fb], 2)
    assert _vertex((a, fa), (b, fb)) == pytest.approx(-c1 / (2 * c2))


def test_events_of_the_guard_end_a_trial_and_change_no_rate():
    run = Caricature(1e-3)
    while not isinstance(run.policy._phase, Trials):
        run.step()
    run.step()
    before = run.policy._phase
    event = GuardEvent(run.n, "loss_rose", 1.0, 9.0, restored=True)
    base.tell_event(run.policy, replace(event, restored=False))  # the first of two batches
    assert run.policy._phase is before
    base.tell_event(run.policy, event)
    run.obey(base.decision_of(run.policy, run.n, run.given))
    assert run.moves[-1] == (run.n, "start")
    assert run.policy._phase.scores[0][1] == math.inf
    assert run.policy._phase.position != before.position


def test_a_state_of_the_first_version_is_held_at_its_rate_or_given_up():
    held = {
        "found": -1.0, "position": -1.5, "stands_from": 500, "watch": {
            "level": [1.0, 0.1, 10], "losses": [], "begin": None, "newest": -1, "windows": 0, "trends": 0, "lowest": 1.,
        }, "lowered": True, "taken_back": -11, "newest": 300,
    }  # fmt: skip
    state = {"done": True, "done_at": 120, "scale": -1.5, "held": held, "warned": False, "given": 0.1, "skipped": 2}
    policy = CalibrateThenAnneal(1000)
    policy.load_state_dict(state)
    assert policy.calibrated
    assert base.decision_of(policy, 300).scale == pytest.approx(math.exp(-1.5))
    policy = CalibrateThenAnneal(1000)
    policy.load_state_dict({**state, "done": False})
    assert policy.calibrated
    assert base.decision_of(policy, 300).scale == 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"total_steps": 0}, "total_steps must be"),
        ({"total_steps": 2.5}, "total_steps must be"),
        ({"total_steps": 1000, "trial_steps": 9}, "trial_steps must be"),
        ({"total_steps": 1000, "trial_steps": 500}, "trial_steps must be"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        CalibrateThenAnneal(**options)


def test_a_rate_found_that_is_the_one_given_is_held_as_any_other():
    policy = CalibrateThenAnneal(1000, around=True)
    policy._go_on(After(None, found=0.0, text="the best rate is {0.0}"), 100)
    assert base.decision_of(policy, 101, 0.3).scale == pytest.approx(2 / 3)
    assert policy.envelope(101) == pytest.approx(0.1)  # it grows, as after any search
    kept = CalibrateThenAnneal(1000, around=True)
    kept._go_on(After(None, text="every trial was hopeless"), 100)
    assert (base.decision_of(kept, 101, 0.3).scale, kept.envelope(101)) == (1.0, 1.0)
    assert kept.story == ((100, "every trial was hopeless: the rate given is kept"),)


def test_one_trial_that_surely_lowered_the_loss_is_enough_whatever_the_noise_of_the_best():
    phase = Trials.begun(Settings(STEPS, 20, by_steps=True), 0.0, -math.inf, Level(1.0, 0.2, 10), 0)
    scores = {0: (0.3, 0.05), -1: (0.4, 0.05), 1: (0.28, 0.5), 2: (math.inf, 0.0)}
    while phase is not None:
        after = phase._end(*scores.get(round(phase.position / STEP), (math.inf, 0.0)))
        phase = after.phase
    assert after.found is not None


@pytest.mark.parametrize("fell", [True, False])
def test_trials_that_lower_nothing_surely_count_where_the_climb_did(fell):
    phase = Trials.begun(Settings(STEPS, 20, by_steps=True), 0.0, -math.inf, Level(1.0, 0.5, 10), 0, fell)
    while phase is not None:
        after = phase._end(0.95 + 0.01 * abs(phase.position), 0.2)
        phase = after.phase
    assert (after.found is not None) == fell
    assert ("no trial surely lowered the loss" in after.text) == (not fell)


def test_a_climb_that_fell_says_so_to_the_trials():
    _, after, _ = climbed(valley(np.random.default_rng(0)))
    assert after.phase.fell
    flat = np.concatenate([np.full(30, 2.0), 2.0 + np.linspace(0, 5, 20)]) + np.random.default_rng(1).normal(
        0, 0.05, 50
    )
    _, after, _ = climbed(flat)
    assert not after.phase.fell


@pytest.mark.parametrize(("end", "ends"), [(-0.8, False), (-0.02, True), (0.3, True)])
def test_a_loss_that_rises_ends_a_climb_that_never_fell_unless_its_steps_surely_go_down(end, ends):
    """Targets whose scale grows, say: the loss rises, and yet each step lowers that of the next batch."""
    noise = np.random.default_rng(0)
    phase = Climb(Settings(STEPS, 60, by_steps=True), -8.0, 0, (2.0, 2.01, 1.99))
    for loss in 2.0 + 0.1 * np.clip(np.arange(50) - 10, 0, None) + noise.normal(0, 0.02, 50):
        start = Observation(32, -1.0 + 0.1 * noise.normal(), 0.1, float(loss), 0.1)
        slope = Observation(32, end + 0.1 * noise.normal(), 0.1, float(loss) + 0.1, 0.1)
        after = phase.stepped(float(loss))
        if not isinstance(after.phase, Climb) or after.phase.again:
            break
        phase = after.phase.measured(measure_alpha(phase.steps, 1.0, start, slope, (1.0,)), -8.0).phase
    assert (after.restore == "start") == ends


def drifting_trials(end, gains=None):
    """Trials while all losses grow; a trial's end lies below its beginning by what its rate gains. All that followed.

    Args:
        end: Slope at the end times length, of every step; None: nothing is measured.
        gains: What a trial gains, by its rate in half decades.
    """
    gains = {-2: 0.0, -1: 0.3, 0: 0.7, 1: 0.4} if gains is None else gains
    phase, answers = Trials.begun(Settings(STEPS, 40, by_steps=True), 0.0, -math.inf, Level(1.0, 0.05, 10), 0), []
    noise = np.random.default_rng(0)
    while phase is not None:
        gain = gains.get(round(phase.position / STEP), 0.0) * phase.made / 40
        loss = float(1.012**phase.steps * (1.0 - gain) * (1.0 + noise.normal(0, 0.03)))
        if end is not None and phase.made:
            start = Observation(32, -1.0, 0.1, loss, 1e4)
            slope = Observation(32, end * (1.0 + 0.1 * noise.normal()), 0.1, loss, 1e4)
            phase = phase.measured(measure_alpha(phase.steps, 1.0, start, slope, (1.0,)), phase.position).phase
        after = phase.stepped(loss)
        answers += [after] if after.text else []
        phase = after.phase
    return answers


def test_trials_of_a_loss_that_rises_by_itself_are_heard_to_the_end_and_compared():
    answers = drifting_trials(end=-0.5)
    assert not any("hopeless" in after.text for after in answers)
    assert all("trial of 40 steps" in after.text for after in answers)
    assert abs(answers[-1].found) < STEP


@pytest.mark.parametrize("end", [0.5, None])
def test_without_measurements_that_say_so_no_loss_rises_by_itself(end):
    """Either the steps explain the rise, or nobody knows whether they do."""
    answers = drifting_trials(end)
    assert sum("trial of 6 steps" in after.text and "hopeless" in after.text for after in answers) >= 2


def test_where_no_trial_gains_against_a_loss_that_rises_by_itself_the_rate_given_is_kept():
    answers = drifting_trials(end=-0.5, gains={})
    assert "no trial surely lowered the loss" in answers[-1].text
    assert answers[-1].found is None


@pytest.mark.parametrize(("above", "knee"), [(0.5, True), (4.0, False)])
def test_a_climb_over_a_loss_that_rises_by_itself_is_tried_around_the_knee(above, knee):
    """Or where steps begin to explain the rise, if that comes before the mean of some alphas is above 0."""
    noise, made = np.random.default_rng(0), 0.0
    phase = Climb(Settings(STEPS, 60, by_steps=True), -8.0, 0, (2.0, 2.01, 1.99))
    while isinstance(phase, Climb):
        here, count = phase.position, len(phase.losses)
        end = -0.8 if here < -3.0 else above
        made += max(0.0, end * math.exp(here))
        loss = 2.0 + 0.05 * count + made + 0.01 * noise.normal()
        start, slope = Observation(32, -1.0, 0.01, loss, 1e4), Observation(32, end, 0.01, loss, 1e4)
        after = phase.stepped(loss)
        if isinstance(after.phase, Climb):
            measurement = measure_alpha(count, math.exp(here), start, slope, (math.exp(here),))
            after = after.phase.measured(measurement, here)
        phase = after.phase
    assert isinstance(phase, Trials)
    assert phase.by_itself
    assert not phase.fell
    assert phase.position == pytest.approx(-3.0, abs=1.0)
    assert ("alpha rose above 0" in after.text) == knee


def test_a_loss_that_rose_by_itself_and_then_fell_is_tried_where_it_was_lowest():
    phase, _, _ = climbed(valley(np.random.default_rng(0))[:-1])
    by_itself = replace(phase, by_itself=True)
    assert by_itself._end(risen=True) == phase._end(risen=True)
    assert not by_itself._end(risen=True).phase.by_itself


def test_a_climb_that_only_rises_begins_once_more_from_a_thousandth_of_where_it_began():
    phase = Climb(Settings(STEPS, 60, by_steps=True), -3.0, 0, (2.0, 2.01, 1.99))
    for loss in (2.01, 1.99, 2.0, 2.02, 1.98, 5.0, 8.0, 11.0, 14.0, 17.0):
        after = phase.stepped(loss)
        if after.restore is not None:
            break
        phase = after.phase
    assert after.phase.again
    assert after.phase.position == pytest.approx(-3.0 - math.log(1e3))
    assert after.restore == "start"


def test_without_room_for_trials_the_climb_leaves_nothing_behind():
    settings = Settings(200, 8, by_steps=True)
    phase = Climb(settings, -8.0, 0, (2.0, 2.01, 1.99))
    for loss in valley(np.random.default_rng(0)):
        after = phase.stepped(float(loss))
        if after.phase is None:
            break
        phase = after.phase
    assert after.found == pytest.approx(phase.lowest() - math.log(2))
    assert after.highest == pytest.approx(phase.lowest())
    assert after.restore == "start"


@pytest.mark.parametrize("position", [-3.0, -17.0])
def test_a_jump_that_exploded_begins_again_from_below(position):
    after = Jump(Settings(STEPS, 60), position=position).exploded()
    assert after.phase.position == max(START, position - LONGEST_JUMP) < position
    assert after.restore == "start"


@pytest.mark.parametrize("heard", [0, 1])
def test_a_search_that_is_cut_short_before_anything_was_kept_goes_back_to_nothing(heard):
    policy = CalibrateThenAnneal(STEPS)
    for n in range(heard):
        base.step_factor_of(policy, n, 2.0)
    policy.cut_short(heard)
    decision = base.decision_of(policy, heard, 0.1)
    assert policy.calibrated
    assert decision.restore is None
    assert decision.scale == 1.0


def test_a_search_that_is_cut_short_goes_back_to_the_point_that_was_kept():
    run = Caricature(1e-2)
    for _ in range(12):
        run.step()
    run.policy.cut_short(run.n)
    assert run.decision().restore == "start"
