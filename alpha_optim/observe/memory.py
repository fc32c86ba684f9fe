"""Where memory runs out while something is measured, the user's step goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_SAID_BY_CPU = ("not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out; on the CPU torch has no class for that."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID_BY_CPU)


@contextmanager
def sparing(gone: Callable[[], None]) -> Iterator[None]:
    """Leave the block where memory runs out in it, and call ``gone`` then; every other error passes.

    Args:
        gone: Cleans up what the block was about.

    Raises:
        BaseException: What the block raises, unless memory has run out.
    """
    try:
        yield
    except BaseException as error:
        if not is_out_of_memory(error):
            raise
        gone()
