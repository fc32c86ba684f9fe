"""Ctrl-C waits while something is half done."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from signal import SIGINT, valid_signals
from types import FrameType
from typing import Any, ParamSpec, TypeVar

try:  # what `signal` wraps: without enums, a sixth of the time
    from _signal import getsignal, signal  # type: ignore[import-not-found] # - it has no types
except ImportError:
    from signal import getsignal, signal
P = ParamSpec("P")
R = TypeVar("R")


class uninterrupted:  # noqa: N801 - a context manager, named like those of contextlib
    """Ctrl-C waits for the end of the block; a second one does not.

    A run that was stopped in a notebook goes on in the next cell, so nothing of ours may be left half written. Only the
    main thread hears of Ctrl-C, and only Python's handlers, the user's own among them, are made to wait.
    """

    __slots__ = ("_before", "_waiting")
    main = threading.main_thread().ident
    active: uninterrupted | None = None
    """The block that the main thread is in."""
    cut_short = False
    """Whether somebody did not want to wait; whoever puts in order what is half done sets it back."""

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
        if uninterrupted.active is not None or threading.get_ident() != uninterrupted.main:
            return
        handler = getsignal(SIGINT)
        if callable(handler):
            self._before = handler
            try:
                signal(SIGINT, self._wait)
            except ValueError:  # an interpreter inside another program, whose main thread is another one
                self._before = None
                return
            uninterrupted.active = self

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is not None and self._before is not None:
            uninterrupted.cut_short = True
            self._before(number, frame)
        self._waiting = (number, frame)

    def __exit__(self, *_: object) -> None:
        """Do what was waited with."""
        before = self._before
        if before is None:
            return
        uninterrupted.active = None  # in this order: what comes in between still waits
        self._put_back(before)
        if self._waiting is not None:
            before(*self._waiting)

    def _put_back(self, before: Callable[[int, FrameType | None], Any]) -> None:
        if getsignal(SIGINT) == self._wait:  # else the user has set another one meanwhile
            signal(SIGINT, before)


def _in_a_child() -> None:
    """A child that was forked within a block hears of Ctrl-C as ever."""
    block, uninterrupted.active, uninterrupted.main = uninterrupted.active, None, threading.get_ident()
    if block is not None and block._before is not None:
        with suppress(ValueError):
            block._put_back(block._before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)


def of_a_signal(error: BaseException) -> bool:
    """Whether an error comes out of a handler that somebody has set for a signal: a time limit, say."""
    handlers = [getsignal(number) for number in valid_signals()]
    codes = {getattr(handler, "__code__", None) for handler in handlers} - {None}
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code in codes:
            return True
        step = step.tb_next
    return False
