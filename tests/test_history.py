"""The history: reading, windows, files, bounds."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from alpha_optim import AlphaGuided, AlphaHistory, AlphaStatus, Observation, measure_alpha
from alpha_optim.alpha.history_file import from_row, to_row
from alpha_optim.alpha.records import DropReason


def measurement(n, start=-1.0, end=0.2, t=1.0, **more):
    return measure_alpha(n, t, Observation(0, start, **more), Observation(0, end, **more), (0.1, 0.2))


def filled(count, maxlen=1000):
    rng = np.random.default_rng(0)
    history = AlphaHistory(maxlen)
    for n in range(count):
        history.append(measurement(n, -1.0 + 0.1 * rng.normal(), 0.2 * rng.normal()))
    return history


class Waiting:
    """Numbers that are still on the device."""

    def __init__(self, outcome, log, iteration=0):
        self.outcome, self.log, self.iteration = outcome, log, iteration

    def resolve(self, waiting):
        for each in waiting:
            each.log.append(each.outcome)
        return [each.outcome for each in waiting]


def test_it_is_a_sequence_oldest_first():
    history = filled(5)
    assert len(history) == 5
    assert [m.iteration for m in history] == [0, 1, 2, 3, 4]
    assert history[-1].iteration == 4
    assert [m.iteration for m in history[1:3]] == [1, 2]
    assert history.iterations.tolist() == [0, 1, 2, 3, 4]
    assert history.iterations.dtype == np.int64
    assert history.alphas.dtype == np.float64
    assert np.array_equal(np.asarray(history), history.alphas)


def test_numbers_stay_where_they_are_until_somebody_reads():
    history, fetched = AlphaHistory(), []
    history.append(Waiting(measurement(0), fetched))
    history.append(Waiting(DropReason.PARAMETERS_CHANGED, fetched))
    assert fetched == []
    assert len(history) == 1
    assert len(fetched) == 2
    assert history.dropped == {"parameters_changed": 1}


def test_the_oldest_make_room_and_are_counted():
    history = filled(250, maxlen=100)
    assert len(history) == 100
    assert history[0].iteration == 150
    assert history.dropped == {"evicted": 150}


def test_subscribers_see_every_measurement_once_in_order():
    history, seen = AlphaHistory(), []
    stop = history.subscribe(lambda m: seen.append(m.iteration))
    history.append(measurement(0))
    history.append(Waiting(measurement(1), []))
    assert seen == [0, 1]
    stop()
    history.append(measurement(2))
    assert seen == [0, 1]


def test_windows_are_ratios_of_averages_and_concave_steps_enter_unclamped():
    history = AlphaHistory()
    for start, end, t in [(-1.0, 0.5, 1.0), (-2.0, 1.0, 0.1), (-1.0, -1.5, 2.0)]:
        history.append(measurement(0, start, end, t))
    assert history[-1].status is AlphaStatus.CONCAVE
    window = history.windowed(3)
    assert window.alpha == pytest.approx(-(0.5 + 0.1 - 3.0) / (-1.0 - 0.2 - 2.0))
    assert window.count == 3
    assert history.windowed(2).alpha == pytest.approx(-(0.1 - 3.0) / (-0.2 - 2.0))


def test_the_error_of_a_window_is_the_spread_of_windows():
    rng = np.random.default_rng(1)
    standardised = []
    for _ in range(400):
        history = AlphaHistory()
        for n in range(50):
            history.append(measurement(n, -1.0 + 0.3 * rng.normal(), 0.2 + 0.3 * rng.normal()))
        window = history.windowed(50)
        standardised.append((window.alpha - 0.2) / window.alpha_std)
    assert np.std(standardised) == pytest.approx(1.0, abs=0.1)


def test_what_was_not_measured_does_not_enter_a_window():
    history = AlphaHistory()
    history.append(measurement(0))
    history.append(measurement(1, math.nan))
    history.append(measurement(2, t=0.0))
    assert history.windowed(3).count == 1
    assert AlphaHistory().windowed(3).count == 0
    assert math.isnan(AlphaHistory().windowed(3).alpha)


def test_files_keep_every_number(tmp_path):
    history = filled(20)
    history.append(measurement(20, math.inf))
    history.drop("step_skipped", 3)
    history.save(tmp_path / "h.jsonl")
    loaded = AlphaHistory.load(tmp_path / "h.jsonl")
    assert repr(list(loaded)) == repr(list(history))
    assert loaded.dropped == history.dropped
    for line in (tmp_path / "h.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_files_can_be_appended_to(tmp_path):
    filled(3).save(tmp_path / "a.jsonl")
    filled(2).save(tmp_path / "b.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write((tmp_path / "b.jsonl").read_text())
    assert len(AlphaHistory.load(tmp_path / "a.jsonl")) == 5


def test_columns_and_data_frames():
    history = filled(4)
    columns = history.to_dict()
    assert columns["iteration"] == [0, 1, 2, 3]
    assert columns["status"] == ["measured"] * 4
    frame = history.to_dataframe()
    assert frame["alpha"].tolist() == history.alphas.tolist()
    assert frame.shape == (4, len(columns))


def test_state_survives_a_round_trip():
    history = filled(4)
    history.drop("no_backward")
    other = AlphaHistory()
    other.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert repr(list(other)) == repr(list(history))
    assert other.dropped == {"no_backward": 1}


def test_older_measurements_are_read_without_fetching_newer_ones():
    history, fetched = AlphaHistory(), []
    for n in range(5):
        history.append(Waiting(measurement(n), fetched, n))
    assert [m.iteration for m in history.up_to(2, after=-1)] == [0, 1, 2]
    assert len(fetched) == 3
    assert [m.iteration for m in history.up_to(3, after=2)] == [3]
    assert len(fetched) == 4
    assert len(history) == 5
    assert [m.iteration for m in history.up_to(3, after=1)] == [2, 3]


def test_trials_that_came_to_nothing_stay_known(tmp_path):
    """Windows leave them out, also after a file or a state has been read."""
    history = filled(20)
    history.abandoned = [(3, 7), (15, 18)]
    history.drop("not_finite", 2)
    path = tmp_path / "run.jsonl"
    history.save(path)
    loaded, resumed = AlphaHistory.load(path), AlphaHistory()
    resumed.load_state_dict(history.state_dict())
    for one in (loaded, resumed):
        assert one.abandoned == [(3, 7), (15, 18)]
        assert one.dropped == {"not_finite": 2}
        assert one.windowed(50) == history.windowed(50)
        assert one.windowed(50).count == 20 - 5 - 4
    resumed.load_state_dict(AlphaHistory().state_dict())
    assert (len(resumed), resumed.abandoned, resumed.dropped) == (0, [], {})


def test_a_file_continued_by_another_run_keeps_what_both_abandoned(tmp_path):
    path = tmp_path / "run.jsonl"
    for span in ((0, 1), (2, 3)):
        history = filled(5)
        history.abandoned = [span]
        history.save(tmp_path / "part")
        with open(path, "a") as file:
            file.write((tmp_path / "part").read_text())
    assert AlphaHistory.load(path).abandoned == [(0, 1), (2, 3)]


def test_lines_of_a_report_are_not_measurements(tmp_path):
    path = tmp_path / "run.jsonl"
    filled(3).save(path)
    with open(path, "a") as file:
        file.write('{"event": {"iteration": 1}}\n{"note": {"iteration": 1, "text": "found"}}\n')
    assert len(AlphaHistory.load(path)) == 3


def test_a_file_that_cannot_be_written_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    filled(3).save(path)
    before = path.read_text()

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        filled(9).save(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.jsonl"]


def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path):
    path = tmp_path / "run.jsonl"
    filled(3).save(path)
    lines = path.read_text().splitlines()
    row = json.loads(lines[2])
    for changed, said in (
        ("{", r"line 3: not a line of an alpha history"),
        (json.dumps({**row, "new": 1}), r"line 3.*new"),
        (json.dumps({name: value for name, value in row.items() if name != "alpha"}), r"line 3.*alpha"),
    ):
        path.write_text("\n".join([*lines[:2], changed, lines[3]]) + "\n")
        with pytest.raises(ValueError, match=said):
            AlphaHistory.load(path)
    path.write_text(lines[1] + "\n")  # no header
    with pytest.raises(ValueError, match="line 1"):
        AlphaHistory.load(path)
    path.write_text("")
    with pytest.raises(ValueError, match="is empty; expected"):
        AlphaHistory.load(path)
    AlphaHistory().save(path)
    assert len(AlphaHistory.load(path)) == 0


def test_a_window_of_one_is_that_measurement():
    history = filled(4)
    assert history.windowed(1).count == 1
    assert history.windowed(1).alpha == pytest.approx(history[-1].alpha)
    with pytest.raises(ValueError, match="at least 1"):
        history.windowed(0)
    assert history[1:1] == []
    assert history.to_dict()["lr"] == [[0.1, 0.2]] * 4


def test_an_array_of_another_type_is_asked_for_like_any_other():
    history = filled(4)
    assert np.asarray(history).dtype == np.float64
    assert np.asarray(history, dtype=np.float32).dtype == np.float32
    assert np.allclose(np.asarray(history, dtype=np.float32), history.alphas)


def test_who_has_unsubscribed_may_do_so_again():
    history, seen = filled(0), []
    stop = history.subscribe(seen.append)
    stop()
    stop()
    history.append(measurement(0))
    assert seen == []


def test_a_history_that_waits_for_its_numbers_is_pickled_with_them(tmp_path):
    torch.manual_seed(0)
    model, loss_fn = torch.nn.Linear(4, 2), torch.nn.CrossEntropyLoss()
    optimizer, seen = AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn), []
    for step in range(6):
        optimizer.zero_grad()
        loss_fn(model(torch.randn(8, 4)), torch.randint(0, 2, (8,))).backward()
        optimizer.step()
        if step == 2:
            stop = optimizer.alpha_history.subscribe(seen.append)
        if step == 3:
            stop()
    torch.save({"history": optimizer.alpha_history}, tmp_path / "history.pt")
    loaded = torch.load(tmp_path / "history.pt", weights_only=False)["history"]
    assert list(loaded) == list(optimizer.alpha_history)
    assert len(loaded) == 5
    optimizer.alpha_history.subscribe(seen.append)
    assert len(copy.deepcopy(optimizer.alpha_history)._callbacks) == 0  # who follows one does not follow its copy


def test_a_row_that_is_none_names_the_field():
    row = to_row(measure_alpha(0, 1.0, Observation(8, -1.0), Observation(8, 0.5), (0.1,)))
    for name in ("loss_start", "step_length", "alpha"):
        with pytest.raises(ValueError, match=f"{name} must be a number, got 'x'"):
            from_row({**row, name: "x"})
