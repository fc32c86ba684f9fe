"""Pictures of a history (needs matplotlib, which is imported only here).

Every function takes ``ax`` (or ``axes``) to draw into a figure of one's own, and returns the figure; nothing is shown
and no display is needed. Colours are those of Okabe and Ito, told apart by colour-blind eyes; text and lines take
their colours from the style in use, so ``plt.style.context("dark_background")`` gives a dark picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent, GuardReason
from alpha_optim.report.sampling import extremes, trailing_mean, windowed_alpha

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
EARLY_TO_LATE = ("#3b528b", "#32658e", "#2b758e", "#25858e", "#1f958b", "#22a884", "#3dbc74", "#65cb5e", "#95d840")
"""The middle of viridis, which can be seen on white and on black."""
BRIGHT = COLOURS[5]
"""Of areas, which are drawn thinly: it can be seen on white and on black."""
DASHES = ("-", "--", ":", "-.")
"""Told apart by these where there are more runs than colours."""
SHADES = {"jump": 0.18, "climb": 0.12, "trials": 0.06}
"""How dark the phases of a search are drawn; what follows is not shaded."""
SINGLE = "#9a9a9a"
NARROW = 0.1
"""Names of phases stand upright where these are narrower than so much of a picture."""
LOWEST = 1e-8
"""Rates are drawn down to so much of the highest: a search begins far below any that is of use."""
MARKS = ("x", "+", "v", "^", "s", "d", "o")
VISIBLE = (-1.2, 1.7)
"""Alphas outside of this are drawn at its border."""


def window_of(count: int) -> int:
    """Steps over which alpha is averaged in a picture of so many measurements."""
    return min(500, max(10, count // 50))


def lowest_shown(rates: NDArray[np.float64], share: float = LOWEST) -> float | None:
    """Learning rate down to which rates are drawn, a share of the highest one; None if none is above 0."""
    there = rates[rates > 0]
    return max(float(there.min()), share * float(there.max())) if len(there) else None


class Span(NamedTuple):
    """A phase of a search in a picture.

    Attributes:
        begin: Its first iteration.
        end: The first one after it.
        name: Its name.
        narrow: Whether the name has to stand upright.
    """

    begin: int
    end: int
    name: str
    narrow: bool


def spans_of(phases: Sequence[tuple[int, str]], last: int) -> Iterator[Span]:
    """Phases that are to be seen, up to the ``last`` iteration."""
    for (begin, name), (end, _) in pairwise([*phases, (last, "")]):
        if end > begin:
            yield Span(begin, end, name, end - begin <= NARROW * last)


def by_reason(events: Sequence[GuardEvent]) -> dict[str, list[GuardEvent]]:
    """What the guard did, by the words of the legend for each reason."""
    groups: dict[str, list[GuardEvent]] = {}
    for event in events:
        groups.setdefault(event.reason, []).append(event)
    return {f"guard, {len(group)}: {GuardReason(reason).explanation}": group for reason, group in groups.items()}


def plot_history(
    history: AlphaHistory,
    events: Sequence[GuardEvent] = (),
    *,
    phases: Sequence[tuple[int, str]] = (),
    window: int | None = None,
    title: str = "",
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw loss, alpha and learning rate over the iterations of a run.

    Args:
        history: Measurements of the run.
        events: What the guard did (``optimizer.guard_events``); drawn at the learning rate, a mark for each reason.
        phases: Phases of a search (``scheduler.policy.phases``), to be named and shaded.
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
    iterations = np.array([item.iteration for item in items])
    losses = np.array([item.loss_start for item in items])
    at = extremes(losses)
    loss.plot(iterations[at], losses[at], color=COLOURS[0], lw=0.9, label="mini-batch loss")
    loss.set_ylabel("loss")
    _draw_alpha(alpha, items, window or window_of(len(items)))
    rates = np.array([_rate(item) for item in items])
    at = extremes(np.log(np.where(rates > 0, rates, np.nan)))
    rate.semilogy(iterations[at], rates[at], color=COLOURS[2], lw=1.5, label="learning rate, first param group")
    _draw_events(rate, events, iterations, rates)
    lowest = lowest_shown(rates)
    if lowest is not None:
        rate.set_ylim(bottom=lowest / 2)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("iteration")
    _draw_phases(axes, phases, int(iterations[-1]))
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
        ("latest tenth", alphas[-max(1, len(alphas) // 10) :], BRIGHT),
    ):
        values = np.clip(values[np.isfinite(values)], bins[0], bins[-1])
        counts = 100.0 * np.histogram(values, bins)[0] / max(1, len(values))
        ax.stairs(counts, bins, fill=True, color=colour, alpha=0.55, label=label)
        highest = max(highest, float(counts.max(initial=0.0)))
    line = np.linspace(*VISIBLE, 200)
    ax.plot(line, line**2 * highest / 2, color=COLOURS[1], lw=2, label="loss along a step")
    ax.set_xlabel("step length $\\alpha$  (−1 start, 0 minimum, +1 as high as the start)\nouter bars hold all beyond")
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
    at = extremes(middle)
    rates, iterations = (np.array(values) for values in zip(*((_rate(m), m.iteration) for m in items), strict=True))
    points = ax.scatter(rates[at], middle[at], c=iterations[at], cmap=_readable_colours(), s=8)
    ax.set_xscale("log")
    lowest = lowest_shown(rates)
    if lowest is not None:
        ax.set_xlim(left=lowest / 2)
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
    shown = []
    for place, (name, history) in enumerate(histories.items()):
        items, size = _items(history), window_of(len(history))
        style: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "ls": DASHES[place // len(COLOURS) % len(DASHES)],
            "lw": 1.3,
        }
        iterations = np.array([item.iteration for item in items])
        rates = np.array([_rate(item) for item in items])
        curves = {
            loss: trailing_mean(np.array([item.loss_start for item in items]), size),
            alpha: _windows(items, size)[0],
            rate: np.where(rates > 0, rates, np.nan),
        }
        for axis, values in curves.items():
            at = extremes(values)
            axis.plot(iterations[at], values[at], label=name, **style)
        lowest = lowest_shown(rates)
        shown += [] if lowest is None else [lowest]
    rate.set_yscale("log")
    if shown:
        rate.set_ylim(bottom=min(shown) / 2)
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


def plot_rates(
    history: AlphaHistory, suggested: float | None = None, *, title: str = "", axes: Sequence[Axes] | None = None
) -> Figure:
    """Draw loss and alpha of a range test against the learning rate of the first param group.

    Args:
        history: Measurements of the test.
        suggested: A learning rate to mark, if there is one.
        title: Title of the picture.
        axes: Two axes to draw into, top to bottom.

    Returns:
        A matplotlib figure; save it with ``figure.savefig(path)``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    items = [item for item in history if _rate(item) > 0.0]
    if not items:
        raise ValueError("the history has no measurements with a learning rate; a range test makes at least 40 steps")
    if axes is None:
        axes = _new_figure((8, 5)).subplots(2, 1, sharex=True)
    loss, alpha = axes
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


def _readable_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("early to late", EARLY_TO_LATE)


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
    lengths = np.array([item.step_length for item in items])
    with np.errstate(invalid="ignore", over="ignore"):
        start = np.array([item.fitted_slope_start for item in items]) * lengths
        end = np.array([item.fitted_slope_end for item in items]) * lengths
    return windowed_alpha(start, end, size)


def _draw_events(axis: Any, events: Sequence[GuardEvent], iterations: NDArray[Any], rates: NDArray[Any]) -> None:
    """What the guard did, a mark for each reason, with how often it was."""
    for (label, group), marker in zip(by_reason(events).items(), MARKS, strict=False):
        where = [event.iteration for event in group]
        at = np.searchsorted(iterations, where).clip(0, len(iterations) - 1)
        axis.semilogy(where, rates[at], marker, color=COLOURS[1], ms=6, label=label)


def _draw_phases(axes: Sequence[Any], phases: Sequence[tuple[int, str]], last: int) -> None:
    """Phases of a search, shaded, with their names on top of the first of the axes."""
    for span in spans_of(phases, last):
        for axis in axes:
            axis.axvspan(span.begin, span.end, color=SINGLE, alpha=SHADES.get(span.name, 0.0), lw=0)
            axis.axvline(span.begin, color=SINGLE, lw=0.6, ls=":")
        axes[0].annotate(
            span.name, (span.begin, 1.0), (1, 2), xycoords=axes[0].get_xaxis_transform(), textcoords="offset points",
            fontsize=8, rotation=90 if span.narrow else 0, va="bottom",
        )  # fmt: skip


def _draw_alpha(axis: Any, items: Sequence[AlphaMeasurement], window: int) -> None:
    """Single alphas as dots, the windowed one with its standard error as a band."""
    iterations = np.array([item.iteration for item in items])
    alphas = np.clip([item.alpha for item in items], *VISIBLE)
    at = extremes(alphas)
    axis.plot(iterations[at], alphas[at], ".", color=SINGLE, ms=2.5, label="one step")
    middle, error = _windows(items, window)
    at = extremes(middle)
    x, middle, error = iterations[at], middle[at], error[at]
    axis.plot(x, middle, color=COLOURS[0], lw=1.4, label=f"{window} steps, ± standard error")
    axis.fill_between(x, middle - error, middle + error, color=BRIGHT, alpha=0.35, lw=0)
    axis.axhline(0.0, color=SINGLE, lw=0.9)
    axis.set_ylim(*VISIBLE)
    axis.set_ylabel(r"step length $\alpha$")
    for height, where in ((0.0, "bottom"), (1.0, "top")):
        text = "short of the\nminimum" if where == "bottom" else "beyond the\nminimum"
        axis.text(1.005, height, text, transform=axis.transAxes, va=where, rotation=90, fontsize=8)
