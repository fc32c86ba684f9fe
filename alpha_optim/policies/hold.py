"""Leave the rate as it is."""

from __future__ import annotations

from alpha_optim.alpha.measurement import AlphaMeasurement


class Hold:
    """Never changes the scale: measurement and guard only.

    A constant rate is the simplest policy, so nothing else needs an ``if`` for it.
    """

    def __repr__(self) -> str:
        """Return the call that builds it."""
        return "Hold()"

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return 1."""
        return 1.0
