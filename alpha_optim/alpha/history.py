"""A bounded list of measurements: read it, average it, save it, follow it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from alpha_optim.alpha.history_file import (
    ABANDONED,
    BAD,
    EVENT,
    FORMAT,
    NAMES,
    NOTE,
    VERSION,
    from_header,
    from_line,
    from_row,
    spans,
    to_line,
    to_row,
)
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import DropReason
from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.alpha.window import WindowAlpha, window_alpha

if TYPE_CHECKING:
    import pandas

UNREAD = 4096
"""How many measurements may wait on the device; by then the first have long been computed."""


class Pending(Protocol):
    """A measurement whose numbers may still be on the device."""

    @property
    def iteration(self) -> int:
        """Iteration of the start."""

    def resolve(self, pairs: Sequence[Any]) -> list[AlphaMeasurement | DropReason]:
        """Fetch all of ``pairs``, and return each one's measurement or why it has to be dropped."""


class AlphaHistory(Sequence[AlphaMeasurement]):
    """Measurements of a run, oldest first.

    Numbers may wait on the device until somebody reads; every reading method fetches them first.

    Args:
        maxlen: How many measurements are kept; older ones make room and are counted.

    Examples:
        >>> history = AlphaHistory(maxlen=1000)
        >>> len(history), history.windowed(10).count
        (0, 0)
    """

    def __init__(self, maxlen: int = 100_000) -> None:
        """Start an empty history.

        Raises:
            ValueError: If ``maxlen`` is not a positive integer.
        """
        if isinstance(maxlen, bool) or not isinstance(maxlen, int) or maxlen < 1:
            raise ValueError(f"maxlen must be an integer of at least 1, got {maxlen!r}")
        self.maxlen = maxlen
        self._items: list[AlphaMeasurement] = []
        self._pending: list[Pending] = []
        self._dropped: dict[str, int] = {}
        self._callbacks: list[Callable[[AlphaMeasurement], None]] = []
        self.abandoned: list[tuple[int, int]] = []
        """First and last iteration of trials that were taken back as a whole; `windowed` leaves them out."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: the numbers; who follows this history does not follow its copy."""
        self._fetch()
        return {**self.__dict__, "_callbacks": []}

    # ---------------------------------------------------------------- writing

    def append(self, measurement: AlphaMeasurement | Pending) -> None:
        """Add a measurement, or one that still has to be fetched from the device."""
        if isinstance(measurement, AlphaMeasurement):
            self._fetch()
            self._store(measurement)
            return
        self._pending.append(measurement)
        if self._callbacks or len(self._pending) >= min(self.maxlen, UNREAD):
            self._fetch()

    def drop(self, reason: str, count: int = 1) -> None:
        """Count pairs that could not be measured."""
        key = str(reason)  # a plain string: state dicts load with weights_only=True
        self._dropped[key] = self._dropped.get(key, 0) + count

    def subscribe(self, callback: Callable[[AlphaMeasurement], None]) -> Callable[[], None]:
        """Call ``callback(measurement)`` for every new measurement; this reads it at once.

        Args:
            callback: Takes one `AlphaMeasurement`.

        Returns:
            A function that ends the subscription.
        """
        self._fetch()
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback) if callback in self._callbacks else None

    def _fetch(self, but: int = 0) -> None:
        """Fetch what waits on the device in one transfer, but for the newest few."""
        count = len(self._pending) - but
        if count <= 0:
            return
        pending, self._pending = self._pending[:count], self._pending[count:]
        for _, alike in groupby(pending, key=type):  # those before and after other processes came or went
            pairs = list(alike)
            for outcome in pairs[0].resolve(pairs):
                if isinstance(outcome, DropReason):
                    self.drop(outcome)
                else:
                    self._store(outcome)

    def up_to(self, iteration: int, after: int) -> list[AlphaMeasurement]:
        """Measurements of the iterations in ``(after, iteration]``, without fetching newer ones."""
        newer = 0
        while newer < len(self._pending) and self._pending[-1 - newer].iteration > iteration:
            newer += 1
        self._fetch(but=newer)
        found = []
        for measurement in reversed(self._items):
            if measurement.iteration <= after:
                break
            if measurement.iteration <= iteration:
                found.append(measurement)
        return found[::-1]

    def _store(self, measurement: AlphaMeasurement) -> None:
        self._items.append(measurement)
        # Trim in blocks: deleting from the front of a list costs its length.
        if len(self._items) >= self.maxlen + max(1, self.maxlen // 8):
            self._trim()
        for callback in tuple(self._callbacks):
            callback(measurement)

    def _trim(self) -> None:
        surplus = len(self._items) - self.maxlen
        if surplus > 0:
            del self._items[:surplus]
            self.drop(DropReason.EVICTED, surplus)

    # ---------------------------------------------------------------- reading

    def _read(self) -> list[AlphaMeasurement]:
        self._fetch()
        self._trim()
        return self._items

    @property
    def dropped(self) -> dict[str, int]:
        """Pairs that left no record, counted by reason (``"evicted"``: old ones that made room)."""
        self._read()
        return dict(self._dropped)

    def __len__(self) -> int:
        """Return the number of measurements kept."""
        return len(self._read())

    @overload
    def __getitem__(self, index: int) -> AlphaMeasurement: ...
    @overload
    def __getitem__(self, index: slice) -> list[AlphaMeasurement]: ...
    def __getitem__(self, index: int | slice) -> AlphaMeasurement | list[AlphaMeasurement]:
        """Return one measurement, or a list of them for a slice.

        Raises:
            IndexError: If there is none at that index.
        """
        items = self._read()
        if not items and not isinstance(index, slice):
            raise IndexError(
                "no alpha was measured yet: that of iteration n is there once step() of n + 1 was called; "
                f"pairs that could not be measured: {self._dropped}"
            )
        return items[index]

    def __iter__(self) -> Iterator[AlphaMeasurement]:
        """Iterate over the measurements, oldest first."""
        return iter(tuple(self._read()))

    def __repr__(self) -> str:
        """Say how much there is and what it says."""
        window = self.windowed(100)
        return f"AlphaHistory({len(self)} measurements, alpha over the last {window.count}: {window.alpha:.3f})"

    @property
    def alphas(self) -> NDArray[np.float64]:
        """Alpha of every measurement, float64 ``[K]``."""
        return np.array([item.alpha for item in self._read()], dtype=np.float64)

    @property
    def iterations(self) -> NDArray[np.int64]:
        """Iteration of every measurement, int64 ``[K]``."""
        return np.array([item.iteration for item in self._read()], dtype=np.int64)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return `alphas`, so that ``np.asarray(history)`` works."""
        return self.alphas if dtype is None else self.alphas.astype(dtype)

    def windowed(self, n: int) -> WindowAlpha:
        """Alpha over the last ``n`` measurements, as a ratio of averages.

        Single alphas are ratios with heavy tails; their mean says little. The window sums the
        fitted slopes times the step length at both ends and divides once. Concave steps enter with
        their fitted slopes, not with -1.

        Args:
            n: Length of the window in measurements, at least 1.

        Returns:
            ``(alpha, alpha_std, count)``; nan without usable measurements.

        Raises:
            ValueError: If ``n`` is less than 1.
        """
        if n < 1:
            raise ValueError(f"a window needs at least 1 measurement, got n={n}")
        return window_alpha(self.lasting(n))

    def lasting(self, n: int | None = None) -> list[AlphaMeasurement]:
        """Return the measurements of steps that a search did not take back, oldest first.

        Args:
            n: Only the last so many of them; None: all.
        """
        items = self._read()
        if not self.abandoned:
            return list(items) if n is None else items[-n:]
        found: list[AlphaMeasurement] = []
        for item in reversed(items):
            if n is not None and len(found) == n:
                break
            if not any(first <= item.iteration <= last for first, last in self.abandoned):
                found.append(item)
        return found[::-1]

    # ---------------------------------------------------------------- leaving

    def to_dict(self) -> dict[str, list[Any]]:
        """Return one list per field of `AlphaMeasurement`; plain values only."""
        items = self._read()
        columns: dict[str, list[Any]] = {name: [getattr(item, name) for item in items] for name in NAMES}
        for name in ("status", "information"):
            columns[name] = [str(code) for code in columns[name]]
        columns["lr"] = [list(rates) for rates in columns["lr"]]
        return columns

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a pandas data frame with one row per measurement (needs pandas)."""
        import pandas

        return pandas.DataFrame(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON lines: a header, then one measurement a line (nan as null), each with its checksum.

        A file may be continued by appending further such lines; those without a checksum are read as well.

        Args:
            path: File to write; replaced as a whole if it exists.
        """
        header = {"format": FORMAT, "version": VERSION, "dropped": self.dropped, ABANDONED: self.abandoned}
        rows = (to_row(item) for item in self._read())
        temporary = f"{os.fspath(path)}.part"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(map(to_line, chain([header], rows)))
            os.replace(temporary, path)
        except BaseException:  # a full disk, Ctrl-C: the file that was there stays, and nothing lies beside it
            if os.path.exists(temporary):
                os.remove(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], maxlen: int = 100_000) -> AlphaHistory:
        """Read a file that `save` wrote.

        Args:
            path: File to read.
            maxlen: Bound of the new history.

        Returns:
            The history.

        Raises:
            ValueError: If a line is not what `save` writes; the message names the line.
        """
        history = cls(maxlen)
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    history._load_line(from_line(line), first=number == 1)
                except BAD as error:  # noqa: PERF203 - names the line
                    raise ValueError(
                        f"{os.fspath(path)}, line {number}: not a line of an alpha history ({error}). "
                        "Expected a file written by AlphaHistory.save; if a run was killed while "
                        "writing, delete this line and load again."
                    ) from error
        if not history._items and not history._dropped and os.path.getsize(path) == 0:
            raise ValueError(f"{os.fspath(path)} is empty; expected a file written by AlphaHistory.save")
        return history

    def _load_line(self, row: dict[str, Any], first: bool) -> None:
        if "format" in row or first:
            dropped, abandoned = from_header(row)
            for reason, count in dropped.items():
                self.drop(reason, count)
            self.abandoned += abandoned
        elif ABANDONED in row:
            self.abandoned = spans(row)
        elif EVENT not in row and NOTE not in row:  # those are for reports
            self._store(from_row(row))

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain lists and numbers."""
        return {
            "columns": self.to_dict(),
            "dropped": self.dropped,
            "abandoned": to_plain(self.abandoned),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the contents by those of a `state_dict`; subscriptions stay."""
        columns = state["columns"]
        rows = zip(*(columns[name] for name in NAMES), strict=True)
        self._pending.clear()
        self._items = [from_row(dict(zip(NAMES, row, strict=True))) for row in rows]
        self._dropped = from_plain(dict[str, int], state["dropped"], "dropped")
        self.abandoned = from_plain(list[tuple[int, int]], state.get("abandoned", []), "abandoned")
