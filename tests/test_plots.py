"""Pictures are drawn from a history alone."""

import pytest

from alpha_optim import AlphaHistory, GuardEvent
from alpha_optim.report.plots import plot_history
from tests.test_diagnosis import history


def test_a_picture_shows_loss_alpha_rate_and_events(tmp_path):
    filled = history(0.3, losses=lambda n: 1.0)
    figure = plot_history(filled, [GuardEvent(40, "loss_rose", 1.0, 9.0, restored=True)], title="a run")
    loss, alpha, rate = figure.axes
    assert [len(axis.lines[0].get_xdata()) for axis in (loss, alpha, rate)] == [100, 100, 100]
    assert all(any(line.get_xdata() == [40, 40] for line in axis.lines[1:]) for axis in (loss, rate))
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="the history has no measurements yet"):
        plot_history(AlphaHistory())
