"""Where memory runs out while something is measured, the user's step goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch

_TEXTS = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""What errors say for which torch has no class: of the CPU, of MPS, of libraries on a device."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory has run out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


class sparing:  # noqa: N801 - a context manager, named like those of contextlib
    """Leave the block where memory runs out in it, and call a function then; every other error passes."""

    def __init__(self, gone: Callable[[], object]) -> None:
        """Prepare.

        Args:
            gone: Cleans up what the block was about.
        """
        self._gone = gone

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Clean up, if memory has run out."""
        if not is_out_of_memory(error):
            return False
        self._gone()
        return True
