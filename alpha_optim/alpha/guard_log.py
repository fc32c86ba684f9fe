"""What the guard of a run did, so that a run of any length can be told about without growing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from alpha_optim.alpha.records import GuardEvent
from alpha_optim.alpha.states import Remembers, from_plain

KEPT = 10_000
"""Events that are kept: some megabytes. Where a guard acts that often, older ones say nothing that these do not."""


class GuardLog(Remembers):
    """The newest events, and how many there were in all.

    Attributes:
        count: How many there were in all.
        skipped: Batches of all events that were not used.
        restored: Steps of all events that were taken back.
    """

    _newest: deque[GuardEvent]
    count: int
    skipped: int
    restored: int

    def __init__(self) -> None:
        """Begin with none."""
        self._newest = deque(maxlen=KEPT)
        self.count = self.skipped = self.restored = 0

    def append(self, event: GuardEvent) -> None:
        """Add an event."""
        self._newest.append(event)
        self.count += 1
        self.skipped += event.skipped
        self.restored += event.restored

    def __iter__(self) -> Iterator[GuardEvent]:
        """Iterate over the newest events, oldest first."""
        return iter(self._newest)

    def load_state_dict(self, state: Mapping[str, Any] | list[dict[str, Any]]) -> None:
        """Replace the contents by those of a `state_dict`, or by a list of events, as version 0.1 wrote."""
        if not isinstance(state, list):
            super().load_state_dict(state)
            return
        self._newest.clear()
        self.count = self.skipped = self.restored = 0
        for event in state:
            self.append(from_plain(GuardEvent, event, "newest"))
