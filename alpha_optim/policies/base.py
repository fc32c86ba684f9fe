"""What a policy is: any callable that turns a measurement into a factor.

A plain function is a policy. The optional methods are looked for by name, so nothing has to be
inherited:

- ``envelope(iteration) -> float >= 0``: multiplied in at every step (warm-up, annealing; may be 0).
- ``wants(iteration) -> bool``: whether to measure, asked when the optimizer has ``every=None``.
- ``on_step(iteration, loss) -> float | None``: told of every step that was made, measured or not, with the mini-batch
  loss it was made from as the guard read it (nan without); returns a further factor for the scale, if it has one.
- ``on_event(event)``: told of what the guard did: a step taken back, a batch skipped, a level accepted.
- ``decide(iteration, given) -> Decision``: asked once per scheduler step, after everything above: a policy that
  searches says there what the scale is, and which points to keep and to go back to. ``given`` is the rate of the first
  param group at scale 1.
- ``limit(scale)``: told before `decide`, of policies that have that, how high the scale may become.
- ``give_up(iteration)``: told that the search cannot go on, or that its points are gone: the rate given is to be kept.
- ``start_over(iteration)``: told during a search that somebody has changed the parameters; its points are gone.
- ``cut_short(iteration)``: told that the run is about to end while the search goes on: what was found so far is used.
- ``state_dict() / load_state_dict(state)``: what it remembers, as plain values.

For those who look: ``story`` (pairs of an iteration and what was seen and done then), ``phases`` (pairs of an iteration
and the name of the phase that began) and ``found_lr`` (the learning rate that a search ended with, None before).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent

Place = Literal["start", "best"]
"""The two points that a search may keep: where its trials begin, and where the best of them ended."""


@dataclass(frozen=True)
class Decision:
    """What a policy that searches decides for the coming step.

    Attributes:
        scale: What the scheduled rates are multiplied by, beside the envelope; None: the product of all factors. It is
            not cut at a bound, only the rates that follow from it are.
        keep: Where to keep the point reached, a copy of parameters, buffers and optimizer state; None: nowhere.
        restore: The point to go on from; None: the one reached.
        trial: Whether the coming step belongs to a trial, which the guard ends instead of lowering the rate.
        searching: Whether the rate is still looked for: the peak of a schedule stands in for what it says, and hooks
            for accepted points sleep.
    """

    scale: float | None = None
    keep: Place | None = None
    restore: Place | None = None
    trial: bool = False
    searching: bool = False


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
    """Tell a policy of a step and its loss, nan if not known; return its factor, 1 if it has none or does not listen.

    Raises:
        ValueError: If it is not a finite number > 0.
    """
    answer = _asked(policy, "on_step", None, iteration, loss)
    return 1.0 if answer is None else _checked(policy, answer, iteration)


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


def check_policy(policy: Any) -> None:
    """Refuse what is no policy, a class of policies too.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(policy, type):
        name = policy.__name__
        raise TypeError(
            f"a policy must be callable (measurement -> factor), got the class {name}; give an instance, {name}(...)"
        )
    if not callable(policy):
        raise TypeError(f"a policy must be callable (measurement -> factor), got {type(policy).__name__}")


def whole(name: str, value: Any, least: int) -> int:
    """An argument that has to be a whole number, of NumPy's too.

    Raises:
        ValueError: If it is none, or less than ``least``.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return operator.index(value)


def shown(policy: Any) -> str:
    """A policy as text: what it says of itself, or its name where that would be an address in memory."""
    text = repr(policy)
    return name_of(policy) if " at 0x" in text else text


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


def decision_of(policy: Any, iteration: int, given: float = 1.0) -> Decision:
    """Ask a policy what it decides; nothing for one that does not search.

    Args:
        policy: The policy.
        iteration: The coming iteration.
        given: Learning rate of the first param group at scale 1.

    Raises:
        TypeError: If the answer is not a `Decision`.
        ValueError: If the scale is not a finite number > 0.
    """
    decision = _asked(policy, "decide", Decision(), iteration, given)
    if not isinstance(decision, Decision):
        raise TypeError(
            f"policy {name_of(policy)} decided {decision!r}; expected an alpha_optim.policies.base.Decision"
        )
    if decision.scale is not None and not 0.0 < decision.scale < math.inf:
        raise ValueError(
            f"policy {name_of(policy)} decided on a scale of {decision.scale!r}; expected a finite number > 0"
        )
    return decision


def tell_limit(policy: Any, scale: float) -> None:
    """Tell a policy that decides on the scale how high it may become, if it listens."""
    if decides(policy) and callable(getattr(policy, "limit", None)):
        policy.limit(scale)


def decides(policy: Any) -> bool:
    """Whether a policy decides on the scale itself."""
    return callable(getattr(policy, "decide", None))


def state_of(policy: Any) -> dict[str, Any]:
    """Return what a policy remembers; empty for one that remembers nothing."""
    state: dict[str, Any] = _asked(policy, "state_dict", {})
    return state


def restore(policy: Any, state: dict[str, Any]) -> None:
    """Give a policy back what it remembered."""
    _asked(policy, "load_state_dict", None, state)


def cut_short(policy: Any, iteration: int) -> None:
    """Tell a policy to end its search with what was found so far, if it listens."""
    _asked(policy, "cut_short", None, iteration)


def start_over(policy: Any, iteration: int) -> None:
    """Tell a policy to begin its search anew, from parameters that somebody has changed, if it listens."""
    _asked(policy, "start_over", None, iteration)


def give_up(policy: Any, iteration: int) -> None:
    """Tell a policy to end its search and keep the rate given, if it listens."""
    _asked(policy, "give_up", None, iteration)
