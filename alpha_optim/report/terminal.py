"""A run in the terminal, while it trains (needs rich and plotext)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from alpha_optim.report.plots import VISIBLE, lowest_shown, window_of
from alpha_optim.report.recording import BadFileError, Recording
from alpha_optim.report.sampling import extremes

LOWEST = 1e-4
"""Learning rates below this share of the highest one are drawn at its height: there are few lines."""
FRAME = 4
"""Lines of a plot that show no values: title, frame, numbers below."""
NEEDS = "watching a run needs rich and plotext: pip install 'alpha-optim[report]'"


def screen(recording: Recording, width: int, height: int) -> Any:
    """What is shown: verdict, loss, alpha and learning rate.

    Args:
        recording: The run.
        width: Columns of the terminal.
        height: Its lines.

    Returns:
        Something that rich prints.

    Raises:
        ImportError: If rich or plotext is not installed.
    """
    try:
        import plotext  # noqa: F401 - looked for here, so that the message comes before anything is drawn
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text
    except ImportError as error:
        raise ImportError(NEEDS) from error
    if not len(recording):
        return Panel(f"{recording.path}: waiting for the first measurement", title="alpha_optim")
    rows = max(8, (height - 6) // 3)
    size = window_of(len(recording))
    middle, errors = recording.windowed(size)
    x, rates = recording.iterations, recording.rates
    lowest = lowest_shown(rates, LOWEST)
    decades = np.log10(np.maximum(np.where(rates > 0, rates, np.nan), np.nan if lowest is None else lowest))
    plots = [
        _plot(x, recording.losses, "mini-batch loss", width, rows),
        _plot(x, np.clip(middle, *VISIBLE), f"step length α over {size} steps (0: into the minimum)", width, rows, 0.0),
        _plot(x, decades, "learning rate", width, rows, logarithmic=True),
    ]
    now = (
        f"iteration {x[-1]:,}   loss {recording.losses[-1]:.4g}   α {middle[-1]:+.2f} ± {errors[-1]:.2f}   "
        f"learning rate {rates[-1]:.3g}   guard events {len(recording.events)}"
    )
    phase = f"phase: {recording.phases[-1][1]}. " if recording.phases else ""
    said = f"Iteration {recording.notes[-1][0]:,}: {recording.notes[-1][1]}." if recording.notes else ""
    words = Text("\n".join(filter(None, (now, str(recording.diagnosis()), f"{phase}{said}"))))
    return Group(Panel(words, title=recording.name), *(Text.from_ansi(plot) for plot in plots))


def _plot(
    x: np.ndarray,
    values: np.ndarray,
    title: str,
    width: int,
    height: int,
    line: float | None = None,
    logarithmic: bool = False,
) -> str:
    """A curve in characters.

    Args:
        x: Iterations.
        values: What is drawn.
        title: Above it.
        width: Columns.
        height: Lines.
        line: Height of a line across.
        logarithmic: Whether values are logarithms to base ten, and ticks what they are of.
    """
    import plotext

    at = extremes(values, 2 * width)
    at = at[np.isfinite(values[at])]
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    plotext.title(title)
    if len(at):
        plotext.plot(x[at].tolist(), values[at].tolist(), marker="braille")
        ticks = np.unique(np.linspace(x[at[0]], x[at[-1]], 5).astype(int)).tolist()
        plotext.xticks(ticks, [f"{tick:,}" for tick in ticks])
        if line is not None:
            plotext.hline(line)
        if logarithmic:
            # Each at a line of its own, else it would stand beside a value that is not drawn there.
            between = height - FRAME - 1
            count = next(k for k in (5, 4, 3, 2) if between % (k - 1) == 0)
            heights = np.linspace(values[at].min(), values[at].max(), count).tolist()
            plotext.yticks(heights, [f"{10.0**power:.1e}" for power in heights])
    text: str = plotext.build()
    return text


def watch(path: str, every: float = 1.0, once: bool = False) -> None:
    """Show a run, and again whenever its file has grown, until Ctrl-C.

    A line that is not complete yet is waited for, and so is a file that is not there yet, and one whose last line is
    broken; a file that became shorter, or was replaced, is read from its beginning.

    Args:
        path: The file that the run writes.
        every: Seconds between two looks.
        once: Whether to look once only.

    Raises:
        BadFileError: If a line that does not belong there is followed by others, or the file cannot be read at the
            first and only look.
        ImportError: If rich or plotext is not installed.
    """
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.panel import Panel
    except ImportError as error:
        raise ImportError(NEEDS) from error
    console, recording = Console(), Recording(path)
    if once:
        recording.read_on()
        console.print(screen(recording, console.width, console.height))
        return
    with ExitStack() as stack:
        show: Callable[[Any], None] = console.print  # into a pipe or a file: one picture below the other
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
            show = partial(live.update, refresh=True)
        shown = False
        while True:
            try:
                grown = recording.read_on()
            except BadFileError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    grown = False
                elif error.__cause__ is None or not recording.at_its_end:
                    raise
                else:  # perhaps whoever writes it mends it
                    show(Panel(f"{error} Waiting.", title="alpha_optim"))
                    grown, recording = False, _once_it_changes(path, every)
            if grown or not shown:
                shown = True
                show(screen(recording, console.width, console.height))
            console.file.flush()
            time.sleep(every)


def _once_it_changes(path: str, every: float) -> Recording:
    """Wait until a file is another one, and begin to read it."""
    before = os.stat(path)
    while True:
        time.sleep(every)
        try:
            now = os.stat(path)
        except OSError:
            continue
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (before.st_size, before.st_mtime_ns, before.st_ino):
            return Recording(path)
