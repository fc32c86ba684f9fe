"""Batches in a row that are not finite: which of them is a surprise."""

import json

import numpy as np
import pytest

from alpha_optim.steer.broken_batches import APART, KNOWN, BrokenBatches


def streak(broken, length, restored=True):
    """So many in a row, then one that can be used; what was asked for, and said, at each."""
    said = []
    for _ in range(length):
        surprise = broken.another()
        if surprise:
            broken.step_taken_back(restored)
        said.append("step" if surprise else "data" if broken.taking_back_was_vain() else "skip")
    broken.over()
    return said


def test_the_second_blames_the_step_and_the_third_the_data():
    assert streak(BrokenBatches(), 5) == ["skip", "step", "data", "skip", "skip"]


def test_as_many_in_a_row_as_there_were_are_no_surprise_any_more():
    broken = BrokenBatches()
    expected = {
        4: ["skip", "step", "data", "skip"],
        3: ["skip"] * 3,
        7: ["skip"] * 5 + ["step", "data"],
        8: ["skip"] * 8,  # seven in a row are usual now: the ninth would be a surprise
    }
    for length, said in expected.items():
        assert streak(broken, length) == said
        for _ in range(1000):
            broken.over()


def test_where_taking_the_step_back_helped_the_next_time_is_a_surprise_again():
    broken = BrokenBatches()
    for _ in range(3):
        assert streak(broken, 2) == ["skip", "step"]


@pytest.mark.parametrize("between", [APART - 1, APART])
def test_lowering_the_rate_for_pairs_that_come_again_has_not_helped(between):
    """Long after each other they are the data's; soon, and a rate that is too high may break them."""
    broken, given_back = BrokenBatches(), 0
    for _ in range(4):
        for _ in range(2):
            if broken.another():
                broken.step_taken_back(True)
        given_back += sum(broken.over() for _ in range(1 + between))
    apart = between == APART
    assert given_back == apart
    assert streak(broken, 2) == (["skip", "skip"] if apart else ["skip", "step"])


def test_a_step_that_could_not_be_taken_back_blames_nothing():
    broken = BrokenBatches()
    assert streak(broken, 2, restored=False) == ["skip", "step"]
    assert streak(broken, 3) == ["skip", "step", "data"]
    broken = BrokenBatches()
    assert streak(broken, 5, restored=False) == ["skip", "step", "skip", "skip", "skip"]
    assert streak(broken, 3) == ["skip"] * 3  # five are known to be the data's


def test_batches_that_are_broken_by_chance_blame_no_step():
    """In a run of 1,000 batches, but for the first pair if it comes before the third alone."""
    for often in (0.02, 0.1, 0.3):
        blamed = []
        for seed in range(100):
            broken, random = BrokenBatches(), np.random.default_rng(seed)
            count = 0
            for bad in random.random(1000) < often:
                if not bad:
                    broken.over()
                elif broken.another():
                    broken.step_taken_back(True)
                    count += broken.of_data >= KNOWN
                else:
                    broken.taking_back_was_vain()
            blamed.append(count)
        assert sum(map(bool, blamed)) <= 15  # one in a hundred is meant; how often is learned from few at first


def test_a_step_is_blamed_though_batches_are_broken_now_and_then():
    broken = BrokenBatches()
    for _ in range(10):
        for _ in range(20):
            broken.over()
        assert streak(broken, 1) == ["skip"]
    said = streak(broken, 9)
    assert 2 <= said.index("step") <= 4


@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_was_lowered_for_a_pair_is_given_back_once_pairs_are_no_surprise(before):
    broken, given_back = BrokenBatches(), []
    for length in [1] * before + [2] + [1] * (3 - before) + [2, 2]:
        for _ in range(length):
            if broken.another():
                broken.step_taken_back(True)
        given_back.append(broken.over())
    assert given_back == [False] * 3 + [True, False, False]


def test_what_another_step_was_lowered_for_is_not_given_back():
    broken = BrokenBatches()
    assert streak(broken, 2) == ["skip", "step"]
    broken.other_step_taken_back()
    for _ in range(5):
        broken.another()
        assert not broken.over()


@pytest.mark.parametrize(
    ("good", "bad", "worth"), [(0, 3, True), (0, 2, False), (46, 4, True), (57, 3, False), (20, 9, False)]
)
def test_many_of_them_are_worth_a_warning(good, bad, worth):
    """The first three, or more than one in twenty of fifty batches and more."""
    broken = BrokenBatches()
    for _ in range(good):
        broken.over()
    for _ in range(bad - 1):
        broken.another()
        if good:
            broken.over()
            broken._used -= 1
    assert not broken.worth_telling
    broken.another()
    assert broken.worth_telling == worth


def test_what_is_forgotten_does_not_count():
    broken = BrokenBatches()
    assert not broken.another()
    broken.forget()
    assert streak(broken, 3) == ["skip", "step", "data"]
    broken.forget()
    assert streak(broken, 3) == ["skip"] * 3  # but what is usual stays


@pytest.mark.parametrize("cut", range(7))
def test_a_resumed_run_counts_on(cut):
    broken, said = BrokenBatches(), []
    for n in range(7):
        if n == cut:
            resumed = BrokenBatches()
            resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
            broken = resumed
        if n == 3:
            broken.over()
        surprise = broken.another()
        if surprise:
            broken.step_taken_back(True)
        said.append("step" if surprise else "data" if broken.taking_back_was_vain() else "skip")
    assert said == ["skip", "step", "data", "skip", "skip", "skip", "skip"]
