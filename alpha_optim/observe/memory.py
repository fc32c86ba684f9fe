"""Where memory runs out, or anything else is raised, while something is measured, the user's step goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch

from alpha_optim.user_warning import Once, warn_user

PATIENT = 3
"""After so many steps whose measurement had no memory nothing is measured."""
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


class Shortage:
    """Counts how often memory ran out, and says so once; so it does of other errors."""

    def __init__(self) -> None:
        """It has not happened yet."""
        self._times = 0
        self._once = Once()

    def noticed(self, error: BaseException | None) -> None:
        """Something was raised while a batch was looked at; Ctrl-C went on, all else is to be told of."""
        if is_out_of_memory(error):
            self.occurred()
        elif isinstance(error, Exception) and not isinstance(error, Warning):
            self._once.say(
                f"alpha of a step is not measured, since {type(error).__name__} was raised while it was looked at "
                f"({str(error)[:200]}); training goes on. Please report it, with what model and loss look like."
            )

    def occurred(self) -> None:
        """Memory ran out while something was measured."""
        self._times += 1
        if self._times == 1:
            warn_user(
                "memory ran out while alpha was measured; the step is made as ever, and where this happens again "
                "measuring stops. Less is needed with a smaller batch, with every=10 (now and then only) or with "
                "AlphaScheduler(guard='cpu')."
            )

    @property
    def lasts(self) -> bool:
        """Whether it has happened so often that nothing should be measured any more."""
        return self._times >= PATIENT
