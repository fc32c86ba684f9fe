"""A file of a run, read for looking at: columns instead of records, and what else stands in it.

A run that is recorded while it trains (`alpha_optim.integrations.loggers.record`) leaves the lines that
`AlphaHistory.save` writes, and between them lines of what the guard did and of what the scheduler said. Only what
pictures need is kept, as numbers, so that a million measurements fit.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpha_optim.alpha.diagnosis import Diagnosis, diagnose
from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.history_file import (
    ABANDONED,
    BAD,
    CHECKSUM,
    EVENT,
    LARGEST,
    NAMES,
    NOTE,
    from_header,
    from_line,
    from_row,
    is_as_written,
    spans,
    whole,
)
from alpha_optim.alpha.records import AlphaStatus, GuardEvent
from alpha_optim.report.sampling import windowed_alpha

RECENT = 20_000
"""So many measurements are kept as records, for the diagnosis."""
BLOCK = 1 << 20
"""So many bytes are read at once: some thousand lines, few enough that an event makes few others be read singly."""
_NAMES = frozenset(NAMES)
_STATUSES = {str(status): place for place, status in enumerate(AlphaStatus)}
_DRAWN = ("alpha", "alpha_std", "loss_start", "step_length", "fitted_slope_start", "fitted_slope_end")
_INFINITE = {None: math.nan, "inf": math.inf, "-inf": -math.inf}


class BadFileError(ValueError):
    """A file that is not one of a run; says which line, and what to do."""


class Recording:
    """What a file says of a run.

    Attributes:
        name: The file's name.
        events: What the guard did, oldest first.
        notes: Pairs of an iteration and what the scheduler said then.
        phases: Pairs of an iteration and the phase of the search that began then.
        dropped: Pairs of iterations that were not measured, by reason.
        abandoned: First and last iterations of trials that were taken back.
        unfinished: Whether the last line is not complete, as while it is being written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Begin with nothing read.

        Args:
            path: The file.
        """
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        self._begin()

    def _begin(self) -> None:
        self._diagnosis: Diagnosis | None = None  # of what was read so far
        self.events: list[GuardEvent] = []
        self.notes: list[tuple[int, str]] = []
        self.phases: list[tuple[int, str]] = []
        self.dropped: dict[str, int] = {}
        self.abandoned: list[tuple[int, int]] = []
        self.unfinished = False
        self._columns = {name: array("d") for name in ("iteration", "alpha", "std", "loss", "rate", "start", "end")}
        self._status = array("b")
        self._recent: deque[tuple[int, Sequence[bytes]]] = deque()  # newest measurements: first line's number, lines
        self._recent_count = 0
        self._lines, self._offset, self._rest = 0, 0, b""
        self._inode: int | None = None  # of the file that was read

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a whole file.

        Args:
            path: The file.

        Returns:
            What it says.

        Raises:
            BadFileError: If it cannot be read, holds no measurement, or has a line that does not belong there.
        """
        recording = cls(path)
        recording.read_on()
        if not len(recording):
            raise BadFileError(
                f"{recording.path}: no measurement in it"
                + (" but an incomplete first line" if recording.unfinished else "")
                + ". Expected a file written by AlphaHistory.save or loggers.record."
            )
        return recording

    def read_on(self) -> bool:
        """Read what was added to the file since; from the beginning if it has become shorter, or is another file.

        Returns:
            Whether anything was added.

        Raises:
            BadFileError: If the file cannot be read, or has a line that does not belong there.
        """
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if found.st_size < self._offset or found.st_ino != (self._inode or found.st_ino):
                    self._begin()
                self._inode = found.st_ino
                file.seek(self._offset)
                added = False
                while lines := file.readlines(BLOCK):
                    whole = not self._rest and self._lines > 0 and lines[-1].endswith(b"\n")
                    if whole and self._take_measurements(lines):
                        self._offset += sum(map(len, lines))
                        added = True
                        continue
                    for line in lines:
                        self._offset += len(line)
                        added |= self._take(line)
                return added
        except OSError as error:
            raise BadFileError(f"{self.path}: {error.strerror or error}") from error

    def _take_measurements(self, lines: list[bytes]) -> bool:
        """Take many lines at once if all of them are measurements; else none, and False."""
        if b"\n" in lines:  # the count of rows would not tell that there are two in another line
            return False
        try:
            rows = _decoder()(b"".join(lines))
            if len(rows) != len(lines) or not all(map(is_as_written, lines, (row.crc32 for row in rows))):
                return False
            self._add(rows, lines, self._lines + 1)
        except BAD:
            return False  # one by one they tell which line it is
        self._lines += len(rows)
        self._diagnosis, self.unfinished = None, False
        return True

    def _take(self, piece: bytes) -> bool:
        """Take a line, or the piece of one that stands at the end of the file.

        Raises:
            BadFileError: If it does not belong there.
        """
        line, self._rest = self._rest + piece, b""
        self.unfinished = not line.endswith(b"\n")
        if self.unfinished:
            self._rest = line
            return False
        self._lines, self._diagnosis = self._lines + 1, None
        if not line.strip():
            return False
        try:
            self._take_row(from_line(line), line)
        except BAD as error:
            raise self._bad(self._lines, error) from error
        return True

    def _take_row(self, row: dict[str, Any], line: bytes) -> None:
        """Take what a line says.

        Raises:
            ValueError: If it is not a header, a measurement, an event or a note.
        """
        if row.keys() == _NAMES:
            if self._lines == 1:
                raise ValueError("the header is missing")
            self._add([SimpleNamespace(**row)], [line], self._lines)
        elif self._lines == 1 or "format" in row:
            dropped, abandoned = from_header(row)
            for reason, count in dropped.items():
                self.dropped[reason] = self.dropped.get(reason, 0) + count
            self.abandoned += abandoned
        elif ABANDONED in row:
            self.abandoned = spans(row)
        elif EVENT in row:
            self.events.append(_event(row[EVENT]))
        elif NOTE in row:
            note = row[NOTE]
            told = self.phases if "phase" in note else self.notes
            told.append((whole(note["iteration"], "a note's iteration"), str(note.get("phase", note["text"]))))
        else:
            raise ValueError(f"fields missing or unknown: {', '.join(sorted(_NAMES ^ row.keys()))}")

    def _add(self, rows: Sequence[Any], lines: Sequence[bytes], first: int) -> None:
        """Take what pictures need of measurements, column by column: this is done a million times.

        Args:
            rows: The measurements, with their fields as attributes.
            lines: The same as they stand in the file.
            first: The number of the first line.

        Raises:
            ValueError: If an iteration is none; others if another value is none.
        """
        iterations = [row.iteration for row in rows]
        if set(map(type, iterations)) != {int} or not 0 <= min(iterations) <= max(iterations) < LARGEST:
            for value in iterations:
                whole(value, "iteration")
        status = array("b", [_STATUSES[row.status] for row in rows])
        rate = _numbers([row.lr[0] if row.lr else math.nan for row in rows])
        alpha, std, loss, length, start, end = (_numbers(list(map(attrgetter(name), rows))) for name in _DRAWN)
        with np.errstate(invalid="ignore", over="ignore"):
            start, end = (array("d", (np.asarray(slope) * np.asarray(length)).tobytes()) for slope in (start, end))
        found = {"iteration": array("d", map(float, iterations)), "alpha": alpha, "std": std, "loss": loss}
        for name, values in (found | {"rate": rate, "start": start, "end": end}).items():
            self._columns[name].extend(values)
        self._status.extend(status)
        self._recent.append((first, lines))
        self._recent_count += len(lines)
        while self._recent_count - len(self._recent[0][1]) >= RECENT:
            self._recent_count -= len(self._recent.popleft()[1])

    @property
    def at_its_end(self) -> bool:
        """Whether nothing stands in the file behind what was read, the line that was refused last among it."""
        return os.path.getsize(self.path) <= self._offset

    # ---------------------------------------------------------------- reading

    def __len__(self) -> int:
        """Return the number of measurements."""
        return len(self._status)

    def _column(self, name: str) -> NDArray[np.float64]:
        return np.array(self._columns[name], dtype=np.float64)

    @property
    def iterations(self) -> NDArray[np.int64]:
        """Iteration of every measurement, int64 ``[K]``."""
        return self._column("iteration").astype(np.int64)

    @property
    def alphas(self) -> NDArray[np.float64]:
        """Alpha of every measurement, a pure number, float64 ``[K]``."""
        return self._column("alpha")

    @property
    def stds(self) -> NDArray[np.float64]:
        """Its standard error, float64 ``[K]``."""
        return self._column("std")

    @property
    def losses(self) -> NDArray[np.float64]:
        """Mini-batch loss at the start of the step, float64 ``[K]``; nan where not observed."""
        return self._column("loss")

    @property
    def rates(self) -> NDArray[np.float64]:
        """Learning rate of the first param group, float64 ``[K]``."""
        return self._column("rate")

    @property
    def statuses(self) -> list[str]:
        """Status of every measurement."""
        names = [str(status) for status in AlphaStatus]
        return [names[place] for place in self._status]

    def windowed(self, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Alpha over the last ``size`` measurements at every measurement, as a ratio of sums, and its standard error.

        Args:
            size: Length of the window, at least 1.
        """
        return windowed_alpha(self._column("start"), self._column("end"), size)

    def diagnosis(self) -> Diagnosis:
        """What alpha says at the end of the run.

        Raises:
            BadFileError: If a line has a value that is none of a measurement.
        """
        if self._diagnosis is not None:
            return self._diagnosis
        history, number = AlphaHistory(maxlen=RECENT), 0
        history.abandoned = self.abandoned
        try:
            for first, lines in self._recent:
                for number, line in enumerate(lines, start=first):  # noqa: B007 - the message names it
                    history.append(from_row(from_line(line)))
            self._diagnosis = diagnose(history, self.events)
        except BAD as error:
            raise self._bad(number, error) from error
        return self._diagnosis

    def _bad(self, line: int, error: Exception) -> BadFileError:
        return BadFileError(
            f"{self.path}, line {line}: not a line of an alpha history ({_short(error)}). Expected a file "
            "written by AlphaHistory.save or loggers.record; if a run was killed while writing, delete this line."
        )


@lru_cache(maxsize=1)
def _decoder() -> Callable[[bytes], Sequence[Any]]:
    """Reads many lines of measurements at once; with msgspec five times as fast as without.

    What it returns raises one of `BAD` where a line is something else.
    """
    try:
        import msgspec
    except ImportError:
        return _decoded
    number = float | str | None
    read = {"iteration": int, "status": str, "lr": list[number], **dict.fromkeys(_DRAWN, number)}
    fields: list[tuple[Any, ...]] = [(name, read.get(name, msgspec.Raw)) for name in NAMES]
    # Millions of them hold no references to each other: the collector need not look at them.
    fields.append((CHECKSUM, int | None, None))
    row = msgspec.defstruct("Row", fields, forbid_unknown_fields=True, gc=False)
    return msgspec.json.Decoder(row).decode_lines


def _decoded(block: bytes) -> Sequence[Any]:
    """Measurements, with their fields as attributes.

    Raises:
        ValueError: If there is something else in between.
    """
    rows = [{CHECKSUM: None, **json.loads(line)} for line in block.splitlines()]
    if any(row.keys() - {CHECKSUM} != _NAMES for row in rows):
        raise ValueError("not only measurements")
    return [SimpleNamespace(**row) for row in rows]


def _numbers(values: list[Any]) -> array[float]:
    """Values as `history_file.to_row` wrote them.

    Raises:
        TypeError: If one is not.
    """
    return array("d", values if set(map(type, values)) == {float} else map(_number, values))


def _number(value: Any) -> Any:
    """A value as `history_file.to_row` wrote it."""
    if value is None or isinstance(value, str):
        return _INFINITE.get(value, value)
    return value if isinstance(value, bool) else float(value)


def _event(row: dict[str, Any]) -> GuardEvent:
    """Build an event from a row.

    Raises:
        ValueError: If a value is none of an event.
    """
    numbers, answers = ("loss_before", "loss_after", "scale_factor"), ("restored", "skipped")
    event = {name: _number(value) if name in numbers else value for name, value in row.items()}
    whole(event["iteration"], "an event's iteration")
    for name, kind in (*((name, float) for name in numbers), *((name, bool) for name in answers)):
        if name in event and type(event[name]) is not kind:
            raise ValueError(f"an event's {name} must be a {kind.__name__}, got {event[name]!r}")
    return GuardEvent(**event)


def _short(error: Exception) -> str:
    """The error, without what it quotes at length."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."


def read_all(paths: list[str]) -> Iterator[Recording]:
    """Read several files, each under a name of its own."""
    names = [os.path.basename(path) for path in paths]
    for path in paths:
        recording = Recording.read(path)
        if names.count(recording.name) > 1:
            recording.name = path
        yield recording
