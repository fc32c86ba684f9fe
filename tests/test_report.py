"""The command line and what it draws: from files alone, and with bad ones refused by line."""

import copy
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch

from alpha_optim import (
    AlphaGuided,
    AlphaHistory,
    AlphaMeasurement,
    AlphaScheduler,
    CalibrateThenAnneal,
    GuardEvent,
    Hold,
    WithWarmup,
)
from alpha_optim.alpha.diagnosis import diagnose
from alpha_optim.alpha.history_file import from_line, to_line
from alpha_optim.alpha.window import window_alpha
from alpha_optim.integrations.loggers import record
from alpha_optim.report import html_page, recording, terminal
from alpha_optim.report.command_line import main
from alpha_optim.report.recording import BadFileError, Recording
from alpha_optim.report.sampling import extremes, trailing_mean
from alpha_optim.report.story import _of_guard, stretches, told
from tests.browser import chromium, in_a_browser, photograph


def measurement(n, rate, rng=None, alpha=0.2, loss=1.0):
    noise = 0.0 if rng is None else float(rng.normal())
    start, end = -2.0 + 0.1 * noise, 2.0 * alpha + 0.3 * noise
    return AlphaMeasurement(
        iteration=n, alpha=-end / start, alpha_std=0.1, status="measured", information="full", step_length=0.5,
        loss_start=loss + 0.1 * noise, loss_end=loss, slope_start=start, slope_end=end, loss_variance_start=0.1,
        loss_variance_end=0.1, slope_variance_start=0.1, slope_variance_end=0.1, samples_start=32, samples_end=32,
        fitted_slope_start=start, fitted_slope_end=end, lr=(rate, 2 * rate),
    )  # fmt: skip


def run_file(path, rates=None, count=300):
    rng = np.random.default_rng(0)
    rates = np.full(count, 0.1) if rates is None else rates
    history = AlphaHistory(maxlen=10**6)
    for n, rate in enumerate(rates):
        history.append(measurement(n, float(rate), rng, loss=2.0 * 0.99**n))
    history.save(path)
    return history


def add(path, *rows):
    with open(path, "a") as file:
        file.write("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def event_line(**values):
    row = {"iteration": 3, "reason": "loss_rose", "loss_before": 1.0, "loss_after": 1.0, "restored": True, **values}
    return json.dumps({"event": row}) + "\n"


def train(steps, path, broken=(), seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 1)
    loss_fn = torch.nn.MSELoss()
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.05), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, Hold())
    stop = record(optimizer, path, scheduler)
    for n in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 4)
        y = x.sum(1, keepdim=True) * (math.nan if n in broken else 1.0)
        loss_fn(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    stop()
    return optimizer


# ---------------------------------------------------------------- files


def test_columns_are_those_of_the_history(tmp_path):
    history = run_file(tmp_path / "run.jsonl")
    recording = Recording.read(tmp_path / "run.jsonl")
    items = list(history)
    assert np.array_equal(recording.alphas, history.alphas)
    assert np.array_equal(recording.iterations, history.iterations)
    assert np.array_equal(recording.losses, [item.loss_start for item in items])
    assert np.array_equal(recording.rates, [item.lr[0] for item in items])
    assert str(recording.diagnosis()) == str(diagnose(history))


@pytest.mark.parametrize("block", [1, 5_000, 1 << 20])
@pytest.mark.parametrize("installed", [True, False])
def test_lines_read_at_once_are_those_read_one_by_one(tmp_path, monkeypatch, block, installed):
    """Values that are not known or infinite, events and notes in between, with msgspec and without."""
    path = tmp_path / "run.jsonl"
    history = run_file(path)
    lines = path.read_text().splitlines()
    rows = [from_line(line.encode()) for line in lines[1:]]
    for row in rows[:100]:
        row["alpha_std"] = None
    rows[120]["loss_start"], rows[121]["fitted_slope_end"], rows[122]["lr"] = "inf", "-inf", []
    event = asdict(GuardEvent(200, "loss_rose", 1.0, 9.0, restored=True))
    rows[200:200] = [{"event": event}, {"note": {"iteration": 201, "text": "found"}}]
    written = [lines[0] + "\n", *map(to_line, rows[:250]), *(json.dumps(row) + "\n" for row in rows[250:])]
    path.write_text("".join(written))  # lines of earlier versions have no checksums
    with monkeypatch.context() as patched:
        patched.setattr(Recording, "_take_measurements", lambda *_: False)
        singly = Recording.read(path)
    monkeypatch.setattr(recording, "BLOCK", block)
    if not installed:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    recording._decoder.cache_clear()
    assert (recording._decoder() is not recording._decoded) == installed
    together = Recording.read(path)
    recording._decoder.cache_clear()
    assert len(together) == len(history)
    for name in ("iterations", "alphas", "stds", "losses", "rates"):
        assert np.array_equal(getattr(together, name), getattr(singly, name), equal_nan=True)
    assert np.array_equal(together.alphas, history.alphas)
    assert math.isinf(together.losses[120])
    assert np.isnan(together.rates[122])
    assert together.statuses == singly.statuses
    assert (together.events, together.notes) == (singly.events, singly.notes)
    assert len(together.events) == len(together.notes) == 1
    assert np.array_equal(together.windowed(50), singly.windowed(50), equal_nan=True)
    assert together.diagnosis() == singly.diagnosis()


@pytest.mark.parametrize("size", [1, 2, 10, 100, 1000])
def test_windowed_alpha_of_columns_is_that_of_records(tmp_path, size):
    history = run_file(tmp_path / "run.jsonl")
    items = list(history)
    alpha, error = Recording.read(tmp_path / "run.jsonl").windowed(size)
    for k in (0, 1, 7, 150, 299):
        expected = window_alpha(items[max(0, k + 1 - size) : k + 1])
        assert alpha[k] == pytest.approx(expected.alpha, rel=1e-9)
        if expected.count > 1:
            assert error[k] == pytest.approx(expected.alpha_std, rel=1e-6)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense\n", "line 302: not a line of an alpha history"),
        ('{"iteration": 3}\n', "line 302: .*fields missing or unknown"),
        ("[1, 2]\n", "line 302"),
        ("\x00\x01\n", "line 302"),
        ('{"event": {"iteration": 3}}\n', "line 302"),
        ('{"format": "alpha_optim.history", "version": 99}\n', "line 302: .*newer alpha_optim"),
        ("[" * 100_000 + "\n", "line 302"),
        (event_line(loss_before="abc"), "line 302"),
        (event_line(iteration=True), "line 302"),
        (event_line(restored="no"), "line 302"),
    ],
)
@pytest.mark.parametrize("command", ["report", "diagnose", "compare", "watch --once"])
def test_a_bad_line_is_named_and_the_exit_code_is_2(tmp_path, capsys, command, line, says):
    path = tmp_path / "run.jsonl"
    run_file(path)
    add(path, line)
    command, *more = command.split()
    output = ["-o", str(tmp_path / "page.html")] if command == "report" else more
    assert main([command, str(path), *output]) == 2
    message = capsys.readouterr().err
    assert re.search(says, message)
    assert "Traceback" not in message
    assert len(message) < 600
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("command", ["report", "diagnose", "compare", "watch --once"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("information", "abc"), ("samples_start", None), ("samples_end", math.inf), ("loss_end", []), ("lr", None),
     ("slope_start", "abc"), ("iteration", math.inf)],
)  # fmt: skip
def test_a_bad_value_anywhere_in_a_line_is_an_error_with_its_number(tmp_path, capsys, command, field, value):
    path = tmp_path / "run.jsonl"
    run_file(path, count=50)
    row = json.loads(path.read_text().splitlines()[-1])
    add(path, {**row, field: value})
    command, *more = command.split()
    output = ["-o", str(tmp_path / "page.html")] if command == "report" else more
    assert main([command, str(path), *output]) == 2
    assert "line 52" in capsys.readouterr().err


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "picture.png").write_bytes(bytes(range(256)) * 40)
    AlphaHistory().save(tmp_path / "header.jsonl")
    for name, says in [
        ("empty.jsonl", "no measurement in it"),
        ("header.jsonl", "no measurement in it"),
        ("picture.png", "line 1"),
        ("missing.jsonl", "No such file"),
        (".", "Is a directory"),
    ]:
        assert main(["diagnose", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err


def test_no_arguments_is_an_error_without_traceback():
    result = subprocess.run([sys.executable, "-m", "alpha_optim"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "usage" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["diagnose", "compare", "report", "watch"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_greek_letters_is_served(tmp_path, command, encoding):
    """As Windows has it where output is redirected, and a machine without a locale."""
    run_file(tmp_path / "run.jsonl")
    arguments = {"watch": ["--once"], "report": ["-o", str(tmp_path / "page.html")]}.get(command, [])
    result = subprocess.run(
        [sys.executable, "-m", "alpha_optim", command, str(tmp_path / "run.jsonl"), *arguments],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout


def test_a_last_line_that_is_being_written_is_left_out(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    run_file(path)
    add(path, '{"iteration": 300, "alp')
    assert main(["diagnose", str(path)]) == 0
    assert len(Recording.read(path)) == 300
    assert main(["report", str(path), "-o", str(tmp_path / "page.html")]) == 0
    assert "last line of the file is incomplete" in (tmp_path / "page.html").read_text()


def test_reading_on_takes_what_was_added_and_begins_anew_when_the_file_shrank(tmp_path):
    path = tmp_path / "run.jsonl"
    history = run_file(path, count=50)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]) + lines[20][:30])
    recording = Recording(path)
    assert recording.read_on()
    assert len(recording) == 19
    assert recording.unfinished
    path.write_text("".join(lines))
    assert recording.read_on()
    assert np.array_equal(recording.alphas, history.alphas)
    assert not recording.read_on()
    path.write_text("".join(lines[:5]))
    assert recording.read_on()
    assert len(recording) == 4


# ---------------------------------------------------------------- recording while training


def test_a_run_records_itself_and_one_that_was_killed_is_kept_when_it_begins_anew(tmp_path):
    path = tmp_path / "run.jsonl"
    optimizer = train(12, path)
    assert np.array_equal(AlphaHistory.load(path).alphas, optimizer.alpha_history.alphas)
    add(path, '{"iteration": 11, "al')  # killed while it wrote
    train(8, path)
    assert len(AlphaHistory.load(path)) == 7
    assert len(AlphaHistory.load(tmp_path / "run.1.jsonl")) == 11


def test_events_of_the_guard_are_recorded(tmp_path):
    path = tmp_path / "run.jsonl"
    optimizer = train(12, path, broken=(5,))
    assert optimizer.guard_events
    recording = Recording.read(path)
    assert [str(event) for event in recording.events] == [str(event) for event in optimizer.guard_events]
    assert any("batch skipped" in line for line in told(recording))
    assert len(AlphaHistory.load(path)) == len(optimizer.alpha_history)


def test_batches_skipped_for_one_reason_are_told_together(tmp_path):
    path = tmp_path / "run.jsonl"
    train(60, path, broken=(5, 9, 20, 31, 44))
    lines = [line for line in told(Recording.read(path)) if "skipped" in line]
    assert len(lines) == 2
    assert lines[0].startswith("Iteration 5: ")
    assert "4 more batches were skipped, since the loss is not finite" in lines[1]
    assert len(Recording.read(path).events) == 5


def test_batches_skipped_in_a_row_are_of_one_iteration(tmp_path):
    events = [GuardEvent(12, "loss_not_finite", 1.0, math.nan, restored=False) for _ in range(5)]
    lines = [text for _, _, text in _of_guard(events)]
    assert len(lines) == 2
    assert lines[1].startswith("Iteration 12: 4 more batches")


def test_what_was_told_before_a_resume_is_not_told_again(tmp_path):
    def build():
        torch.manual_seed(0)
        model, loss_fn = torch.nn.Linear(4, 1), torch.nn.MSELoss()
        optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.05), model, loss_fn)
        return model, loss_fn, optimizer, AlphaScheduler(optimizer, WithWarmup(CalibrateThenAnneal(400), 1))

    def go(run, begin, end):
        model, loss_fn, optimizer, scheduler = run
        stop = record(optimizer, path, scheduler)
        for n in range(begin, end):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(n))
            optimizer.zero_grad()
            loss_fn(model(x), x.sum(1, keepdim=True) * (math.nan if n == 20 else 1.0)).backward()
            optimizer.step()
            scheduler.step()
        stop()

    path = tmp_path / "run.jsonl"
    one = build()
    go(one, 0, 120)
    before = Recording.read(path)
    assert before.notes  # of a policy inside another
    assert before.events
    two = build()
    for part, other in zip(two, one, strict=True):
        part.load_state_dict(copy.deepcopy(other.state_dict()))
    go(two, 120, 140)
    after = Recording.read(path)
    assert after.notes[: len(before.notes)] == before.notes
    assert len(set(after.notes)) == len(after.notes)
    assert list(map(str, after.events)) == list(map(str, before.events))


def test_recording_refuses_a_file_that_is_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\nsecond line\n")
    model = torch.nn.Linear(2, 1)
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="line 1"):
        record(optimizer, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "my notes\nsecond line\n"


@pytest.mark.parametrize("command", ["report", "compare"])
def test_no_page_is_written_over_a_run(command, tmp_path, capsys):
    path, page = tmp_path / "run.jsonl", tmp_path / "page.html"
    run_file(path, count=20)
    before = path.read_bytes()
    page.write_text("<!doctype html><html>an older page</html>")
    assert main([command, str(path), "-o", str(path)]) == 2
    assert "is no page of HTML, so it is not written over" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main([command, str(path), "-o", str(page)]) == 0
    assert "an older page" not in page.read_text()


# ---------------------------------------------------------------- words


def test_the_story_names_climb_hold_and_annealing(tmp_path):
    path = tmp_path / "run.jsonl"
    rates = np.concatenate([np.geomspace(1e-8, 1.0, 60), np.full(140, 0.1), 0.1 * np.linspace(1, 0.001, 100)])
    run_file(path, rates)
    words = [part.direction for part in stretches(Recording.read(path))]
    assert words == ["rose", "fell", "held", "fell"]
    first, _, held, last = stretches(Recording.read(path))
    assert (first.begin, first.end) == pytest.approx((1e-8, 1.0))
    assert 58 <= first.last <= 60
    assert held.end == pytest.approx(0.1, rel=0.6)
    assert last.end == pytest.approx(1e-4)


@pytest.mark.parametrize("rates", [np.full(5, 0.1), np.zeros(5), np.full(5, np.nan), np.array([0.1])])
def test_a_story_of_little(tmp_path, rates):
    run_file(tmp_path / "run.jsonl", rates)
    parts = stretches(Recording.read(tmp_path / "run.jsonl"))
    assert [part.direction for part in parts] == (["held"] if np.isfinite(rates).all() else [])
    assert main(["report", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "page.html")]) == 0


def test_compare_puts_runs_beside_each_other(tmp_path, capsys):
    for name, rate in (("a.jsonl", 0.1), ("b.jsonl", 0.025)):
        run_file(tmp_path / name, np.full(100, rate))
    assert main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "measurements"]
    assert first.split()[:2] == ["a.jsonl", "100"]
    assert " 0.1 " in first
    assert " 0.025 " in second


# ---------------------------------------------------------------- pictures


def test_extremes_keep_the_outline():
    values = np.sin(np.arange(100_000) / 5000.0)
    values[54_321], values[12_345], values[77_000:78_000] = 9.0, -7.0, np.nan
    at = extremes(values, 1000)
    assert len(at) <= 1002
    assert {0, 12_345, 54_321, 99_999} <= set(at.tolist())
    assert np.array_equal(extremes(values[:500], 1000), np.arange(500))


@pytest.mark.parametrize("size", [1, 3, 64, 65, 500])
def test_the_trailing_mean_is_that_of_the_values_known(size):
    values = np.random.default_rng(0).normal(size=300)
    values[10:20] = values[250] = np.nan
    expected = [values[max(0, k + 1 - size) : k + 1] for k in range(300)]
    expected = [part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in expected]
    assert trailing_mean(values, size) == pytest.approx(expected, nan_ok=True, abs=1e-12)


HOVER = """<script>window.addEventListener("load", () => setTimeout(() => {
  const plot = document.querySelector(".js-plotly-plot");
  const curve = plot.data.findIndex(trace => trace.name === "α of one step");
  const {x, y} = plot._fullData[curve], {xaxis2, yaxis2} = plot._fullLayout;
  const k = y.indexOf(Math.max(...y));
  const area = plot.querySelector(".nsewdrag[data-subplot=x2y2]"), box = plot.getBoundingClientRect();
  const at = {bubbles: true, clientX: box.left + xaxis2._offset + xaxis2.d2p(x[k]),
              clientY: box.top + yaxis2._offset + yaxis2.d2p(y[k])};
  for (const kind of ["mouseover", "mousemove"]) area.dispatchEvent(new MouseEvent(kind, at));
  setTimeout(() => {
    const shown = [...plot.querySelectorAll(".hoverlayer text")].map(node => node.textContent).join(" | ");
    document.body.setAttribute("data-hover", shown);
  }, 1000);
}, 2000));</script></body>"""


@in_a_browser
def test_the_page_opens_without_errors_or_network_and_hover_says_a_value(tmp_path):
    path, page = tmp_path / "run.jsonl", tmp_path / "page.html"
    rates = np.concatenate([np.geomspace(1e-8, 1.0, 60), np.full(240, 0.1)])
    history = run_file(path, rates)
    add(
        path,
        {"event": {"iteration": 60, "reason": "loss_rose", "loss_before": 1.0, "loss_after": "inf", "restored": True}},
    )
    add(path, {"note": {"iteration": 60, "text": "found <0.1> & held it"}})
    assert main(["report", str(path), "-o", str(page)]) == 0
    text = page.read_text()
    assert "found &lt;0.1&gt; &amp; held it" in text
    own = text[: text.index("<script>")] + text[text.index("</script></head>") :]
    assert not re.findall(r'(?:src|href)="?https?:', own)
    page.write_text(text.replace("</body>", HOVER))
    result = chromium(page, "--dump-dom", "--host-resolver-rules=MAP * ~NOTFOUND")
    complaints = [line for line in result.stderr.splitlines() if "CONSOLE" in line and "GL Driver" not in line]
    assert complaints == []
    hover = re.search(r'data-hover="([^"]*)"', result.stdout)
    assert hover is not None
    point = max(history, key=lambda item: item.alpha)
    shown = (f"iteration {point.iteration}", f"α {point.alpha:+.3f} ± 0.100", f"{point.lr[0]:.4g}", "measured")
    assert all(part in hover[1] for part in shown), hover[1]


@in_a_browser
def test_the_page_can_be_photographed(tmp_path):
    path, page, photo = tmp_path / "run.jsonl", tmp_path / "page.html", tmp_path / "page.png"
    run_file(path)
    main(["report", str(path), "-o", str(page)])
    pixels = photograph(page, photo)
    # Curves are drawn: blue, green and grey beside black on white.
    blue = (pixels[..., 2] - pixels[..., 0] > 0.4).sum()
    green = (pixels[..., 1] - pixels[..., 0] > 0.4).sum()
    assert min(blue, green) > 500


@in_a_browser
def test_the_terminal_view_can_be_photographed(tmp_path):
    pytest.importorskip("plotext", reason="plotext is not installed")
    from rich.console import Console

    path, page = tmp_path / "run.jsonl", tmp_path / "terminal.html"
    run_file(path, np.geomspace(1e-5, 1.0, 300))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(terminal.screen(Recording.read(path), 100, 50))
    page.write_text(console.export_html())
    assert "learning rate" in page.read_text()
    pixels = photograph(page, tmp_path / "terminal.png", 1100, 1200)
    inked = (pixels.min(axis=2) < 0.5).mean(axis=1)
    assert (inked > 0.0).sum() > 600  # a panel and three curves, from top to bottom


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    run_file(tmp_path / "run.jsonl")
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "page.html")]) == 2
    assert "pip install 'alpha-optim[report]'" in capsys.readouterr().err


def test_phases_and_what_the_scheduler_said_are_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    path = tmp_path / "run.jsonl"
    run_file(path)
    for iteration, name in ((0, "jump"), (9, "climb"), (60, "trials"), (120, "held"), (200, "annealed")):
        add(path, {"note": {"iteration": iteration, "text": f"phase: {name}", "phase": name}})
    add(path, {"note": {"iteration": 119, "text": "trial of 24 steps at 0.1: it ends at a loss of 1"}})
    recording = Recording.read(path)
    assert recording.phases[1] == (9, "climb")
    assert recording.notes == [(119, "trial of 24 steps at 0.1: it ends at a loss of 1")]
    assert "In short: the search took 120 iterations" in told(recording)[0]
    assert "annealed from iteration 200" in told(recording)[0]
    assert main(["watch", "--once", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "phase: annealed." in shown
    assert "trial of 24 steps at 0.1" in shown
    page = html_page.page([recording])
    assert all(f'"text":"{name}"' in page for name in ("jump", "climb", "trials", "held", "annealed"))


def test_the_decay_is_a_stretch_of_its_own_and_events_come_in_their_order(tmp_path):
    path = tmp_path / "run.jsonl"
    run_file(path, rates=np.concatenate([np.full(150, 0.1), 0.1 * np.linspace(1.0, 0.7, 150)]))
    add(path, {"note": {"iteration": 150, "text": "phase: annealed", "phase": "annealed"}})
    for restored in (False, True):
        row = {"iteration": 7, "reason": "loss_rose", "loss_before": 1.0, "loss_after": 9.0, "restored": restored,
               "scale_factor": 1.0, "skipped": True}  # fmt: skip
        add(path, {"event": row})
    story = told(Recording.read(path))
    assert any(line.startswith("Iterations 0–149: learning rate held near 0.1") for line in story)
    assert any(line.startswith("Iterations 150–299") for line in story)
    events = [line for line in story if line.startswith("Iteration 7")]
    assert ["batch skipped" in line for line in events] == [True, False]


def test_watch_shows_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run_file(tmp_path / "run.jsonl")
    assert main(["watch", "--once", str(tmp_path / "run.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "iteration 299" in shown
    assert "learning rate 0.1" in shown
    assert "mini-batch loss" in shown
    assert any("⠀" < letter <= "⣿" for letter in shown)


@pytest.mark.parametrize("height", range(8, 16))
def test_learning_rates_in_the_terminal_stand_beside_the_lines_they_are_of(height):
    decades = np.concatenate([np.linspace(-4.0, 0.5, 60), np.full(240, -1.0)])
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal._plot(np.arange(300), decades, "rate", 80, height, logarithmic=True))
    lines = [line for line in text.splitlines() if "│" in line or "┤" in line]
    labels = {row: float(line.split("┤")[0]) for row, line in enumerate(lines) if "┤" in line}
    assert len(labels) >= 2
    for row, label in labels.items():
        assert math.log10(label) == pytest.approx(0.5 - 4.5 * row / (len(lines) - 1), abs=0.02)


def test_a_search_that_began_far_below_leaves_room_for_the_rates_held(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    run_file(tmp_path / "run.jsonl", rates=np.concatenate([np.geomspace(1e-14, 2.0, 60), np.full(240, 0.08)]))
    assert main(["watch", "--once", str(tmp_path / "run.jsonl")]) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown[shown.rindex("learning rate") :].splitlines() if "┤" in line]
    (held,) = [line for line in rows if line.rstrip()[-2] != " "]  # that of the last rate
    assert float(held.split("┤")[0]) == pytest.approx(0.08, rel=0.5)


def test_watch_writes_into_a_pipe_as_it_looks(tmp_path):
    path = tmp_path / "run.jsonl"
    run_file(path, count=100)
    command = [sys.executable, "-m", "alpha_optim", "watch", "--every", "0.05", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        try:
            assert any("iteration 99 " in line for line in watching.stdout)  # the pipe stays open
            more = AlphaHistory()
            more.append(measurement(100, 0.1))
            more.save(tmp_path / "more.jsonl")
            add(path, (tmp_path / "more.jsonl").read_text().splitlines(keepends=True)[1])
            assert any("iteration 100 " in line for line in watching.stdout)
        finally:
            watching.kill()


def test_watch_follows_a_file_that_is_written_and_stops_at_a_broken_line(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    answer = []
    watching = threading.Thread(target=lambda: answer.append(main(["watch", "--every", "0.05", str(path)])))
    watching.start()
    time.sleep(0.3)  # the file is not there yet
    assert watching.is_alive()
    run_file(tmp_path / "whole.jsonl", count=40)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    add(path, *lines[:10], lines[10][:25])
    time.sleep(0.4)
    assert watching.is_alive()
    add(path, lines[10][25:], *lines[11:])
    time.sleep(0.4)
    assert watching.is_alive()
    path.write_text("".join(lines[:5]))
    time.sleep(0.4)
    assert watching.is_alive()
    add(path, "broken\n")
    time.sleep(0.4)
    assert watching.is_alive()  # perhaps whoever writes it mends it
    path.write_text("".join(lines[:7]))
    time.sleep(0.4)
    assert watching.is_alive()
    other = tmp_path / "other.jsonl"  # longer than what was read, and another file
    other.write_text("".join([lines[0], *lines[20:]]))
    os.replace(other, path)
    time.sleep(0.4)
    assert watching.is_alive()
    add(path, "broken\n")
    time.sleep(0.4)
    add(path, lines[8])
    watching.join(timeout=20)
    assert answer == [2]
    assert "line 23" in capsys.readouterr().err


def test_events_survive_the_file(tmp_path):
    event = GuardEvent(7, "loss_rose", 1.0, math.nan, restored=True, scale_factor=0.5, skipped=False)
    path = tmp_path / "run.jsonl"
    run_file(path)
    row = {"iteration": 7, "reason": "loss_rose", "loss_before": 1.0, "loss_after": None, "restored": True,
           "scale_factor": 0.5, "skipped": False}  # fmt: skip
    add(path, {"event": row})
    assert str(Recording.read(path).events[0]) == str(event)
    assert Recording.read(path).events[0].restored is True


def test_two_files_of_one_name_are_told_apart(tmp_path, capsys):
    for folder in ("one", "two"):
        os.mkdir(tmp_path / folder)
        run_file(tmp_path / folder / "run.jsonl", count=30)
    assert main(["diagnose", str(tmp_path / "one/run.jsonl"), str(tmp_path / "two/run.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(str(tmp_path / "one/run.jsonl"))
    assert lines[1].startswith(str(tmp_path / "two/run.jsonl"))


def test_a_file_that_is_none_raises_an_error_of_its_own(tmp_path):
    with pytest.raises(BadFileError, match="No such file"):
        Recording.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_a_digit_that_changed_is_noticed_by_report_and_history(tmp_path, monkeypatch, installed, kept):
    """Unless the line has no checksum, as those of earlier versions; one that was only formatted anew is read."""
    path = tmp_path / "run.jsonl"
    history = run_file(path, count=60)
    if not installed:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    recording._decoder.cache_clear()
    lines = path.read_text().splitlines(keepends=True)
    row = json.loads(lines[30])
    lines[30] = json.dumps(row, separators=(",", ":")) + "\n"
    path.write_text("".join(lines))
    assert AlphaHistory.load(path).state_dict() == history.state_dict()
    assert np.array_equal(Recording.read(path).alphas, history.alphas)
    row["loss_start"] += 1e-9
    if not kept:
        del row["crc32"]
    lines[30] = json.dumps(row) + "\n"
    path.write_text("".join(lines))
    for read in (AlphaHistory.load, Recording.read):
        if kept:
            with pytest.raises(ValueError, match=r"line 31: .*it was changed since: its crc32 does not fit"):
                read(path)
        else:
            assert len(read(path)) == len(history)
    recording._decoder.cache_clear()


@pytest.mark.parametrize("value", [-1, 1 << 60, 3.5, True, None])
def test_an_iteration_that_is_none_is_refused_by_the_report_as_by_the_history(tmp_path, value):
    path = tmp_path / "run.jsonl"
    run_file(path, count=30)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    lines[11] = to_line(from_line(lines[11].encode()) | {"iteration": value})
    path.write_text("".join(lines))
    for read in (Recording.read, AlphaHistory.load):
        with pytest.raises(ValueError, match="iteration must be a whole number of at least 0"):
            read(path)
    for other in ({"event": {"iteration": value, "reason": "loss_rose"}}, {"note": {"iteration": value, "text": "x"}}):
        path.write_text(whole + json.dumps(other) + "\n")
        with pytest.raises(BadFileError, match="iteration must be a whole number of at least 0"):
            Recording.read(path)


def test_after_a_bad_line_that_was_caught_reading_goes_on_behind_it(tmp_path):
    """Nothing is left out, and the next bad line is named rightly."""
    path = tmp_path / "run.jsonl"
    run_file(path, count=30)
    lines = path.read_text().splitlines()
    lines[11] = lines[23] = "nonsense"
    path.write_text("\n".join(lines) + "\n")
    read = Recording(path)
    for number, before in ((12, 10), (24, 21)):
        with pytest.raises(BadFileError, match=f"line {number}:"):
            read.read_on()
        assert len(read) == before
    read.read_on()
    assert read.iterations.tolist() == [n for n in range(30) if n not in (10, 22)]
