"""Arithmetic of learning rates, one per param group; who writes them is `scheduler`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def peak_of(group: Mapping[str, Any]) -> float:
    """Highest rate that a schedule is going to ask for, as far as it has left word in the param group."""
    return max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))


def clamped(rates: Sequence[float], lowest: float, highest: float) -> list[float]:
    """Rates between two bounds with their ratios kept; ``highest`` wins, and 0 stays 0 beside others."""
    positive = [rate for rate in rates if rate > 0.0]
    if lowest > 0.0 and not positive:
        rates = [lowest] * len(rates)
    elif positive and min(positive) < lowest:
        rates = [rate * lowest / min(positive) for rate in rates]
    if max(rates) > highest:
        rates = [rate * highest / max(rates) for rate in rates]
    return list(rates)


def ratios(now: Sequence[float], before: Sequence[float]) -> list[float]:
    """By what each rate was multiplied since; infinite where it was 0 and is not."""
    return [
        new / old if old != 0.0 else (1.0 if new == old else math.inf) for new, old in zip(now, before, strict=True)
    ]


def taken_over(rates: Sequence[float], factors: Sequence[float], now: Sequence[float]) -> list[float]:
    """Rates after somebody's change by factors; where that is infinite, what stands for the rate ``now``."""
    return [
        rate * factor if math.isfinite(factor) else new for rate, factor, new in zip(rates, factors, now, strict=True)
    ]
