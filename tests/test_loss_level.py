"""Did a loss change beyond its noise? Against scipy's tests and against simulated losses."""

import math

import numpy as np
import pytest
from scipy import stats

from alpha_optim.alpha import loss_level
from alpha_optim.alpha.loss_level import NONE, Level, LossScatter, level_of, quantile, scatter_of, surely_above


def losses(count, mean, deviation, seed):
    return list(np.random.default_rng(seed).normal(mean, deviation, count))


# ------------------------------------------------------------------ levels


def test_a_level_is_mean_deviation_and_count():
    values = losses(17, 2.0, 0.3, 0)
    level = level_of(values)
    assert level.mean == pytest.approx(np.mean(values))
    assert level.deviation == pytest.approx(np.std(values, ddof=1))
    assert level.count == 17
    assert level.error == pytest.approx(stats.sem(values))


def test_a_level_grows_value_by_value():
    values = (3.0 + np.random.default_rng(0).normal(size=50)).tolist()
    level = NONE
    for count, value in enumerate(values, start=1):
        level = level.and_one(value)
        if count > 1:
            assert level == pytest.approx(level_of(values[:count]), rel=1e-12)
    assert NONE.and_one(2.0) == Level(2.0, 0.0, 1)


def test_a_level_of_one_loss_has_no_known_noise_and_one_that_is_not_finite_is_infinite():
    assert level_of([3.0])[::2] == (3.0, 1)
    assert math.isnan(level_of([3.0]).deviation)
    assert level_of([3.0]).error == math.inf
    for values in ([], [1.0, math.nan], [math.inf, 1.0]):
        assert level_of(values) == (math.inf, 0.0, len(values))


def test_the_scatter_of_neighbours_does_not_see_a_trend():
    values = np.array(losses(4000, 0.0, 0.3, 1)) + np.linspace(50.0, 0.0, 4000)
    assert scatter_of(list(values)) == pytest.approx(0.3, rel=0.05)
    assert np.std(values) > 10.0
    assert scatter_of([1.0, 3.0]) == pytest.approx(math.sqrt(2.0))
    assert math.isnan(scatter_of([1.0]))


@pytest.mark.parametrize("freedom", [1, 2.5, 30])
@pytest.mark.parametrize("chance", [0.2, 1e-3, 1e-6])
def test_the_quantile_is_students(freedom, chance):
    assert quantile(freedom, chance) == pytest.approx(stats.t.isf(chance, freedom), rel=1e-6)
    assert quantile(0.9, chance) == math.inf


@pytest.mark.parametrize("looks", [1, 40])
@pytest.mark.parametrize("counts", [(10, 10), (5, 60), (2, 2)])
def test_surely_above_is_welchs_test_with_one_chance_for_all_looks(looks, counts):
    answers = set()
    for seed in range(60):
        high, low = losses(counts[0], 1.0 + 0.05 * seed, 0.9, seed), losses(counts[1], 1.0, 0.3, 1000 + seed)
        p = stats.ttest_ind(high, low, equal_var=False, alternative="greater").pvalue
        if not 0.9 < p / (loss_level.MISTAKEN / looks) < 1.1:  # degrees of freedom are rounded
            answer = surely_above(level_of(high), level_of(low), looks)
            assert answer == (p < loss_level.MISTAKEN / looks)
            answers.add(answer)
    assert True in answers or counts == (2, 2)
    assert False in answers


def test_surely_above_with_noise_known_from_more_losses():
    high, low = Level(1.8, 0.4, 5), Level(1.0, 0.4, 8)
    error = 0.4 * math.sqrt(1 / 5 + 1 / 8)
    for looks in (1, 10, 1000):
        expected = stats.t.sf(0.8 / error, 30) < loss_level.MISTAKEN / looks
        assert surely_above(high, low, looks, 30) == expected
    assert {surely_above(high, low, looks, 30) for looks in (1, 1000)} == {True, False}


def test_what_is_infinite_lies_above_and_what_is_alone_or_equal_does_not():
    some, broken = Level(1.0, 0.1, 5), Level(math.inf, 0.0, 5)
    assert surely_above(broken, some, 10)
    assert not surely_above(broken, broken, 10)
    assert not surely_above(some, broken, 10)
    assert not surely_above(some, some, 10)
    assert not surely_above(Level(100.0, math.nan, 1), some, 10)
    assert not surely_above(Level(100.0, 0.1, 5), Level(1.0, math.nan, 1), 10)
    assert surely_above(Level(1.1, 0.0, 5), Level(1.0, 0.0, 5), 10)


def test_chance_alone_is_mistaken_for_a_rise_as_rarely_as_it_says():
    def mistaken(run):
        pairs = ((losses(12, 1.0, 0.5, 40 * run + k), losses(12, 1.0, 0.5, 40 * run + 20 + k)) for k in range(20))
        return any(surely_above(level_of(high), level_of(low), looks=20) for high, low in pairs)

    wrong = sum(map(mistaken, range(400)))
    assert wrong <= 400 * loss_level.MISTAKEN + 3 * math.sqrt(400 * loss_level.MISTAKEN)


# ------------------------------------------------------------------ consecutive losses


def scatter(values):
    found = LossScatter()
    for value in values:
        found.note(value)
    return found


def test_the_deviation_is_that_of_a_difference_and_robust():
    runs = [losses(loss_level.WINDOW + 1, 5.0, 0.2, seed) for seed in range(200)]
    found = [scatter(run).deviation for run in runs]
    assert np.mean(found) == pytest.approx(
        0.2 * math.sqrt(2.0), rel=0.2
    )  # the larger of two estimates is a little large
    assert min(found) > 0.1
    for run in runs:
        run[25] = 500.0  # one outlier makes two differences of fifty
    assert np.mean([scatter(run).deviation for run in runs]) == pytest.approx(np.mean(found), rel=0.15)
    assert scatter([1.0]).deviation == 0.0
    heavy = scatter([1.0, 1.0] * 15 + [1.0, 3.0] * 10)
    assert heavy.deviation == pytest.approx(2.0 / 1.645)  # told by the largest tenth


def test_only_the_latest_differences_count():
    early, late = losses(200, 5.0, 3.0, 4), losses(loss_level.WINDOW + 1, 5.0, 0.01, 5)
    assert scatter(early + late).deviation < 0.05


def test_the_limit_is_the_largest_of_what_explains_a_rise():
    values = losses(40, 5.0, 0.2, 6)
    found = scatter(values)
    usual = quantile(loss_level.TAILS) * found.deviation
    assert found.limit(5.0, math.nan, 10) == pytest.approx(usual)
    assert found.limit(5.0, 10.0, 30) == pytest.approx(quantile(30) * 10.0)
    assert found.limit(5.0, 10.0, 0) == pytest.approx(usual)  # noise without degrees of freedom is not known
    assert found.limit(1e9, 0.0, 30) == pytest.approx(loss_level.ROUNDING * 1e9)
    found.note_harmless(100.0)
    assert found.limit(5.0, 0.0, 30) == pytest.approx(200.0)
    found.note_harmless(1.0)  # a smaller one takes nothing back
    assert found.limit(5.0, 0.0, 30) == pytest.approx(200.0)
    for _ in range(350):
        found.note(5.0)
    assert found.limit(5.0, 0.0, 30) == pytest.approx(100.0, rel=0.02)


def test_a_rise_within_a_share_of_all_progress_is_a_ripple():
    found = scatter([100.0, 50.0, 1.0, *[1.0] * 60])
    assert found.deviation == 0.0
    assert found.limit(1.0, 0.0, 30) == pytest.approx(loss_level.RIPPLE * 1.0)
    assert found.limit(50.0, 0.0, 30) == pytest.approx(loss_level.PROGRESS * 99.0)
    assert scatter([1.0] * 60).limit(1.0, 0.0, 30) == pytest.approx(loss_level.ROUNDING)  # no progress, no ripple


def test_after_the_first_loss_its_own_size_is_the_measure():
    first = scatter([2.0])
    assert first.limit(2.0, 0.0, 10) == pytest.approx(loss_level.FIRST * 2.0)
    assert first.limit(2.0, math.nan, 10) == pytest.approx(loss_level.UNKNOWN * 2.0)
    assert LossScatter().limit(-2.0, 0.0, 10) == pytest.approx(loss_level.FIRST * 2.0)


def test_at_another_point_the_next_loss_makes_no_difference():
    found = scatter([1.0, 1.0, 1.0])
    found.moved()
    found.note(100.0)
    assert found.state_dict()["differences"] == [0.0, 0.0]
    found.note(101.0)
    assert found.state_dict()["differences"] == [0.0, 0.0, 1.0]


def test_with_other_parameters_all_begins_anew_but_what_proved_harmless():
    found = scatter([100.0, 50.0, 1.0])
    found.note_harmless(7.0)
    found.level_unknown()
    assert found.deviation == 0.0
    assert found.limit(1.0, 0.0, 30) == pytest.approx(14.0)
    found.note(3.0)
    found.note(2.0)
    assert found.limit(10.0, 0.0, 30) <= max(14.0, quantile(1) * found.deviation)
    assert found.state_dict()["first"] == 3.0
    assert found.state_dict()["lowest"] == 2.0


def test_a_state_goes_on_as_the_original_does():
    values = losses(30, 5.0, 0.2, 8)
    one, other = scatter(values), LossScatter()
    one.note_harmless(0.5)
    other.load_state_dict(one.state_dict())
    for value in losses(30, 4.0, 0.2, 9):
        one.note(value)
        other.note(value)
        assert one.limit(value, 0.1, 20) == other.limit(value, 0.1, 20)
