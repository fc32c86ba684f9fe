"""Pictures are drawn from a history alone."""

import pytest
from matplotlib.figure import Figure

from alpha_optim import AlphaHistory, GuardEvent
from alpha_optim.report.plots import compare, plot_alpha_against_rate, plot_history, plot_steps
from tests.test_diagnosis import history


def test_a_picture_shows_loss_alpha_rate_and_events(tmp_path):
    filled = history(0.3, losses=lambda n: 1.0)
    figure = plot_history(filled, [GuardEvent(40, "loss_rose", 1.0, 9.0, restored=True)], title="a run")
    loss, alpha, rate = figure.axes
    assert [len(axis.lines[0].get_xdata()) for axis in (loss, alpha, rate)] == [100, 100, 100]
    assert [list(line.get_xdata()) for line in rate.lines[1:]] == [[40]]
    assert all(axis.get_legend() is not None and axis.get_ylabel() for axis in (loss, alpha, rate))
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="the history has no measurements yet"):
        plot_history(AlphaHistory())


def test_the_distribution_of_alpha_is_that_of_the_steps():
    filled = history(0.3, losses=lambda n: 1.0)
    (axis,) = plot_steps(filled).axes
    every, latest = axis.patches
    for stairs, alphas in ((every, filled.alphas), (latest, filled.alphas[-10:])):
        heights, edges, _ = stairs.get_data()
        assert heights.sum() == pytest.approx(100.0)
        inside = (edges[:-1] <= 0.3) & (edges[1:] > 0.3)
        expected = 100.0 * ((alphas >= edges[:-1][inside]) & (alphas < edges[1:][inside])).mean()
        assert heights[inside] == pytest.approx(expected)


def test_pictures_go_into_axes_of_ones_own():
    figure = Figure()
    grid = figure.subplots(4, 2)
    filled = history(0.3, losses=lambda n: 1.0)
    assert plot_steps(filled, ax=grid[0, 0]) is figure
    assert plot_alpha_against_rate(filled, ax=grid[0, 1]) is figure
    assert plot_history(filled, axes=grid[1:, 0]) is figure
    assert compare({"one": filled, "two": filled}, axes=grid[1:, 1]) is figure
    assert [text.get_text() for text in grid[1, 1].get_legend().get_texts()] == ["one", "two"]


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="no runs to compare"):
        compare({})
