"""Samples -> mean and variance; the only place that knows N and N - 1."""

from __future__ import annotations

from torch import Tensor


def sample_variance(values: Tensor) -> Tensor | None:
    """Variance of one sample (ddof=1, centred), float64 ``[]``; None for fewer than two samples.

    Args:
        values: One number per sample ``[n]``.
    """
    if values.numel() < 2:
        return None
    # Centred first: mean of squares minus squared mean loses everything in float32.
    return values.double().var(correction=1)


def sample_mean(values: Tensor) -> Tensor:
    """Mean over samples, float64 ``[]``."""
    return values.double().mean()
