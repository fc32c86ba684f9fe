"""Pictures are drawn from a history alone."""

import dataclasses
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from alpha_optim import AlphaHistory, GuardEvent, Observation, measure_alpha
from alpha_optim.alpha.records import GuardReason
from alpha_optim.alpha.window import window_alpha
from alpha_optim.report import plots
from alpha_optim.report.plots import compare, plot_alpha_against_rate, plot_history, plot_steps
from alpha_optim.report.sampling import trailing_sums
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


def test_windows_of_a_picture_are_those_of_the_history():
    rng = np.random.default_rng(0)
    filled = AlphaHistory()
    for n in range(300):
        slopes = [(-abs(rng.normal(1.0, 0.3)), 0.2), (rng.normal(0.0, 0.5) if n % 37 else math.nan, 0.2)]
        ends = [Observation(8, slope, variance, 1.0, 0.3) for slope, variance in slopes]
        filled.append(measure_alpha(n, 0.1, *ends, (0.1,)))
    items = list(filled)
    alphas, errors = plots._windows(items, 20)
    for k in (5, 19, 20, 40, 150, 299):
        expected = window_alpha(items[max(0, k - 19) : k + 1])
        assert (alphas[k], errors[k]) == pytest.approx((expected.alpha, expected.alpha_std))


def test_phases_are_named_and_reasons_told_apart():
    filled = history(0.3, losses=lambda n: 1.0)
    events = [
        GuardEvent(3, GuardReason.LOSS_ROSE, 1.0, 9.0, restored=True),
        GuardEvent(5, GuardReason.LOSS_NOT_FINITE, 1.0, math.nan, restored=False),
        GuardEvent(6, GuardReason.LOSS_NOT_FINITE, 1.0, math.nan, restored=False),
    ]
    phases = ((0, "jump"), (2, "climb"), (40, "held"))
    figure = plot_history(filled, events, phases=phases)
    loss, _, rate = figure.axes
    assert [text.get_text() for text in loss.texts] == ["jump", "climb", "held"]
    labels = [text.get_text() for text in rate.get_legend().get_texts()]
    assert labels[1].startswith("guard, 1: the loss rose")
    assert labels[2].startswith("guard, 2: the loss is not finite")
    assert len({line.get_marker() for line in rate.lines if line.get_label().startswith("guard")}) == 2


def test_many_runs_are_told_apart():
    filled = history(0.3, losses=lambda n: 1.0)
    figure = compare({f"run {k}": filled for k in range(14)})
    styles = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(set(styles)) == 14


def test_a_history_of_the_usual_bound_draws_few_points():
    """100,000 measurements; what is drawn keeps the highest and the lowest of what lies between two points."""
    filled = AlphaHistory()
    item = next(iter(history(0.3, losses=lambda n: 1.0)))
    filled._items = [dataclasses.replace(item, iteration=n, loss_start=math.sin(n / 1e4)) for n in range(100_000)]
    filled._items[77_777] = dataclasses.replace(filled._items[77_777], loss_start=50.0)
    figure = plot_history(filled)
    assert all(len(line.get_xdata()) < 5000 for axis in figure.axes for line in axis.lines)
    assert max(figure.axes[0].lines[0].get_ydata()) == 50.0
    assert len(plot_alpha_against_rate(filled).axes[0].collections[0].get_offsets()) < 5000


@pytest.mark.parametrize("size", [5, 64, 65, 100, 500])
def test_an_outlier_spoils_the_windows_that_hold_it_only(size):
    values = np.random.default_rng(0).normal(size=1700)
    expected = trailing_sums(values, size)
    values[300] += 1e14
    found = trailing_sums(values, size)
    outside = np.r_[:300, 300 + size : 1700]
    assert np.allclose(found[outside], expected[outside], atol=1e-9)
    assert np.allclose(trailing_sums(np.ones(1700), size), np.minimum(np.arange(1700) + 1, size))
