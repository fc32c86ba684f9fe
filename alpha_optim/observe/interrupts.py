"""Ctrl-C waits while something is half done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from signal import SIGINT
from types import FrameType
from typing import Any, ParamSpec, TypeVar

try:  # what `signal` wraps: without enums, a sixth of the time
    from _signal import getsignal, signal  # type: ignore[import-not-found] # - it has no types
except ImportError:
    from signal import getsignal, signal
P = ParamSpec("P")
R = TypeVar("R")
_MAIN = threading.main_thread().ident


class uninterrupted:  # noqa: N801 - a context manager, named like those of contextlib
    """Ctrl-C waits for the end of the block; a second one does not.

    A run that was stopped in a notebook goes on in the next cell, so nothing of ours may be left half written. Only the
    main thread hears of Ctrl-C, and only Python's handlers, the user's own among them, are made to wait.
    """

    __slots__ = ("_before", "_waiting")
    _inside = False  # of the main thread

    def __init__(self) -> None:
        """Prepare."""
        self._before: Callable[[int, FrameType | None], Any] | None = None  # the handler, if it is replaced
        self._waiting: tuple[int, FrameType | None] | None = None

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function: every call is a block. Frames of `contextlib` would be where warnings point to."""

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with uninterrupted():
                return function(*args, **kwargs)

        return run

    def __enter__(self) -> None:
        """Let Ctrl-C wait, unless a block around this one does."""
        if uninterrupted._inside or threading.get_ident() != _MAIN:
            return
        handler = getsignal(SIGINT)
        if callable(handler):
            self._before = handler
            signal(SIGINT, self._wait)
            uninterrupted._inside = True

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is not None and self._before is not None:
            self._before(number, frame)
        self._waiting = (number, frame)

    def __exit__(self, *_: object) -> None:
        """Do what was waited with."""
        before = self._before
        if before is None:
            return
        uninterrupted._inside = False  # in this order: what comes in between still waits
        signal(SIGINT, before)
        if self._waiting is not None:
            before(*self._waiting)
