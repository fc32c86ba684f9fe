"""What a policy has not been told yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.states import Remembers
from alpha_optim.policies import base
from alpha_optim.steer.guard import KEPT, Guard


class News(
    Remembers, names={"progress": "seen_progress", "iteration": "seen_iteration", "_measured": "seen_measurement"}
):
    """Measurements and steps since the scheduler's last call.

    Attributes:
        progress: Steps made and calls not executed, at the last call.
        iteration: Steps made, at the last call.
    """

    progress: int
    iteration: int
    _measured: int  # the last measurement that was told, or is not going to be

    def __init__(self, progress: int, iteration: int) -> None:
        """What was before is no news."""
        self.progress, self.iteration, self._measured = progress, iteration, iteration - 1

    def tell(self, policy: base.Policy, history: AlphaHistory, iteration: int, guard: Guard | None, lag: int) -> float:
        """Tell a policy of them.

        Args:
            policy: The policy.
            history: The measurements.
            iteration: Steps made by now.
            guard: Reads the losses of all steps, if there is one.
            lag: So many of the newest measurements are not asked for yet.

        Returns:
            The product of its answers.
        """
        factor = 1.0
        for measurement in history.up_to(iteration - lag, after=self._measured):
            factor *= base.factor_of(policy, measurement)
            self._measured = measurement.iteration
        losses = {} if guard is None else guard.losses_read()
        for number in range(max(self.iteration, iteration - KEPT), iteration):
            factor *= base.step_factor_of(policy, number, losses.get(number, math.nan))
        return factor

    def resumed_at(self, iteration: int) -> None:
        """The run goes on from a state of an iteration that the scheduler was not there for: that is no news."""
        if self.iteration < iteration:
            self.iteration = iteration
            self.skip_to(iteration)

    def is_ahead_of(self, iteration: int) -> bool:
        """Whether steps were told of that the optimizer has not made; from here on its own count holds."""
        if self.iteration <= iteration:
            return False
        self.iteration, self._measured = iteration, iteration - 1
        return True

    def skip_to(self, iteration: int) -> None:
        """Never tell of what was measured so far."""
        self._measured = max(self._measured, iteration - 1)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; versions before had the iteration only."""
        super().load_state_dict({"seen_progress": state["seen_iteration"], **state})
