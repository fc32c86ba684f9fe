"""What the guard of a run did, so that a run of any length can be told about without growing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from alpha_optim.alpha.records import GuardEvent
from alpha_optim.alpha.states import from_plain, to_plain

KEPT = 10_000
"""Events that are kept: some megabytes. Where a guard acts that often, older ones say nothing that these do not."""


class GuardLog:
    """The newest events, and how many there were in all.

    Attributes:
        count: How many there were in all.
        skipped: Batches of all events that were not used.
        restored: Steps of all events that were taken back.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._newest: deque[GuardEvent] = deque(maxlen=KEPT)
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

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        counts = {"count": self.count, "skipped": self.skipped, "restored": self.restored}
        return {"newest": to_plain(self._newest), **counts}

    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Replace the contents by those of a `state_dict`, or by a list of events, as version 0.1 wrote."""
        newest = state if isinstance(state, list) else state["newest"]
        self._newest.clear()
        self.count = self.skipped = self.restored = 0
        for event in newest:
            self.append(from_plain(GuardEvent, event, "newest"))
        if not isinstance(state, list):
            self.count, self.skipped, self.restored = (int(state[name]) for name in ("count", "skipped", "restored"))
