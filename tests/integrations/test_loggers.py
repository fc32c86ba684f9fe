"""Loggers get what was measured, as numbers they take."""

import copy
import json

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaHistory, AlphaScheduler, Hold
from alpha_optim.integrations.loggers import log_measurements, log_to_tensorboard, log_to_wandb, postfix, record
from tests.test_transparency import make_model, optimizer_loss, train


def make(groups=1):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    params = list(model.parameters())
    given = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}] if groups == 2 else params
    return model, AlphaGuided(torch.optim.SGD(given, lr=0.1), model, loss_fn)


@pytest.mark.compatibility("Logging", "a function (metrics, step): MLflow's log_metrics")
def test_every_measurement_goes_to_the_function():
    model, optimizer = make()
    rows = []
    stop = log_measurements(optimizer, lambda metrics, step: rows.append((step, metrics)))
    train(model, optimizer, steps=5)
    assert [step for step, _ in rows] == [0, 1, 2, 3]
    history = optimizer.alpha_history
    assert [metrics["alpha_optim/alpha"] for _, metrics in rows] == history.alphas.tolist()
    assert rows[0][1]["alpha_optim/lr"] == 0.1
    stop()
    train(model, optimizer, steps=2)
    assert len(rows) == 4


def test_rarer_logs_have_alpha_over_all_since_the_last():
    model, optimizer = make(groups=2)
    rows = []
    log_measurements(optimizer, lambda metrics, step: rows.append((step, metrics)), every=3, prefix="")
    train(model, optimizer, steps=7)
    assert [step for step, _ in rows] == [2, 5]
    assert rows[1][1]["alpha"] == pytest.approx(optimizer.alpha_history.windowed(3).alpha)
    assert (rows[1][1]["lr_0"], rows[1][1]["lr_1"]) == (0.1, 0.2)
    with pytest.raises(ValueError, match="every must be at least 1 measurement, got 0"):
        log_measurements(optimizer, print, every=0)


def in_tensorboard(folder, steps):
    """The optimizer of a run that wrote to TensorBoard, and what is there."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer = make()
    with SummaryWriter(str(folder)) as writer:
        log_to_tensorboard(optimizer, writer)
        train(model, optimizer, steps=steps)
    return optimizer, EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()


@pytest.mark.compatibility("Logging", "TensorBoard's SummaryWriter")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    optimizer, events = in_tensorboard(tmp_path, steps=6)
    alphas = [event.value for event in events.Scalars("alpha_optim/alpha")]
    assert alphas == pytest.approx(optimizer.alpha_history.alphas.tolist(), rel=1e-6)
    low, high = ([event.value for event in events.Scalars(f"alpha_optim/alpha_{end}")] for end in ("low", "high"))
    errors = [m.alpha_std for m in optimizer.alpha_history]
    assert [above - below for above, below in zip(high, low, strict=True)] == pytest.approx(
        [2 * e for e in errors], rel=1e-4
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_histograms_and_a_layout(tmp_path):
    _, events = in_tensorboard(tmp_path, steps=230)
    from tensorboard.plugins.custom_scalar import layout_pb2

    histograms = events.Histograms("alpha_optim/alphas")
    assert [(event.step, event.histogram_value.num) for event in histograms] == [(99, 100), (199, 100)]
    (stored,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    margin = charts["alpha"].margin.series[0]
    assert (margin.value, margin.lower, margin.upper) == (
        "alpha_optim/alpha", "alpha_optim/alpha_low", "alpha_optim/alpha_high",
    )  # fmt: skip
    assert list(charts["learning rate"].multiline.tag) == ["alpha_optim/lr"]


class WandbRun:
    """Counts calls of `log` as W&B does: what comes with an earlier number than the last is thrown away."""

    def __init__(self):
        self.step, self.row, self.rows, self.defined = 0, {}, [], {}

    def define_metric(self, name, step_metric=None, hidden=False):
        self.defined[name] = step_metric

    def log(self, data, step=None, commit=None):
        if step is not None:
            if step < self.step:
                return
            if step > self.step:
                self._commit()
                self.step = step
        self.row |= data
        if commit or (commit is None and step is None):
            self._commit()

    def finish(self):
        self._commit()

    def _commit(self):
        if self.row:
            self.rows.append((self.step, self.row))
            self.row, self.step = {}, self.step + 1


@pytest.mark.compatibility("Logging", "Weights & Biases beside the loop's own log: log_to_wandb")
@pytest.mark.parametrize("own", ["every step", "every step, with its number", "every third", "never"])
def test_nothing_is_lost_in_wandb_whatever_the_loop_logs(own):
    model, optimizer = make()
    run = WandbRun()
    stop = log_to_wandb(optimizer, run)
    assert run.defined == {"alpha_optim/iteration": None, "alpha_optim/*": "alpha_optim/iteration"}
    for n in range(12):
        train(model, optimizer, steps=1)
        if own == "every step, with its number":
            run.log({"loss": float(n)}, step=n)
        elif own == "every step" or (own == "every third" and n % 3 == 2):
            run.log({"loss": float(n)})
    stop()
    run.finish()
    found = [row["alpha_optim/iteration"] for _, row in run.rows if "alpha_optim/alpha" in row]
    losses = {step: row["loss"] for step, row in run.rows if "loss" in row}
    assert found == list(range(11))
    if own.startswith("every step"):
        assert losses == {n: float(n) for n in range(12)}  # the loop's numbers are its own
    else:
        assert len(losses) == (4 if own == "every third" else 0)


def test_the_rate_found_is_logged_once_there_is_one():
    model, optimizer = make()
    scheduler = AlphaScheduler(optimizer, total_steps=100)
    rows = []
    log_measurements(optimizer, lambda metrics, _: rows.append(metrics.get("alpha_optim/found_lr")))
    for _ in range(60):
        train(model, optimizer, steps=1)
        scheduler.step()
    found = scheduler.policy.found_lr
    assert found is not None
    assert rows[0] is None
    assert rows[-1] == found
    assert [name for _, name in scheduler.policy.phases][:2] == ["jump", "climb"]
    assert scheduler.policy.phases[-1][1] in ("held", "annealed")


def test_events_of_the_guard_are_counted():
    model, optimizer = make()
    scheduler = AlphaScheduler(optimizer, Hold())
    rows = []
    log_measurements(optimizer, lambda metrics, _: rows.append(metrics))
    for n in range(8):
        x = torch.full((4, 6), float("nan")) if n == 4 else torch.randn(4, 6)
        optimizer.zero_grad()
        optimizer_loss(optimizer)(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        scheduler.step()
    assert "alpha_optim/batches_skipped" not in rows[0]
    assert rows[-1]["alpha_optim/batches_skipped"] == 1.0
    assert rows[-1]["alpha_optim/steps_taken_back"] == 0.0


def test_events_are_written_once_whatever_is_loaded(tmp_path):
    torch.manual_seed(0)
    model, optimizer = make()
    scheduler = AlphaScheduler(optimizer, Hold())
    stop = record(optimizer, tmp_path / "run.jsonl", scheduler)

    def train(bad, steps=4):
        for n in range(steps):
            x = torch.full((4, 6), float("nan")) if n == bad else torch.randn(4, 6)
            optimizer.zero_grad()
            optimizer_loss(optimizer)(model(x), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
            scheduler.step()

    def written():
        return sum('"event"' in line for line in (tmp_path / "run.jsonl").read_text().splitlines())

    train(bad=2)
    state, of_scheduler = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    broken = copy.deepcopy(state)
    broken["alpha_guided"]["pairing"] = "nonsense"
    del broken["alpha_guided"]["checksum"]
    with pytest.raises(ValueError, match="cannot be taken over"):
        optimizer.load_state_dict(broken)
    train(bad=None)
    assert written() == 1
    train(bad=1)
    assert written() == 2
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(of_scheduler)
    train(bad=None)
    assert written() == 2
    train(bad=0)
    stop()
    assert written() == 3


def test_a_progress_bar_shows_alpha_and_rate():
    model, optimizer = make()
    assert postfix(optimizer) == {"lr": "0.1"}
    train(model, optimizer, steps=5)
    window = optimizer.alpha_history.windowed(50)
    assert postfix(optimizer) == {"alpha": f"{window.alpha:+.2f} ± {window.alpha_std:.2f}", "lr": "0.1"}


def test_a_resumed_run_cuts_off_what_it_makes_again(tmp_path):
    """The file went on after the checkpoint; its end is what the resumed run writes."""
    path = tmp_path / "run.jsonl"

    def run():
        torch.manual_seed(0)
        model, optimizer = make()
        scheduler = AlphaScheduler(optimizer, Hold())
        return model, optimizer, scheduler

    def train(model, optimizer, scheduler, first, last):
        for n in range(first, last):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(n))
            optimizer.zero_grad()
            optimizer_loss(optimizer)(model(x), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
            scheduler.step()

    one = run()
    stop = record(one[1], path, one[2])
    train(*one, 0, 15)
    saved = copy.deepcopy([part.state_dict() for part in one])
    train(*one, 15, 20)
    stop()
    two = run()
    for part, state in zip(two, saved, strict=True):
        part.load_state_dict(state)
    stop = record(two[1], path, two[2])
    assert len(AlphaHistory.load(path)) == 14
    train(*two, 15, 30)
    stop()
    written = AlphaHistory.load(path)
    assert written.iterations.tolist() == list(range(29))
    assert written.state_dict()["columns"] == two[1].alpha_history.state_dict()["columns"]


def test_the_file_of_another_run_is_kept_under_another_name(tmp_path, caplog):
    path = tmp_path / "run.jsonl"
    for again in range(3):
        torch.manual_seed(again)
        model, optimizer = make()
        stop = record(optimizer, path)
        for _ in range(5 + again):
            optimizer.zero_grad()
            optimizer_loss(optimizer)(model(torch.randn(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
        stop()
    found = {one.name: len(AlphaHistory.load(one)) for one in tmp_path.iterdir()}
    assert found == {"run.1.jsonl": 4, "run.2.jsonl": 5, "run.jsonl": 6}
    told = [f"{path} held another run, which is kept as {tmp_path}/run.{n}.jsonl" for n in (1, 2)]
    assert [message.split(";")[0] for message in caplog.messages] == told


@pytest.mark.parametrize("wrong", [None, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)])
def test_only_wrapped_optimizers_can_be_recorded(tmp_path, wrong):
    with pytest.raises(TypeError, match="takes the optimizer that AlphaGuided wraps others as, got"):
        record(wrong, tmp_path / "run.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_notes_and_events_of_a_file_without_checksums_are_not_written_again(tmp_path):
    path = tmp_path / "run.jsonl"
    torch.manual_seed(0)
    _, optimizer = make()
    scheduler = AlphaScheduler(optimizer, total_steps=20)  # too short for a search, which it says
    record(optimizer, path, scheduler)()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert any("note" in row for row in rows)
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "crc32"}) + "\n" for row in rows))
    record(optimizer, path, scheduler)()
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("note" in row for row in again) == sum("note" in row for row in rows)
