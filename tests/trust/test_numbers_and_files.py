"""A part of what `python -m tests.trust` tries: hostile numbers, changed files and states."""

import base64
import copy
import io
import os
import zlib

import pytest
import torch

from alpha_optim import AlphaHistory
from tests.test_transparency import equal_states
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


@pytest.mark.parametrize("wrong", [None, 5, [], {}, {"version": "1"}, {"version": True}])
def test_what_is_no_state_is_refused_by_name(wrong):
    """Of the optimizer under its key and as text in a group, and of the scheduler; nothing is changed."""
    _, optimizer, scheduler = faults.make(3)
    before = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    with pytest.raises(ValueError, match="no state of an AlphaScheduler: it should be a dictionary with a 'version'"):
        scheduler.load_state_dict(wrong)
    if wrong is not None:  # a bare optimizer's
        with pytest.raises(ValueError, match="no state of an AlphaGuided"):
            optimizer.load_state_dict({**before[0], "alpha_guided": wrong})
    assert equal_states(before[0], optimizer.state_dict())
    assert equal_states(before[1], scheduler.state_dict())


class Malicious:
    """Would run code where it is unpickled."""

    def __reduce__(self):
        return (os.putenv, ("ALPHA_OPTIM_WAS_HERE", "1"))


def test_nothing_but_plain_values_is_unpickled(monkeypatch):
    """The text that distributed checkpoints keep in a group is the one thing that the package unpickles itself."""
    called = []
    _, optimizer, _ = faults.make(3)
    state = {key: value for key, value in optimizer.state_dict().items() if key != "alpha_guided"}
    stream = io.BytesIO()
    torch.save({"version": 1, "x": Malicious()}, stream)
    monkeypatch.setattr(os, "putenv", lambda *arguments: called.append(arguments))
    for text in (base64.b85encode(zlib.compress(stream.getvalue())).decode(), "nonsense", 5):
        groups = [{**state["param_groups"][0], "alpha_guided": text}]
        with pytest.raises(ValueError, match="no state that alpha_optim wrote"):
            optimizer.load_state_dict({**state, "param_groups": groups})
    assert not called
