"""Curves made readable: fewer points that look the same, and windows over the last values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POINTS = 4000
"""More than a wide screen has columns, twice over."""
SHORT = 64
"""Longer windows are summed in another way."""


def extremes(values: NDArray[np.float64], points: int = POINTS) -> NDArray[np.int64]:
    """Choose places of a curve that keep its outline.

    Args:
        values: The curve; nan where there is none.
        points: About how many places may be left.

    Returns:
        Indices, ascending; all of them if there are no more than ``points``. First and last are among them.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    buckets = points // 2
    edges = np.linspace(0, count, buckets + 1).astype(np.int64)
    width = int(np.diff(edges).max())
    places = np.minimum(edges[:-1, None] + np.arange(width)[None, :], edges[1:, None] - 1)
    block = values[places]
    low = np.where(np.isnan(block), np.inf, block).argmin(axis=1)
    high = np.where(np.isnan(block), -np.inf, block).argmax(axis=1)
    rows = np.arange(buckets)
    chosen = np.concatenate([places[rows, low], places[rows, high], [0, count - 1]])
    return np.unique(chosen)


def trailing_sums(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Sums of the last ``size`` values at every place, fewer at the beginning; nothing outside of a window enters.

    Short windows are summed one by one. A long one is the end of one block of ``size`` values and the beginning of the
    next (van Herk's way with maxima).
    """
    size = min(size, len(values))
    if size <= SHORT:
        padded = np.concatenate([np.zeros(size - 1), values])
        sums: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(padded, size).sum(axis=1)
        return sums
    count = len(values)
    blocks = np.concatenate([values, np.zeros(-count % size)]).reshape(-1, size)
    heads = np.cumsum(blocks, axis=1).ravel()
    tails = np.cumsum(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    begins = np.arange(count) - size + 1
    trailing: NDArray[np.float64] = heads[:count].copy()
    split = (begins > 0) & (begins % size != 0)
    trailing[split] += tails[begins[split]]
    return trailing


def trailing_mean(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Mean of those of the last ``size`` values that are finite, at every place; nan where none is."""
    known = np.isfinite(values)
    sums = trailing_sums(np.where(known, values, 0.0), size)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: NDArray[np.float64] = sums / trailing_sums(known.astype(np.float64), size)
    return mean


def windowed_alpha(
    start: NDArray[np.float64], end: NDArray[np.float64], size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Alpha over the last ``size`` measurements at every measurement, as a ratio of sums, and its standard error.

    The same as `alpha_optim.alpha.window.window_alpha` of each, for all at once; the error of one measurement is nan.

    Args:
        start: Fitted slopes at the start of steps, times their lengths ``[K]``.
        end: The same at their ends ``[K]``.
        size: Length of the window, at least 1.
    """
    usable = np.isfinite(start) & np.isfinite(end)
    start, end = np.where(usable, start, 0.0), np.where(usable, end, 0.0)
    total, ends, count = (
        trailing_sums(start, size),
        trailing_sums(end, size),
        trailing_sums(usable.astype(float), size),
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = -ends / total
        squares = (
            trailing_sums(end * end, size)
            + 2 * alpha * trailing_sums(start * end, size)
            + alpha**2 * trailing_sums(start * start, size)
        )
        error = np.sqrt(np.maximum(squares, 0.0) * count / (count - 1)) / np.abs(total)
    none = (count == 0) | ~np.isfinite(alpha)
    return np.where(none, np.nan, alpha), np.where(none | (count < 2), np.nan, error)
