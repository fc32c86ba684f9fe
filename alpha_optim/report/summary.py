"""A run in one row of a table."""

from __future__ import annotations

import numpy as np

from alpha_optim.report.recording import Recording

SUMMARY = ("measurements", "last iteration", "loss, last tenth", "α, last tenth", "last rate", "verdict")


def summary(recording: Recording) -> tuple[str, ...]:
    """A run in one row, under the headings of `SUMMARY`."""
    tenth = max(1, len(recording) // 10)
    losses = recording.losses[-tenth:]
    loss = f"{np.nanmean(losses):.4g}" if np.isfinite(losses).any() else "–"
    alpha, error = (values[-1] for values in recording.windowed(tenth))
    return (
        f"{len(recording):,}",
        f"{recording.iterations[-1]:,}",
        loss,
        f"{alpha:+.2f} ± {error:.2f}" if np.isfinite(alpha) else "–",
        f"{recording.rates[-1]:.3g}",
        recording.diagnosis().verdict,
    )
