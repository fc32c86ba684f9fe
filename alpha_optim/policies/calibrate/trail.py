"""Which log scale a policy had asked for at which iteration."""

from __future__ import annotations

KEPT = 50
HIGHEST = 60.0
"""No log scale is asked for above this: a climb that a ``max_lr`` holds would never end, and beyond 1e30 the
scheduler cuts the scale, unknown to the search."""


class Trail:
    """The last `KEPT` changes of a log scale."""

    def __init__(self, position: float) -> None:
        """Start at iteration 0."""
        self._entries: list[tuple[int, float]] = [(0, position)]

    def note(self, iteration: int, position: float) -> None:
        """From this iteration on it is this one."""
        self._entries = [*self._entries[-KEPT:], (iteration, position)]

    def at(self, iteration: int) -> float:
        """Log scale of the step of an iteration."""
        return next((p for n, p in reversed(self._entries) if n <= iteration), self._entries[0][1])

    def state(self) -> list[list[float]]:
        """Return the entries as plain values."""
        return [list(entry) for entry in self._entries]

    def restore(self, entries: list[list[float]]) -> None:
        """Take over entries."""
        self._entries = [(int(n), float(position)) for n, position in entries]
