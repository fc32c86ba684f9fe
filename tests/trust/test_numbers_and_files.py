"""A part of what `python -m tests.trust` tries: hostile numbers, changed files and states."""

import io

import pytest

from alpha_optim import AlphaHistory
from tests.trust import faults, numbers

PART = 7
"""Every so many of the checks are made here."""


@pytest.mark.parametrize(
    ("name", "check"), numbers.checks()[::PART], ids=lambda part: part if isinstance(part, str) else ""
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hostile_numbers_are_told_and_raise_nothing(name, check):
    check()


def test_changed_histories_are_read_or_refused(tmp_path):
    for _, check in faults.history_checks(tmp_path)[::PART]:
        check()


def test_changed_states_are_taken_over_or_refused_with_nothing_changed():
    for _, check in faults.state_checks()[::PART]:
        check()


def test_a_checkpoint_holds_plain_values_only():
    faults.nothing_is_unpickled()


def test_a_full_disk_leaves_the_history_that_was_there(tmp_path, monkeypatch):
    history, path = faults.make()[1].alpha_history, tmp_path / "run.jsonl"
    history.save(path)
    before = path.read_bytes()

    class Full(io.StringIO):
        def write(self, _text):
            path.with_name("run.jsonl.part").write_text("half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("alpha_optim.alpha.history.open", lambda *_, **__: Full(), raising=False)
    with pytest.raises(OSError, match="No space left"):
        history.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]
    assert len(AlphaHistory.load(path)) == len(history)
