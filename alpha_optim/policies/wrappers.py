"""Policies around a policy: bounds and warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.policies import base


class _Around:
    """Passes on what the policy inside is asked and told."""

    def __init__(self, policy: Any) -> None:
        """Wrap a policy.

        Raises:
            TypeError: If it is not callable.
        """
        base.check_policy(policy)
        self.policy: base.Policy = policy

    def envelope(self, iteration: int) -> float:
        """Return the inner envelope."""
        return base.envelope_of(self.policy, iteration)

    def wants(self, iteration: int) -> bool:
        """Ask the inner policy."""
        question = base.wants_of(self.policy)
        return True if question is None else question(iteration)

    def on_step(self, iteration: int, loss: float) -> float:
        """Tell the inner policy; return its factor."""
        return base.step_factor_of(self.policy, iteration, loss)

    def on_event(self, event: GuardEvent) -> None:
        """Tell the inner policy."""
        base.tell_event(self.policy, event)

    @property
    def decide(self) -> Callable[[int, float], base.Decision] | None:
        """What the inner policy decides, if it does: one that answers with factors is steered otherwise."""
        return self._decided if base.decides(self.policy) else None

    def _decided(self, iteration: int, given: float) -> base.Decision:
        return base.decision_of(self.policy, iteration, given)

    def limit(self, scale: float) -> None:
        """Tell the inner policy."""
        base.tell_limit(self.policy, scale)

    @property
    def story(self) -> tuple[tuple[int, str], ...]:
        """What the inner policy tells of its search."""
        story: tuple[tuple[int, str], ...] = getattr(self.policy, "story", ())
        return story

    @property
    def phases(self) -> tuple[tuple[int, str], ...]:
        """Iterations at which a phase of the inner policy's search began."""
        phases: tuple[tuple[int, str], ...] = getattr(self.policy, "phases", ())
        return phases

    @property
    def found_lr(self) -> float | None:
        """The learning rate that the inner policy's search ended with; None before, or without a search."""
        found: float | None = getattr(self.policy, "found_lr", None)
        return found

    def start_over(self, iteration: int) -> None:
        """Tell the policy inside."""
        base.start_over(self.policy, iteration)

    def cut_short(self, iteration: int) -> None:
        """Tell the inner policy."""
        base.cut_short(self.policy, iteration)

    def give_up(self, iteration: int) -> None:
        """Tell the inner policy."""
        base.give_up(self.policy, iteration)


class Bounded(_Around):
    """Keeps the accumulated factor of another policy between two bounds.

    Args:
        policy: The policy.
        lowest: Smallest product of all factors, > 0 and at most 1.
        highest: Largest product, at least 1.
    """

    def __init__(self, policy: base.Policy, lowest: float = 0.1, highest: float = 10.0) -> None:
        """Wrap a policy.

        Raises:
            TypeError: If ``policy`` is not callable.
            ValueError: If the bounds do not contain 1.
        """
        super().__init__(policy)
        if not 0.0 < lowest <= 1.0 <= highest:
            raise ValueError(
                f"the bounds must contain 1, where every run starts: 0 < lowest <= 1 <= highest, "
                f"got lowest={lowest}, highest={highest}"
            )
        self.lowest, self.highest = lowest, highest
        self._product = 1.0

    def __repr__(self) -> str:
        """Return the call that builds it."""
        return f"Bounded({base.shown(self.policy)}, {self.lowest}, {self.highest})"

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return the inner factor, cut so that the product stays within the bounds."""
        return self._cut(base.factor_of(self.policy, measurement))

    def on_step(self, iteration: int, loss: float) -> float:
        """Tell the inner policy; return its factor, cut in the same way."""
        return self._cut(base.step_factor_of(self.policy, iteration, loss))

    def _cut(self, wanted: float) -> float:
        """The part of a factor that keeps the product within the bounds."""
        if wanted == 1.0:
            return 1.0  # what the guard lowered is not for us to take back
        product = min(self.highest, max(self.lowest, self._product * wanted))
        factor, self._product = product / self._product, product
        return factor

    def _decided(self, iteration: int, given: float) -> base.Decision:
        """Ask the inner policy; a scale it decides on is kept within the bounds."""
        decision = super()._decided(iteration, given)
        if decision.scale is None:
            return decision
        return replace(decision, scale=min(self.highest, max(self.lowest, decision.scale)))

    def limit(self, scale: float) -> None:
        """Tell the inner policy, whose bound may be this one."""
        super().limit(min(self.highest, scale))

    def state_dict(self) -> dict[str, Any]:
        """Return the product and the inner state."""
        return {"product": self._product, "policy": base.state_of(self.policy)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._product = float(state["product"])
        base.restore(self.policy, state["policy"])


class WithWarmup(_Around):
    """Lets the rate of another policy grow linearly from 0 over the first steps.

    Args:
        policy: The policy.
        steps: Length of the warm-up in optimizer steps, at least 1.
    """

    def __init__(self, policy: base.Policy, steps: int) -> None:
        """Wrap a policy.

        Raises:
            TypeError: If ``policy`` is not callable.
            ValueError: If ``steps`` is no whole number of at least 1.
        """
        super().__init__(policy)
        self.steps = base.whole("steps", steps, 1)

    def __repr__(self) -> str:
        """Return the call that builds it."""
        return f"WithWarmup({base.shown(self.policy)}, {self.steps})"

    def __call__(self, measurement: AlphaMeasurement) -> float:
        """Return the inner factor once the warm-up is over, 1 before."""
        return self.policy(measurement) if measurement.iteration >= self.steps else 1.0

    def on_step(self, iteration: int, loss: float) -> float:
        """Tell the inner policy once the warm-up is over; return its factor, 1 before."""
        return base.step_factor_of(self.policy, iteration, loss) if iteration >= self.steps else 1.0

    def envelope(self, iteration: int) -> float:
        """Return the warm-up times the inner envelope."""
        return min(1.0, (iteration + 1) / self.steps) * base.envelope_of(self.policy, iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner state."""
        return {"policy": base.state_of(self.policy)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        base.restore(self.policy, state["policy"])
