"""Fewer points that look the same: of every stretch of a curve its lowest and its highest value."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POINTS = 4000
"""More than a wide screen has columns, twice over."""


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
