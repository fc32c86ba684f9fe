"""What a run did with its learning rate, in sentences with absolute rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from alpha_optim.alpha.records import GuardEvent, GuardReason
from alpha_optim.report.recording import Recording
from alpha_optim.report.sampling import extremes

TURN = math.log(2.0)
"""A rate that changed by less than this factor was held, and a smaller deviation from a line is none."""
SHORTEST = 5
"""A rate is held for so many measurements at least, or a hundredth of them."""
LONGEST = 40
"""More stretches than this are not told one by one; a rate that moves at every step has a curve, not a story."""


class Stretch(NamedTuple):
    """Measurements over which the learning rate moved one way.

    Attributes:
        first: Iteration of the first measurement.
        last: Iteration of the last one.
        begin: Learning rate there, of the first param group.
        end: Learning rate at the last one.
        middle: Median of its learning rates.
    """

    first: int
    last: int
    begin: float
    end: float
    middle: float

    @property
    def direction(self) -> str:
        """``"held"``, ``"rose"`` or ``"fell"``."""
        if self.begin == self.end or abs(math.log(self._ratio)) < TURN:
            return "held"
        return "rose" if self.end > self.begin else "fell"

    def joined(self, following: Stretch) -> Stretch:
        """This stretch and the one after it as one."""
        longer = max(self, following, key=lambda part: part.last - part.first)
        return Stretch(self.first, following.last, self.begin, following.end, longer.middle)

    @property
    def _ratio(self) -> float:
        """End over begin, a tiny number where a rate is 0."""
        return max(self.end, 1e-300) / max(self.begin, 1e-300)

    def __str__(self) -> str:
        """Say what the rate did."""
        where = f"Iterations {self.first}–{self.last}: " if self.last > self.first else f"Iteration {self.first}: "
        if self.direction == "held":
            return f"{where}learning rate held near {self.middle:.3g}"
        return f"{where}learning rate {self.direction} from {self.begin:.3g} to {self.end:.3g}"


def stretches(recording: Recording) -> list[Stretch]:
    """Cut the run into stretches over which its learning rate rose, fell or was held; one begins with the decay."""
    rates, iterations = recording.rates, recording.iterations
    known = np.isfinite(rates) & (rates >= 0.0)
    rates, iterations = rates[known], iterations[known]
    decay = next((first for first, name in recording.phases if name == "annealed"), None)
    place = len(rates) if decay is None else int(np.searchsorted(iterations, decay))
    shortest = max(SHORTEST, len(rates) // 100)
    parts = (slice(None, place), slice(place, None))
    return [found for part in parts for found in _stretches(iterations[part], rates[part], shortest)]


def _stretches(iterations: np.ndarray, rates: np.ndarray, shortest: int) -> list[Stretch]:
    """Stretches of a part of a run; a shorter one in which the rate was held is a stair of others."""
    if not len(rates):
        return []
    smallest = rates[rates > 0.0].min() if (rates > 0.0).any() else 1.0
    heights = np.log(np.maximum(rates, smallest))
    outline = extremes(heights)
    corners = outline[_corners(heights[outline])]
    found: list[Stretch] = []
    for a, b in pairwise(corners):
        part = _stretch(iterations, rates, a, b)
        stair = part.direction == "held" and b - a < shortest
        if found and (stair or found[-1].direction == part.direction):
            found[-1] = found[-1].joined(part)
        else:
            found.append(part)
    if len(found) > 1 and found[0].direction == "held" and found[0].last - found[0].first < shortest:
        found[:2] = [found[0].joined(found[1])]
    return found or [_stretch(iterations, rates, 0, len(rates) - 1)]


def _stretch(iterations: np.ndarray, rates: np.ndarray, a: int, b: int) -> Stretch:
    """The measurements from place ``a`` to place ``b``."""
    middle = float(np.median(rates[a : b + 1]))
    return Stretch(int(iterations[a]), int(iterations[b]), float(rates[a]), float(rates[b]), middle)


def _corners(heights: np.ndarray) -> list[int]:
    """Corners of a line that follows a curve to within `TURN` (Ramer, Douglas and Peucker)."""
    corners, open_parts = {0, len(heights) - 1}, [(0, len(heights) - 1)]
    while open_parts:
        a, b = open_parts.pop()
        if b - a < 2:
            continue
        line = heights[a] + (heights[b] - heights[a]) * np.arange(b - a + 1) / (b - a)
        distance = np.abs(heights[a : b + 1] - line)
        far = a + int(distance.argmax())
        if distance.max() > TURN:
            corners.add(far)
            open_parts += [(a, far), (far, b)]
    return sorted(corners)


def told(recording: Recording) -> list[str]:
    """The story of a run, oldest first: what the rate did, what the scheduler said, what the guard did."""
    trials = _trials_of(recording)
    # What the rate does within trials is told by the notes.
    parts = [part for part in stretches(recording) if not trials[0] <= part.first < trials[1]]
    lines = [(part.first, 0, f"{part}.") for part in parts[:LONGEST]]
    if len(parts) > LONGEST:
        lines.append((parts[LONGEST].first, 0, f"... and {len(parts) - LONGEST} further turns of the learning rate."))
    lines += [(iteration, 1, f"Iteration {iteration}: {text}.") for iteration, text in recording.notes[:LONGEST]]
    lines += _of_guard(recording.events)
    lines.sort(key=lambda line: line[:2])  # those of one iteration and kind stay as they came
    story = [*_in_short(recording), *(text for _, _, text in lines)]
    if recording.dropped:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(recording.dropped.items()))
        story.append(f"Pairs of iterations without a measurement, when the file was begun: {counts}.")
    return story


def _trials_of(recording: Recording) -> tuple[float, float]:
    """First iteration of the trials of a search, and the first one after them."""
    begin = next((first for first, name in recording.phases if name == "trials"), math.inf)
    return begin, next((first for first, name in recording.phases if first > begin), math.inf)


def _in_short(recording: Recording) -> list[str]:
    """What became of the search, in a sentence; nothing where none was recorded."""
    begins = {name: first for first, name in reversed(recording.phases)}
    if "held" not in begins and "annealed" not in begins:
        return ["A learning rate is still being searched."] if recording.phases else []
    over = min(begins[name] for name in ("held", "annealed") if name in begins)
    rates, iterations = recording.rates, recording.iterations
    after = rates[iterations >= over]
    if not len(after):
        return []
    text = f"In short: the search took {over:,} iterations; then the rate was at most {np.nanmax(after):.3g}"
    if "annealed" in begins:
        text += f", and was annealed from iteration {begins['annealed']:,} on"
    return [f"{text}. It is {after[-1]:.3g} at iteration {iterations[-1]:,}."]


def _of_guard(events: Sequence[GuardEvent]) -> list[tuple[int, int, str]]:
    """What the guard did; of many batches that it skipped for one reason, and nothing more, the first and how many."""
    skipped: dict[str, list[int]] = {}
    lines, told = [], 0
    for event in events:
        if event.skipped and not event.restored and event.scale_factor == 1.0:
            alike = skipped.setdefault(event.reason, [])
            alike.append(event.iteration)
            if len(alike) > 1:
                continue
        told += 1
        if told <= LONGEST:
            lines.append((event.iteration, 2, _sentence(event)))
        else:
            lines[LONGEST:] = [(event.iteration, 2, f"... and {told - LONGEST} further events of the guard.")]
    for reason, iterations in skipped.items():
        others = iterations[1:]
        if others:
            first, last = others[0], others[-1]  # the same where batches are skipped in a row
            batches = "1 more batch was" if len(others) == 1 else f"{len(others):,} more batches were"
            where = f"Iteration {last}" if first == last else f"Iterations {first}–{last}"
            lines.append((first, 2, f"{where}: {batches} skipped, since {GuardReason(reason).explanation}."))
    return lines


def _sentence(event: GuardEvent) -> str:
    text = str(event)
    return f"{text[:1].upper()}{text[1:]}."
