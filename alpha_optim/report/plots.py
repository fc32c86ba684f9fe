"""Pictures of a history (needs matplotlib, which is imported only here).

Every function takes ``ax`` (or ``axes``) to draw into a figure of one's own, and returns the figure; nothing is shown
and no display is needed. Colours are those of Okabe and Ito, told apart by colour-blind eyes; text and lines take
their colours from the style in use, so ``plt.style.context("dark_background")`` gives a dark picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.alpha.window import window_alpha
from alpha_optim.report.sampling import trailing_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SINGLE = "#9a9a9a"
VISIBLE = (-1.2, 1.7)
"""Alphas outside of this are drawn at its border."""


def window_of(count: int) -> int:
    """Steps over which alpha is averaged in a picture of so many measurements."""
    return min(500, max(10, count // 50))


def plot_history(
    history: AlphaHistory,
    events: Sequence[GuardEvent] = (),
    *,
    window: int | None = None,
    title: str = "",
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw loss, alpha and learning rate over the iterations of a run.

    Args:
        history: Measurements of the run.
        events: What the guard did (``optimizer.guard_events``); drawn as crosses at the learning rate.
        window: Number of measurements in the averaged alpha; default: a fiftieth of them, 10 to 500.
        title: Title of the picture.
        axes: Three axes to draw into, top to bottom.

    Returns:
        A matplotlib figure; save it with ``figure.savefig(path)``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    items = _items(history)
    if axes is None:
        axes = _new_figure((8, 7)).subplots(3, 1, sharex=True)
    loss, alpha, rate = axes
    iterations = [item.iteration for item in items]
    loss.plot(iterations, [item.loss_start for item in items], color=COLOURS[0], lw=0.9, label="mini-batch loss")
    loss.set_ylabel("loss")
    _draw_alpha(alpha, items, window or window_of(len(items)))
    rates = [_rate(item) for item in items]
    rate.semilogy(iterations, rates, color=COLOURS[2], lw=1.5, label="learning rate, first param group")
    if events:
        at = np.searchsorted(iterations, [event.iteration for event in events]).clip(0, len(items) - 1)
        heights = [rates[place] for place in at]
        rate.semilogy(
            [event.iteration for event in events],
            heights,
            "x",
            color=COLOURS[1],
            ms=6,
            label="guard went back or skipped",
        )
    rate.set_ylabel("learning rate")
    rate.set_xlabel("iteration")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(loc="best", fontsize=8, framealpha=0.6)
    return _titled(loss, title)


def plot_steps(history: AlphaHistory, *, title: str = "", ax: Axes | None = None) -> Figure:
    """Draw where the steps end on the unit parabola: the distribution of alpha, of all steps and of the latest tenth.

    At -1 a step begins, at 0 lies the minimum along it, at +1 the point as high as the start.

    Args:
        history: Measurements of the run.
        title: Title of the picture.
        ax: Axes to draw into.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If there is nothing to draw.
    """
    alphas = np.array([item.alpha for item in _items(history)])
    ax = ax or _new_figure((6, 3.6)).subplots()
    bins = np.linspace(*VISIBLE, 59)
    highest = 0.0
    for label, values, colour in (
        ("all steps", alphas, SINGLE),
        ("latest tenth", alphas[-max(1, len(alphas) // 10) :], COLOURS[0]),
    ):
        values = np.clip(values[np.isfinite(values)], bins[0], bins[-1])
        counts = 100.0 * np.histogram(values, bins)[0] / max(1, len(values))
        ax.stairs(counts, bins, fill=True, color=colour, alpha=0.55, label=label)
        highest = max(highest, float(counts.max(initial=0.0)))
    line = np.linspace(*VISIBLE, 200)
    ax.plot(line, line**2 * highest / 2, color=COLOURS[1], lw=2, label="loss along a step")
    ax.set_xlabel(r"step length $\alpha$  (−1 start, 0 minimum, +1 as high as the start)")
    ax.set_ylabel("share of the steps, %")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, framealpha=0.6)
    return _titled(ax, title)


def plot_alpha_against_rate(
    history: AlphaHistory, *, window: int | None = None, title: str = "", ax: Axes | None = None
) -> Figure:
    """Draw alpha, averaged, against the learning rate of the first param group, coloured by iteration.

    Args:
        history: Measurements of the run.
        window: Number of measurements in the average; default as in `plot_history`.
        title: Title of the picture.
        ax: Axes to draw into.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If there is nothing to draw.
    """
    items = _items(history)
    ax = ax or _new_figure((6, 3.6)).subplots()
    middle, _ = _windows(items, window or window_of(len(items)))
    points = ax.scatter(
        [_rate(item) for item in items], middle, c=[item.iteration for item in items], cmap="cividis", s=8
    )
    ax.set_xscale("log")
    ax.axhline(0.0, color=SINGLE, lw=0.9)
    ax.set_xlabel("learning rate, first param group")
    ax.set_ylabel(r"step length $\alpha$")
    ax.grid(alpha=0.25)
    ax.figure.colorbar(points, ax=ax, label="iteration")
    return _titled(ax, title)


def compare(histories: Mapping[str, AlphaHistory], *, title: str = "", axes: Sequence[Axes] | None = None) -> Figure:
    """Draw loss, alpha and learning rate of several runs over each other.

    Args:
        histories: Measurements of each run, by the name in the legend.
        title: Title of the picture.
        axes: Three axes to draw into, top to bottom.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not histories:
        raise ValueError("there are no runs to compare; give a mapping from names to histories")
    if axes is None:
        axes = _new_figure((8, 7)).subplots(3, 1, sharex=True)
    loss, alpha, rate = axes
    for place, (name, history) in enumerate(histories.items()):
        items, colour = _items(history), COLOURS[place % len(COLOURS)]
        iterations, size = [item.iteration for item in items], window_of(len(items))
        losses = trailing_mean(np.array([item.loss_start for item in items]), size)
        loss.plot(iterations, losses, color=colour, lw=1.3, label=name)
        alpha.plot(iterations, _windows(items, size)[0], color=colour, lw=1.3, label=name)
        rate.semilogy(iterations, [_rate(item) for item in items], color=colour, lw=1.3, label=name)
    alpha.axhline(0.0, color=SINGLE, lw=0.9)
    alpha.set_ylim(*VISIBLE)
    loss.set_ylabel("loss, averaged")
    alpha.set_ylabel(r"step length $\alpha$")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("iteration")
    for axis in axes:
        axis.grid(alpha=0.25)
    loss.legend(fontsize=8, framealpha=0.6)
    return _titled(loss, title)


def plot_rates(history: AlphaHistory, suggested: float | None = None, *, title: str = "") -> Figure:
    """Draw loss and alpha of a range test against the learning rate of the first param group.

    Args:
        history: Measurements of the test.
        suggested: A learning rate to mark, if there is one.
        title: Title of the picture.

    Returns:
        A matplotlib figure; save it with ``figure.savefig(path)``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    items = [item for item in history if _rate(item) > 0.0]
    if not items:
        raise ValueError("the history has no measurements with a learning rate; a range test makes at least 40 steps")
    figure = _new_figure((8, 5))
    loss, alpha = figure.subplots(2, 1, sharex=True)
    rates = [_rate(item) for item in items]
    loss.semilogx(rates, [item.loss_start for item in items], color=COLOURS[0], lw=1.2, label="mini-batch loss")
    loss.set_ylabel("loss")
    alpha.semilogx(rates, np.clip([item.alpha for item in items], *VISIBLE), ".", color=SINGLE, label="one step")
    alpha.semilogx(rates, _windows(items, 10)[0], color=COLOURS[0], lw=1.4, label="ten steps")
    alpha.axhline(0.0, color=SINGLE, lw=0.9)
    alpha.set_ylim(*VISIBLE)
    alpha.set_ylabel(r"step length $\alpha$")
    alpha.set_xlabel("learning rate")
    for axis in (loss, alpha):
        axis.grid(alpha=0.25)
        if suggested is not None:
            axis.axvline(suggested, color=COLOURS[1], lw=1.4, label=f"suggested: {suggested:.2g}")
        axis.legend(loc="upper left", fontsize=8, framealpha=0.6)
    return _titled(loss, title)


# -------------------------------------------------------------------- parts


def _items(history: AlphaHistory) -> list[AlphaMeasurement]:
    items = list(history)
    if not items:
        raise ValueError("the history has no measurements yet; train for at least two steps")
    return items


def _rate(item: AlphaMeasurement) -> float:
    """Learning rate of the first param group; nan where it is not known."""
    return item.lr[0] if item.lr else float("nan")


def _new_figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _titled(axis: Any, title: str) -> Figure:
    figure: Figure = axis.figure
    if title:
        figure.suptitle(title)
    return figure


def _windows(items: Sequence[AlphaMeasurement], size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Alpha over the last ``size`` measurements at every measurement, and its standard error."""
    windows = [window_alpha(items[max(0, k + 1 - size) : k + 1]) for k in range(len(items))]
    return np.array([entry.alpha for entry in windows]), np.array([entry.alpha_std for entry in windows])


def _draw_alpha(axis: Any, items: Sequence[AlphaMeasurement], window: int) -> None:
    """Single alphas as dots, the windowed one with its standard error as a band."""
    iterations = [item.iteration for item in items]
    alphas = np.clip([item.alpha for item in items], *VISIBLE)
    axis.plot(iterations, alphas, ".", color=SINGLE, ms=2.5, label="one step")
    middle, error = _windows(items, window)
    axis.plot(iterations, middle, color=COLOURS[0], lw=1.4, label=f"{window} steps, ± standard error")
    axis.fill_between(iterations, middle - error, middle + error, color=COLOURS[0], alpha=0.2, lw=0)
    axis.axhline(0.0, color=SINGLE, lw=0.9)
    axis.set_ylim(*VISIBLE)
    axis.set_ylabel(r"step length $\alpha$")
    axis.text(0.5, 0.04, "short of the minimum", transform=axis.transAxes, ha="center", fontsize=8)
    axis.text(0.5, 0.92, "beyond the minimum", transform=axis.transAxes, ha="center", fontsize=8)
