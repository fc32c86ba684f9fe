"""Where batches become much smaller than those of the search, the rate falls with them."""

from __future__ import annotations

import math

from alpha_optim.alpha.states import Remembers

SMALLER = math.log(4.0)
"""Batches count as smaller than those of the search from this log ratio of their numbers of samples on."""
LATEST = 0.2
"""Weight of the latest batch in the usual log number of samples: batches of mixed sizes have one usual size."""
PER_SAMPLES = 0.8
"""The log rate falls by this share of the log ratio: by half of it since the noise of a gradient grows with the root of
1 / N, and by 0.3 since the best rate lies so much further above that of the lowest loss (`loss_trace.room_above`)."""


class UsualBatch(Remembers):
    """The usual number of samples in a batch, now and when the rate was found."""

    _usual: float | None = None  # its log
    _usual_found: float = 0.0

    def saw(self, samples: int) -> None:
        """Take note of the number of samples in a batch, 0 if not known."""
        if samples > 0:
            last = math.log(samples) if self._usual is None else self._usual
            self._usual = (1.0 - LATEST) * last + LATEST * math.log(samples)

    def rate_found(self) -> None:
        """The rate was found with batches as they are now."""
        self._usual_found = self._usual or 0.0

    @property
    def too_small_by(self) -> float:
        """By how much the log rate has to lie below the one found."""
        smaller = 0.0 if self._usual is None else self._usual_found - self._usual
        return PER_SAMPLES * smaller if smaller > SMALLER else 0.0
