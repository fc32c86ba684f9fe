"""Batches in a row that are not finite: which of them is a surprise."""

import json

import pytest

from alpha_optim.steer.broken_batches import BrokenBatches


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
    assert streak(broken, 4) == ["skip", "step", "data", "skip"]
    assert streak(broken, 4) == ["skip"] * 4
    assert streak(broken, 7) == ["skip"] * 5 + ["step", "data"]
    assert streak(broken, 8) == ["skip"] * 8  # seven in a row are usual now: the ninth would be a surprise


def test_where_taking_the_step_back_helped_the_next_time_is_a_surprise_again():
    broken = BrokenBatches()
    for _ in range(3):
        assert streak(broken, 2) == ["skip", "step"]


def test_a_step_that_could_not_be_taken_back_blames_nothing():
    broken = BrokenBatches()
    assert streak(broken, 5, restored=False) == ["skip", "step", "skip", "skip", "skip"]
    assert streak(broken, 3) == ["skip", "step", "data"]


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
