"""The scheduler and the guard of one wrapped optimizer: who is asked, who is told, and what is remembered of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.alpha.guard_log import GuardLog
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.measure.across_ranks import Report, Together
from alpha_optim.measure.step_ends import BatchLoss
from alpha_optim.observe.numbers import read
from alpha_optim.observe.step_direction import parameters_of
from alpha_optim.steer.guard import Guard, Judgement
from alpha_optim.steer.reminders import UNSCHEDULED

RESTS = 2
"""After so many executed steps without the scheduler's nothing is judged: somebody else has taken over."""
OTHERS = 3
"""After so many steps before which a backward pass went through two networks it is no accident."""


class Steering(Protocol):
    """What a scheduler answers and is told."""

    @property
    def policy(self) -> Any:
        """Its policy, for those who look; None if the scheduler is gone."""

    def wants(self, iteration: int) -> bool:
        """Whether the iteration is to be measured, where the optimizer has ``every=None``."""

    def guard_acted(self, event: GuardEvent) -> GuardEvent:
        """The guard did something; returns the event with what follows for the rates."""

    def not_stepped(self) -> None:
        """Several steps were made without the scheduler's."""

    def nothing_seen(self) -> None:
        """Steps are no longer seen from here on."""

    def meets_another_network(self) -> None:
        """Backward passes of one of two networks, which are trained apart, go through the other one."""

    def parameters_edited(self) -> None:
        """Somebody has changed the parameters while a rate is searched."""

    def group_comes(self) -> None:
        """A param group is about to be added."""

    def around_step(self) -> AbstractContextManager[None]:
        """Entered while the wrapped optimizer steps."""


class Supervision:
    """Whether a scheduler steers, and whether its guard judges; without them nothing happens here.

    Attributes:
        steering: The scheduler, if there is one.
        guard: Its guard, if it has one.
        events: What the guard did.
    """

    def __init__(self, model: nn.Module | None, optimizer: Optimizer) -> None:
        """Begin without a scheduler.

        Args:
            model: Model whose buffers are judged and kept together with the parameters.
            optimizer: The optimizer.
        """
        self._model, self._optimizer = model, optimizer
        self.steering: Steering | None = None
        self.guard: Guard | None = None
        self.events = GuardLog()
        self._scheduled_at: int | None = None  # iteration at which the scheduler was stepped last
        self._met = 0  # steps before which another network's backward pass came through
        self._saved_guard: dict[str, Any] | None = None  # of a run that goes on, until there is a guard

    # ---------------------------------------------------------------- the scheduler

    def steered(self, steering: Steering, guard: bool | str) -> None:
        """A scheduler takes over.

        Args:
            steering: The scheduler.
            guard: Whether points are judged; ``"cpu"``: and kept in the memory of the CPU.
        """
        self.steering = steering
        self.guard = self._new_guard(guard == "cpu") if guard else None

    def scheduler_stepped(self, iteration: int) -> None:
        """The scheduler was built or stepped."""
        self._scheduled_at = iteration

    def steps_alone(self, iteration: int) -> int:
        """How many steps were made since the scheduler's last; 0 without one."""
        return 0 if self._scheduled_at is None else iteration - self._scheduled_at

    def rests(self, iteration: int) -> bool:
        """Whether nobody steps the scheduler, so that nothing is judged."""
        return self.steps_alone(iteration) >= RESTS

    def step_made(self, iteration: int) -> None:
        """So many steps were made; a scheduler that was not stepped for long hears of it."""
        if self.guard is None:
            self._saved_guard = None  # its points are of a past that nobody has watched since
        if self.steering is None:
            self._scheduled_at = None
        elif self.steps_alone(iteration) == UNSCHEDULED + 1:
            self.steering.not_stepped()

    def nothing_seen(self) -> None:
        """Steps are no longer seen from here on."""
        if self.steering is not None:
            self.steering.nothing_seen()

    def meets_another_network(self) -> None:
        """Before this step another network's backward pass came through this one, or one of this through the other."""
        if self.steering is not None:
            self._met += 1
            if self._met == OTHERS:
                self.steering.meets_another_network()

    def parameters_edited(self) -> None:
        """Somebody has changed the parameters while a rate is searched."""
        if self.steering is not None:
            self.steering.parameters_edited()

    def group_comes(self) -> None:
        """A param group is about to be added."""
        if self.steering is not None:
            self.steering.group_comes()

    def around_step(self) -> AbstractContextManager[None]:
        """Entered while the wrapped optimizer steps."""
        return nullcontext() if self.steering is None else self.steering.around_step()

    # ---------------------------------------------------------------- the guard

    def judges(self, iteration: int) -> Guard | None:
        """The guard, unless there is none or it rests."""
        return None if self.rests(iteration) else self.guard

    def report(self, iteration: int, report: Report, lost: Sequence[Tensor]) -> Report:
        """Add to a report to other ranks what the guard is going to judge.

        Args:
            iteration: The iteration in progress.
            report: The report.
            lost: Losses of passes that came to no step.
        """
        guard = self.judges(iteration)
        if guard is None:
            return report
        broke = not all(map(math.isfinite, read(lost)))
        return guard.report(report, parameters_of(self._optimizer), broke)

    def judge_lost(self, iteration: int, losses: Sequence[Tensor], can_return: bool = True) -> list[GuardEvent]:
        """Judge passes that came to no step: a gradient scaler skips what is not finite, and a loss that is not counts.

        Args:
            iteration: The iteration in progress.
            losses: Their losses.
            can_return: Whether the point before can be put back, on every rank.

        Returns:
            What the guard did.
        """
        guard = self.judges(iteration)
        if guard is None or not losses:  # asked at every zero_grad
            return []
        params = parameters_of(self._optimizer)
        found = (guard.abandoned(iteration, read([loss])[0], params, can_return) for loss in losses)
        return [self._note(event) for event in found if event is not None]

    def judge(self, iteration: int, loss: BatchLoss, together: Together | None) -> Judgement:
        """Let the guard judge the point reached; without one the step is made.

        Args:
            iteration: The iteration whose step is about to be made.
            loss: Its loss.
            together: What all ranks have seen, if there are several.

        Raises:
            RuntimeError: If that is asked for inside a backward pass.
        """
        guard = self.guard
        if guard is None:
            return Judgement(None, True)
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "AlphaScheduler's guard cannot judge a step inside the backward pass (one optimizer per parameter, "
                "stepped by a gradient hook): a step taken back there would break autograd. Use "
                "AlphaScheduler(..., guard=False)."
            )
        if self.rests(iteration):
            guard.rest(iteration, loss if together is None else together.loss)
            return Judgement(None, True)
        event, used = guard.judge(iteration, loss, parameters_of(self._optimizer), together)
        return Judgement(None if event is None else self._note(event), used)

    def finish(self, iteration: int, loss: float | None, together: Together | None) -> GuardEvent | None:
        """Judge the point that the last step reached; see `AlphaScheduler.finish`."""
        if self.guard is None:
            return None
        event = self.guard.finish(iteration, loss, parameters_of(self._optimizer), together)
        return None if event is None else self._note(event)

    def _note(self, event: GuardEvent) -> GuardEvent:
        """Tell the scheduler of an event, and remember it."""
        event = event if self.steering is None else self.steering.guard_acted(event)
        self.events.append(event)
        return event

    # ---------------------------------------------------------------- resume

    def _new_guard(self, on_host: bool) -> Guard:
        """A guard that remembers what was saved, if anything was."""
        guard = Guard(self._model, self._optimizer, on_host)
        if self._saved_guard is not None:
            guard.load_state_dict(self._saved_guard, parameters_of(self._optimizer))
        return guard

    def state_dict(self, tensors: bool) -> dict[str, Any]:
        """Return everything as plain values and tensors.

        Args:
            tensors: Whether the guard's points, which are as large as the parameters, are in it.
        """
        guard = None
        if tensors:
            guard = self._saved_guard if self.guard is None else self.guard.state_dict()
        return {
            "guard": guard,
            "scheduled_at": self._scheduled_at,
            "events": self.events.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any] | None, iteration: int) -> None:
        """Take over a state; None forgets everything."""
        self._saved_guard, self.events, self._scheduled_at = None, GuardLog(), iteration
        if state is not None:
            self._saved_guard = state["guard"]
            self._scheduled_at = state.get("scheduled_at") or iteration  # of a run that nobody steered it knows none
            self.events.load_state_dict(state["events"])
        if self.guard is not None:
            self.guard = self._new_guard(self.guard.on_host)
