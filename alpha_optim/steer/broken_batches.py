"""Batches that are not finite, one after the other: is a step to blame, or are the data?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BrokenBatches:
    """Counts them.

    Attributes:
        in_a_row: How many there were, up to now.
    """

    def __init__(self) -> None:
        """There have been none."""
        self.in_a_row = 0
        self._lowered = False  # whether the rate was lowered for them
        self._at_fault = False  # whether that did not help, so that the data are at fault
        self._usual = 0  # so many in a row the data were at fault for

    def another(self) -> bool:
        """Count one; whether it is the second that is a surprise, so that the last step may be to blame."""
        self.in_a_row += 1
        return self.in_a_row == self._usual + 2

    def step_taken_back(self, restored: bool) -> None:
        """The last step was taken back for it, if it could be."""
        self._lowered = restored

    def taking_back_was_vain(self) -> bool:
        """Whether this is the first one after a step was taken back: then the data are at fault."""
        if not self._lowered:
            return False
        self._lowered, self._at_fault = False, True
        return True

    def over(self) -> None:
        """A batch can be used: as many in a row as there were are usual in these data, if those were at fault."""
        if self._at_fault:
            self._usual = max(self._usual, self.in_a_row)
        self.forget()

    def forget(self) -> None:
        """Those up to now do not count."""
        self.in_a_row, self._lowered, self._at_fault = 0, False, False

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "not_finite": self.in_a_row,
            "lowered": self._lowered,
            "at_fault": self._at_fault,
            "most_not_finite": self._usual,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self.in_a_row, self._lowered = int(state["not_finite"]), bool(state["lowered"])
        self._at_fault, self._usual = bool(state["at_fault"]), int(state["most_not_finite"])
