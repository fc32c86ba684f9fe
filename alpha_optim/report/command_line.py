"""``python -m alpha_optim``: look at files of runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from alpha_optim.report.recording import BadFileError, Recording, read_all

BAD = 2
"""Exit code for arguments and files that are no good, as argparse has it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What stands behind ``python -m alpha_optim``; default: that of this process.

    Returns:
        The exit code: 0, or 2 for bad arguments and files.
    """
    options = _parser().parse_args(arguments)
    try:
        with _any_character(sys.stdout):
            options.run(options)
            sys.stdout.flush()
    except (BadFileError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"alpha_optim: {error}", file=sys.stderr)
        return BAD
    except KeyboardInterrupt:
        return 0
    return 0


@contextmanager
def _any_character(stream: Any) -> Iterator[None]:
    """Let a stream write "?" for what its encoding lacks, as that of output redirected on Windows lacks α."""
    errors = getattr(stream, "errors", None)
    if not hasattr(stream, "reconfigure") or errors is None:
        yield
        return
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m alpha_optim",
        description="Look at runs from the files that AlphaHistory.save or loggers.record wrote.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = _command(commands, "report", _report, "write one page to open in a browser", several=True)
    report.add_argument("-o", "--output", default="report.html", metavar="HTML", help="page to write (report.html)")
    watch = _command(commands, "watch", _watch, "show a run in the terminal while it trains", several=False)
    watch.add_argument("--every", type=_seconds, default=1.0, metavar="SECONDS", help="between two looks (1)")
    watch.add_argument("--once", action="store_true", help="look once and return")
    _command(commands, "diagnose", _diagnose, "say in plain words what alpha says", several=True)
    compare = _command(commands, "compare", _compare, "put runs beside each other in a table", several=True)
    compare.add_argument("-o", "--output", metavar="HTML", help="write a page with their curves as well")
    return parser


def _command(commands: Any, name: str, run: Callable[..., None], words: str, several: bool) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=words, description=words.capitalize() + ".")
    command.set_defaults(run=run)
    command.add_argument("files", nargs="+" if several else 1, metavar="FILE", help="JSON lines of a run")
    return command


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0.0:
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text}")
    return seconds


def _report(options: argparse.Namespace) -> None:
    _may_be_written(options.output)
    _write_page(list(read_all(options.files)), options.output)


def _may_be_written(output: str) -> None:
    """Refuse to write a page over anything but a page: a run that took a week is a file, too.

    Raises:
        FileExistsError: If something else is there.
    """
    if not os.path.isfile(output):
        return
    with open(output, "rb") as file:
        there = file.read(64).lstrip().lower()
    if there and not there.startswith((b"<!doctype html", b"<html")):
        raise FileExistsError(f"{output} is there and is no page of HTML, so it is not written over; take another -o")


def _write_page(recordings: list[Recording], output: str) -> None:
    from alpha_optim.report.html_page import page

    text = page(recordings)
    if os.path.exists(output) and not os.path.isfile(output):  # a pipe, a device
        with open(output, "w", encoding="utf-8") as stream:
            stream.write(text)
        return
    with open(f"{output}.part", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{output}.part", output)
    print(f"wrote {output}")


def _watch(options: argparse.Namespace) -> None:
    from alpha_optim.report.terminal import watch

    watch(options.files[0], options.every, options.once)


def _diagnose(options: argparse.Namespace) -> None:
    recordings = list(read_all(options.files))
    for recording in recordings:
        name = f"{recording.name}: " if len(recordings) > 1 else ""
        print(f"{name}{recording.diagnosis()}")


def _compare(options: argparse.Namespace) -> None:
    from alpha_optim.report.summary import SUMMARY, summary

    if options.output is not None:
        _may_be_written(options.output)
    recordings = list(read_all(options.files))
    rows = [("run", *SUMMARY), *((recording.name, *summary(recording)) for recording in recordings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    if options.output is not None:
        _write_page(recordings, options.output)
