"""Batches that are not finite, one after the other: is a step to blame, or are the data?"""

from __future__ import annotations

import math

from alpha_optim.alpha.loss_level import MISTAKEN
from alpha_optim.alpha.states import Remembers

KNOWN = 3
"""So many that the data were at fault for tell how often they are broken."""
TELLS, OFTEN, MANY = 3, 0.05, 50
"""The first so many batches of a run, if all of them are broken, are worth a warning; or more than this share of so
many batches and more."""
APART = 10
"""Two streaks with more usable batches than this between them are two events; a rate that is too high breaks the next
ones at once."""


class BrokenBatches(Remembers, names={"in_a_row": "not_finite", "_usual": "most_not_finite"}):
    """Counts them.

    The second in a row is a surprise, at first. One after which the next batch, at the same point, can be used was
    the data's; and so are two streaks of which the second comes at the rate that was lowered for the first. A few of
    them tell how often data are broken: from then on so many in a row are a surprise as chance alone hardly makes in a
    run.

    Attributes:
        in_a_row: How many there were, up to now.
        of_data: How many the data were at fault for.
    """

    in_a_row: int
    of_data: int = 0
    _used: int = 0  # batches that could be used
    _lowered: bool  # whether the rate was lowered for them
    _at_fault: bool  # whether that did not help, so that the data are at fault
    _usual: int  # so many in a row the data were at fault for
    _doubted: bool = False  # whether the rate is still lowered for a streak that may have been chance
    _doubtful: int = 0  # so many batches were in it
    _doubted_at: int = 0  # after so many batches that could be used

    def __init__(self) -> None:
        """There have been none."""
        self._usual = 0
        self.forget()

    def another(self) -> bool:
        """Count one; whether it is the one that is a surprise, so that the last step may be to blame."""
        self.in_a_row += 1
        return self.in_a_row == max(self._usual + 2, self._surprise())

    def _surprise(self) -> int:
        """So many in a row chance makes in one run of a hundred, if each batch is broken as often as they were."""
        if self.of_data < KNOWN:
            return 2
        batches = self._used + self.of_data
        often = min(0.5, (self.of_data + 1) / (batches + 2))
        return max(2, math.ceil(math.log(MISTAKEN / batches) / math.log(often)))

    @property
    def worth_telling(self) -> bool:
        """Whether there were many of them, no step being to blame."""
        count = self.of_data + self.in_a_row
        batches = self._used + count
        return count >= TELLS and (self._used == 0 or (batches >= MANY and count > OFTEN * batches))

    def step_taken_back(self, restored: bool) -> None:
        """The last step was taken back for it, if it could be."""
        self._lowered = restored

    def other_step_taken_back(self) -> None:
        """A step was taken back for another reason: what was lowered before is no longer told apart."""
        self._doubted = False

    def taking_back_was_vain(self) -> bool:
        """Whether this is the first one after a step was taken back: then the data are at fault."""
        if not self._lowered:
            return False
        self._lowered, self._at_fault = False, True
        return True

    def over(self) -> bool:
        """A batch can be used: as many in a row as there were are usual in these data, if those were at fault.

        Returns:
            Whether the step that was taken back last was not to blame after all: now such streaks are no surprise.
        """
        self._used += 1
        if self._at_fault:
            self._usual = max(self._usual, self.in_a_row)
        if self._lowered:  # going back helped, or chance did
            if self._doubted and self._used - self._doubted_at > APART:
                self.of_data += self._doubtful + self.in_a_row
            self._doubted, self._doubtful, self._doubted_at = True, self.in_a_row, self._used
        elif not self._at_fault:
            self.of_data += self.in_a_row
        self.forget()
        if not self._doubted or self._surprise() == 2:
            return False
        self._doubted = False
        return True

    def forget(self) -> None:
        """Those up to now do not count."""
        self.in_a_row, self._lowered, self._at_fault = 0, False, False
