"""Pictures of a history (needs matplotlib, which is imported only here)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.alpha.window import window_alpha

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, GREY, RED = "#2166ac", "#b0b0b0", "#b2182b"
VISIBLE = (-1.2, 1.7)


def plot_history(
    history: AlphaHistory, events: Sequence[GuardEvent] = (), *, window: int = 20, title: str = ""
) -> Figure:
    """Draw loss, alpha and learning rate over the iterations of a run.

    Args:
        history: Measurements of the run.
        events: What the guard did (``optimizer.guard_events``); drawn as red marks.
        window: Number of measurements in the averaged alpha.
        title: Title of the picture.

    Returns:
        A matplotlib figure; save it with ``figure.savefig(path)``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    items = list(history)
    if not items:
        raise ValueError("the history has no measurements yet; train for at least two steps")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    loss, alpha, rate = figure.subplots(3, 1, sharex=True)
    iterations = history.iterations
    loss.plot(iterations, [item.loss_start for item in items], color=BLUE, lw=0.9)
    loss.set_ylabel("mini-batch loss")
    _draw_alpha(alpha, history, window)
    rate.semilogy(iterations, [item.lr[0] for item in items], color=BLUE, lw=1.4)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("iteration")
    for axis in (loss, alpha, rate):
        axis.grid(alpha=0.25)
        for event in events:
            axis.axvline(event.iteration, color=RED, lw=0.9, alpha=0.7)
    figure.suptitle(title)
    return figure


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
    items = [item for item in history if item.lr and item.lr[0] > 0.0]
    if not items:
        raise ValueError("the history has no measurements with a learning rate; a range test makes at least 40 steps")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    loss, alpha = figure.subplots(2, 1, sharex=True)
    rates = [item.lr[0] for item in items]
    loss.semilogx(rates, [item.loss_start for item in items], color=BLUE, lw=1.2, label="mini-batch loss")
    loss.set_ylabel("loss")
    alpha.semilogx(rates, np.clip([item.alpha for item in items], *VISIBLE), ".", color=GREY, label="one step")
    windows = [window_alpha(items[max(0, k - 9) : k + 1]) for k in range(len(items))]
    alpha.semilogx(rates, [entry.alpha for entry in windows], color=BLUE, lw=1.4, label="ten steps")
    alpha.axhline(0.0, color="black", lw=0.8)
    alpha.set_ylim(*VISIBLE)
    alpha.set_ylabel(r"step length $\alpha$")
    alpha.set_xlabel("learning rate")
    for axis in (loss, alpha):
        axis.grid(alpha=0.25)
        if suggested is not None:
            axis.axvline(suggested, color=RED, lw=1.4, label=f"suggested: {suggested:.2g}")
        axis.legend(loc="upper left", fontsize=8)
    figure.suptitle(title)
    return figure


def _draw_alpha(axis: Any, history: AlphaHistory, window: int) -> None:
    """Single alphas as dots, the windowed one with its standard error as a band."""
    items = list(history)
    axis.plot(history.iterations, np.clip(history.alphas, *VISIBLE), ".", color=GREY, ms=2.5)
    windows = [window_alpha(items[max(0, k + 1 - window) : k + 1]) for k in range(len(items))]
    middle = np.array([entry.alpha for entry in windows])
    error = np.array([entry.alpha_std for entry in windows])
    axis.plot(history.iterations, middle, color=BLUE, lw=1.4)
    axis.fill_between(history.iterations, middle - error, middle + error, color=BLUE, alpha=0.2, lw=0)
    axis.axhline(0.0, color="black", lw=0.8)
    axis.set_ylim(*VISIBLE)
    axis.set_ylabel(r"step length $\alpha$")
    axis.text(0.99, 0.04, "short of the minimum", transform=axis.transAxes, ha="right", fontsize=8)
    axis.text(0.99, 0.92, "beyond the minimum", transform=axis.transAxes, ha="right", fontsize=8)
