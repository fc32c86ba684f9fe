"""Where memory runs out, or anything else is raised, while something is measured, the user's step goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import torch

from alpha_optim.observe.interrupts import of_a_signal
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


def goes_on(error: BaseException) -> bool:
    """Whether what was raised while something was looked at is not about that.

    Ctrl-C, warnings that are to be errors, and what the user's own handler of a signal has raised just then.
    """
    return isinstance(error, Warning) or not isinstance(error, Exception) or of_a_signal(error)


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


class Trouble(NamedTuple):
    """What was raised while a batch was looked at; not the error itself, whose frames hold tensors.

    Attributes:
        kind: Name of its class.
        text: What it says.
        out_of_memory: Whether memory ran out.
        told: Whether it went on to the user, who knows of it then.
    """

    kind: str
    text: str
    out_of_memory: bool
    told: bool

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        """What there is to say of an error."""
        return cls(type(error).__name__, str(error)[:200], is_out_of_memory(error), goes_on(error))


class Shortage:
    """Counts how often memory ran out, and says so once; so it does of other errors."""

    def __init__(self) -> None:
        """It has not happened yet."""
        self._times = 0
        self._last: Trouble | None = None
        self._once = Once()

    def noticed(self, trouble: Trouble | None) -> None:
        """Something was raised while a batch was looked at, or nothing; of one batch it may be asked several times."""
        if trouble is None or trouble.told or trouble is self._last:
            return
        self._last = trouble
        if trouble.out_of_memory:
            self.occurred()
        else:
            self._once.say(
                f"alpha of a step is not measured, since {trouble.kind} was raised while it was looked at "
                f"({trouble.text}); training goes on. Please report it, with what model and loss look like."
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
