"""Loggers get what was measured, as numbers they take."""

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided
from alpha_optim.integrations.loggers import log_measurements, log_to_tensorboard
from tests.test_transparency import make_model, train


def make(groups=1):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    params = list(model.parameters())
    given = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}] if groups == 2 else params
    return model, AlphaGuided(torch.optim.SGD(given, lr=0.1), model, loss_fn)


@pytest.mark.compatibility("Logging", "a function (metrics, step): W&B's log, MLflow's log_metrics")
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


@pytest.mark.compatibility("Logging", "TensorBoard's SummaryWriter")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer = make()
    with SummaryWriter(str(tmp_path)) as writer:
        log_to_tensorboard(optimizer, writer)
        train(model, optimizer, steps=6)
    events = EventAccumulator(str(tmp_path)).Reload()
    alphas = [event.value for event in events.Scalars("alpha_optim/alpha")]
    assert alphas == pytest.approx(optimizer.alpha_history.alphas.tolist(), rel=1e-6)
