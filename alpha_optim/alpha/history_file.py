"""A measurement as one row of plain values, for files and state dicts; a row as a line with a checksum."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from typing import Any
from zlib import crc32

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import AlphaStatus, Information

FORMAT = "alpha_optim.history"
VERSION = 3
"""Lines have checksums since version 2, of those that have none nothing is asked; trials that were taken back stand in
lines of their own since version 3."""
NAMES = tuple(field.name for field in fields(AlphaMeasurement))
BAD = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading a line raises that is none of ours, however it was made."""
LARGEST = 1 << 53
"""Whole numbers up to here are floats as well, and are read alike by every reader of JSON."""
EVENT, NOTE = "event", "note"
"""Keys of the other lines that a file may hold: something the guard did, and something the scheduler said."""
ABANDONED = "abandoned"
"""Key of the trials that were taken back, first and last iterations; the last line that has it says all of them."""
CHECKSUM = "crc32"
"""Key of the CRC-32 of what stands before it in the line."""
_BEFORE = f', "{CHECKSUM}": '
_MARK = _BEFORE.encode()


def to_line(row: dict[str, Any]) -> str:
    """A row as JSON with its checksum, which tells when it is read again whether a bit has flipped."""
    text = json.dumps(row)[:-1]
    return f"{text}{_BEFORE}{crc32(text.encode())}}}\n"


def is_as_written(line: bytes, checksum: int | None) -> bool:
    """Whether a line stands byte for byte as it was written, or has no checksum to tell it by."""
    return checksum is None or crc32(line[: line.rfind(_MARK)]) == checksum


def from_line(line: bytes) -> dict[str, Any]:
    """The row again, without its checksum.

    Raises:
        ValueError: If the line is no JSON object, or its checksum is another; others if it is no text.
    """
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {row!r:.100}")
    written = row.pop(CHECKSUM, None)
    if not is_as_written(line, written) and crc32(json.dumps(row)[:-1].encode()) != written:  # else other spaces
        raise ValueError(f"it was changed since: its {CHECKSUM} does not fit; without that key it is read as it is")
    return row


def to_row(measurement: AlphaMeasurement) -> dict[str, Any]:
    """Return the fields as values that JSON knows: nan becomes null, infinities become strings."""
    row = asdict(measurement)
    row["status"], row["information"] = str(measurement.status), str(measurement.information)
    row["lr"] = [to_json(rate) for rate in measurement.lr]
    return {name: to_json(value) for name, value in row.items()}


def from_row(row: dict[str, Any]) -> AlphaMeasurement:
    """Build a measurement from a row.

    Args:
        row: What `to_row` returned, or plain values of the same names.

    Returns:
        The measurement.

    Raises:
        ValueError: If a field is missing, unknown or has no such value.
    """
    if set(row) != set(NAMES):
        odd = sorted(set(row) ^ set(NAMES))
        raise ValueError(f"fields missing or unknown: {', '.join(odd)}")
    rest = {name: _to_float(row[name], name) for name in NAMES if name not in _NOT_FLOAT}
    if not isinstance(row["lr"], (list, tuple)):
        raise ValueError(f"lr must be a list of numbers, got {row['lr']!r:.100}")
    return AlphaMeasurement(
        iteration=whole(row["iteration"], "iteration"),
        status=AlphaStatus(row["status"]),
        information=Information(row["information"]),
        samples_start=whole(row["samples_start"], "samples_start"),
        samples_end=whole(row["samples_end"], "samples_end"),
        lr=tuple(_to_float(rate, "lr") for rate in row["lr"]),
        **rest,
    )


_INFINITE = ("inf", "-inf")
_NOT_FLOAT = ("iteration", "status", "information", "samples_start", "samples_end", "lr")


def from_header(row: dict[str, Any]) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """What the first line of a file says: pairs that were not measured, by reason, and trials that were taken back.

    Raises:
        ValueError: If it is one of something else, or of a file that this version cannot read.
    """
    if row.get("format") != FORMAT:
        raise ValueError(f"the header must say format={FORMAT!r}, it says {row.get('format')!r}")
    if whole(row["version"], "version") > VERSION:
        raise ValueError(
            f"written by a newer alpha_optim (format version {row['version']}, "
            f"this one reads up to {VERSION}): update the package"
        )
    dropped = {str(reason): whole(count, "dropped") for reason, count in row.get("dropped", {}).items()}
    return dropped, spans(row)


def spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    """The trials that were taken back, as a line says.

    Raises:
        ValueError: If they are none.
    """
    return [(whole(first, ABANDONED), whole(last, ABANDONED)) for first, last in row.get(ABANDONED, ())]


def to_json(value: Any) -> Any:
    """A value that JSON knows: nan becomes None, an infinity a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def whole(value: Any, name: str) -> int:
    """A count as it was written.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r:.100}")
    return value


def _to_float(value: Any, name: str) -> float:
    """A number as `to_json` wrote it.

    Raises:
        ValueError: If it is none.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in _INFINITE):
        raise ValueError(f"{name} must be a number, got {value!r:.100}")
    return float(value)
