"""What a policy is: any callable that turns a measurement into a factor.

A plain function is a policy. The optional methods are looked for by name, so nothing has to be
inherited:

- ``envelope(iteration) -> float >= 0``: multiplied in at every step (warm-up, annealing; may be 0).
- ``wants(iteration) -> bool``: whether to measure, asked when the optimizer has ``every=None``.
- ``on_step(iteration, loss) -> float``: told of every step that was made, measured or not, with the mini-batch
  loss it was made from as the guard read it (nan without); returns a further factor for the scale.
- ``on_event(event)``: told when the guard took a step back.
- ``wants_return() -> bool``: asked once per scheduler step; True: back to the best point (needs a guard).
- ``trusts_point() -> bool``: asked once per scheduler step; False: what is reached does not become the best
  point, however low the loss.
- ``searches(iteration) -> bool``: whether the policy looks for the peak of the rates now, so that a schedule's
  warm-up must not come in between.
- ``give_up(iteration) -> float``: told that the search cannot go on; keeps the rate given, returns the factor for it.
- ``keeps_scale``: true if the policy keeps count of the scale it has asked for. Such a scale is not cut at a
  bound, only the rates that follow from it; any other could wind up against the bound.
- ``state_dict() / load_state_dict(state)``: what it remembers, as plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent


class Policy(Protocol):
    """The one method every policy has."""

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return the factor for the learning rate's scale; finite and > 0, 1 leaves it.

        Called once per new measurement, in order.
        """


def factor_of(policy: Policy, measurement: AlphaMeasurement) -> float:
    """Ask a policy for its factor.

    Raises:
        ValueError: If it is not a finite number > 0.
    """
    return _checked(policy, policy(measurement), measurement.iteration)


def step_factor_of(policy: Policy, iteration: int, loss: float) -> float:
    """Tell a policy of a step and its loss, nan if not known; return its factor, 1 if it does not listen.

    Raises:
        ValueError: If it is not a finite number > 0.
    """
    return _checked(policy, _asked(policy, "on_step", 1.0, iteration, loss), iteration)


def _checked(policy: Policy, answer: Any, iteration: int) -> float:
    """A policy's answer as a factor.

    Raises:
        ValueError: If it is not a finite number > 0.
    """
    try:
        factor = math.nan if isinstance(answer, (str, bytes)) else float(answer)
    except (TypeError, ValueError):
        factor = math.nan
    if not (math.isfinite(factor) and factor > 0.0):
        raise ValueError(
            f"policy {name_of(policy)} returned {answer!r} for iteration {iteration}; expected a "
            "finite factor > 0 for the learning rate's scale (1 leaves it as it is)"
        )
    return factor


def name_of(policy: Any) -> str:
    """Name of a policy: of its class, or of the function it is."""
    return str(getattr(policy, "__name__", type(policy).__name__))


def _asked(policy: Any, name: str, otherwise: Any, *args: Any) -> Any:
    """What an optional method of a policy answers; ``otherwise`` if it has none."""
    method = getattr(policy, name, None)
    return otherwise if method is None else method(*args)


def envelope_of(policy: Any, iteration: int) -> float:
    """Ask a policy for its envelope at an iteration; 1 if it has none."""
    return float(_asked(policy, "envelope", 1.0, iteration))


def wants_of(policy: Any) -> Callable[[int], bool] | None:
    """Return the question whether to measure an iteration, or None."""
    return getattr(policy, "wants", None)


def tell_event(policy: Any, event: GuardEvent) -> None:
    """Tell a policy what the guard did, if it listens."""
    _asked(policy, "on_event", None, event)


def return_wanted_by(policy: Any) -> bool:
    """Ask a policy whether to go back to the best point; False if it never does."""
    return bool(_asked(policy, "wants_return", False))


def point_trusted_by(policy: Any) -> bool:
    """Ask a policy whether the points reached may become the best one; True unless it objects."""
    return bool(_asked(policy, "trusts_point", True))


def searches(policy: Any, iteration: int) -> bool:
    """Ask a policy whether it is looking for the peak of the rates; False unless it says so."""
    return bool(_asked(policy, "searches", False, iteration))


def keeps_scale(policy: Any) -> bool:
    """Whether a policy keeps count of the scale it has asked for."""
    return bool(getattr(policy, "keeps_scale", False))


def state_of(policy: Any) -> dict[str, Any]:
    """Return what a policy remembers; empty for one that remembers nothing."""
    state: dict[str, Any] = _asked(policy, "state_dict", {})
    return state


def restore(policy: Any, state: dict[str, Any]) -> None:
    """Give a policy back what it remembered."""
    _asked(policy, "load_state_dict", None, state)


def keeps_best_point(policy: Any) -> bool:
    """Whether a policy that never says when it searches may ask to go back to the best point at any time."""
    inner = getattr(policy, "policy", None)
    if callable(inner):
        return keeps_best_point(inner)
    return hasattr(policy, "wants_return") and not hasattr(policy, "searches")


def given_up(policy: Any, iteration: int) -> float:
    """Tell a policy to end its search and keep the rate given; return its factor, 1 if it does not listen."""
    return _checked(policy, _asked(policy, "give_up", 1.0, iteration), iteration)
