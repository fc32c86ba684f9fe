"""Warnings that point at the user's line, whatever calls of ours and of torch lie in between."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.util import find_spec


def _folder(package: str) -> str:
    spec = find_spec(package)
    return "" if spec is None or spec.origin is None else os.path.dirname(spec.origin) + os.sep


INSIDE = tuple(filter(None, map(_folder, ("alpha_optim", "torch"))))


def warn_user(text: str) -> None:
    """Warn with the file and line of the first caller outside this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


class Once:
    """Warns with every text once."""

    def __init__(self) -> None:
        """Nothing has been said yet."""
        self.said: set[str] = set()

    def say(self, text: str) -> None:
        """Warn, unless this very text was said before."""
        if text not in self.said:
            self.said.add(text)
            warn_user(text)
