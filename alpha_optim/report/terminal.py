"""A run in the terminal, while it trains (needs rich and plotext)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from alpha_optim.report.plots import VISIBLE, window_of
from alpha_optim.report.recording import BadFileError, Recording
from alpha_optim.report.sampling import extremes

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
    plots = [
        _plot(x, recording.losses, "mini-batch loss", width, rows),
        _plot(x, np.clip(middle, *VISIBLE), f"step length α over {size} steps (0: into the minimum)", width, rows),
        _plot(x, np.log10(np.where(rates > 0, rates, np.nan)), "log10 of the learning rate", width, rows),
    ]
    now = (
        f"iteration {x[-1]:,}   loss {recording.losses[-1]:.4g}   α {middle[-1]:+.2f} ± {errors[-1]:.2f}   "
        f"learning rate {rates[-1]:.3g}   guard events {len(recording.events)}"
    )
    words = Text(f"{now}\n{recording.diagnosis()}")
    return Group(Panel(words, title=recording.name), *(Text.from_ansi(plot) for plot in plots))


def _plot(x: np.ndarray, values: np.ndarray, title: str, width: int, height: int) -> str:
    import plotext

    at = extremes(values, 2 * width)
    at = at[np.isfinite(values[at])]
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    plotext.title(title)
    if len(at):
        plotext.plot(x[at].tolist(), values[at].tolist(), marker="braille")
    text: str = plotext.build()
    return text


def watch(path: str, every: float = 1.0, once: bool = False) -> None:
    """Show a run, and again whenever its file has grown, until Ctrl-C.

    A line that is not complete yet is waited for, and so is a file that is not there yet; a file that became shorter
    is read from its beginning.

    Args:
        path: The file that the run writes.
        every: Seconds between two looks.
        once: Whether to look once only.

    Raises:
        BadFileError: If a line does not belong there, or the file cannot be read at the first and only look.
        ImportError: If rich or plotext is not installed.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise ImportError(NEEDS) from error
    console, recording = Console(), Recording(path)
    if once:
        recording.read_on()
        console.print(screen(recording, console.width, console.height))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                grown = recording.read_on()
            except BadFileError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                grown = False
            if grown or not len(recording):
                live.update(screen(recording, console.width, console.height), refresh=True)
            time.sleep(every)
