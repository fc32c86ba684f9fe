"""What happens around one optimizer step, in order.

All mutable state of a wrapped optimizer lives in one `Session`, so that proxies of the optimizer
(Lightning, Accelerate) share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.records import DropReason, GuardEvent
from alpha_optim.measure.pairing import Entry, Pairing
from alpha_optim.measure.plan import Plan
from alpha_optim.observe.checks import check_losses
from alpha_optim.observe.step_direction import parameters_of, rates_of
from alpha_optim.steer.guard import Guard
from alpha_optim.steer.reminders import Reminders

VERSION = 2


class SkipStepSignal(Exception):  # noqa: N818 - a signal, not an error
    """Raised out of a closure to keep the wrapped optimizer from stepping."""


class Session:
    """State of one wrapped optimizer, and the order of events around its step."""

    def __init__(self, plan: Plan) -> None:
        """Hook iteration 0.

        Args:
            plan: What is measured of which optimizer, and how.
        """
        self.plan, self.optimizer = plan, plan.optimizer
        self.history = AlphaHistory()
        self.iteration = 0
        self.active = True
        self.guard: Guard | None = None
        self.events: list[GuardEvent] = []
        self.reminders = Reminders(plan.loss_fn)
        self._on_event: Callable[[GuardEvent], GuardEvent] | None = None
        self._saved_guard: dict[str, Any] | None = None
        # Optimizers that fill their state at the first step do so again when it is empty.
        self._lazy_state = not self.optimizer.state
        self._reset()
        self.begin()

    def _reset(self) -> None:
        """Forget the iteration in progress and the pending step."""
        plan = self.plan
        self.pairing = Pairing(plan.model, plan.loss_fn, plan.sample_dim, plan.variance == "sampled")
        plan.forget_backends()

    # ---------------------------------------------------------------- between steps

    def begin(self) -> None:
        """Hook what the coming iteration needs."""
        if not self.active:
            return
        self._start = self.plan.wants(self.iteration)
        in_pair = self._start or self.pairing.pending is not None
        backend = self.plan.backend() if in_pair else None
        self.pairing.begin(self.optimizer, backend, self.iteration, self._start, self.guard is not None)

    def steered(
        self, wants: Callable[[int], bool] | None, guard: bool, on_event: Callable[[GuardEvent], GuardEvent]
    ) -> None:
        """A scheduler takes over: it is asked what to measure and told what the guard did."""
        self.reminders.scheduler_stepped(self.iteration)
        self._on_event = on_event
        self.plan.ask_policy(wants)
        self.guard = self._new_guard() if guard else None
        self.begin()

    def _new_guard(self) -> Guard:
        """A guard that remembers what was saved, if anything was."""
        guard = Guard(self.plan.model)
        if self._saved_guard is not None:
            guard.load_state_dict(self._saved_guard, parameters_of(self.optimizer))
        return guard

    def check_unsteered(self) -> None:
        """Refuse a second scheduler.

        Raises:
            ValueError: If there is one.
        """
        if self._on_event is not None:
            raise ValueError(
                "this optimizer already has an AlphaScheduler, and only one can set its rates; combine "
                "policies with Bounded and WithWarmup, and schedules with schedule="
            )

    def detach(self) -> None:
        """Remove every hook; from here on the wrapped optimizer steps alone."""
        self.pairing.close()
        self.pairing.pending = None
        self.active = False

    def gradients_cleared(self, in_place: bool) -> None:
        """``zero_grad`` was called; whether gradients are overwritten."""
        if self.active and not self.pairing.iteration.in_step:
            if in_place:
                self.pairing.gradients_overwritten()
            self.pairing.iteration.passes.discard()

    # ---------------------------------------------------------------- losses handed over

    def backward(self, losses: Tensor) -> Tensor:
        """Run the backward pass of the mean of ``losses``; see `AlphaGuided.backward`."""
        check_losses(losses, "backward", self.pairing.iteration.passes.forwards, graph=True)
        mean = losses.mean()
        if self.active:
            self.pairing.losses.announce(losses, mean)
        mean.backward()
        return mean.detach()

    def record_losses(self, losses: Tensor) -> None:
        """Take note of losses; see `AlphaGuided.record_losses`."""
        check_losses(losses, "record_losses", self.pairing.iteration.passes.forwards, graph=False)
        if self.active:
            self.pairing.iteration.passes.recorded.append(self.pairing.losses.hand_over(losses))

    # ---------------------------------------------------------------- the step

    # Inside a compiled function this runs as it is; what should be compiled is the wrapped optimizer's step.
    @torch._disable_dynamo  # type: ignore[attr-defined] # - as torch marks its own optimizers
    def step(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Measure, guard, step; see `AlphaGuided.step`."""
        if not self.active:
            self.iteration += 1
            return self.optimizer.step(**_with(closure, kwargs))
        if self.pairing.iteration.idle:
            result = self.optimizer.step(**_with(closure, kwargs))
            self.iteration += 1
            self.reminders.after_step(self.iteration, measured=False, saw_loss=False)
            self.begin()
            return result
        try:
            if closure is None:
                self._before_step(None)
            inner = None if closure is None else self._watched(closure, self.pairing.entry())
            result = self.optimizer.step(**_with(inner, kwargs))
        except SkipStepSignal as skip:
            self.begin()  # the step was not executed: the iteration starts anew
            return skip.args[0]
        except BaseException:
            self._lose_iteration()
            raise
        self._after_step()
        return result

    def _watched(self, closure: Callable[[], Any], entry: Entry | None) -> Callable[[], Any]:
        """The closure, its first evaluation seen as end of n-1 and start of n.

        An optimizer that moves away before it evaluates the closure (SAM) steps from the point at the entry.
        """
        calls = 0

        def evaluate() -> Any:
            nonlocal calls
            calls += 1
            if self.pairing.iteration.in_step:
                if calls == 2:  # later evaluations overwrite the gradients
                    self._keep_gradients()
                return closure()
            if entry is not None and self.pairing.left(entry):
                self._before_step(None, entry)
                self.pairing.mute()
                return closure()
            loss = closure()
            self._before_step(loss)
            return loss

        return evaluate

    @torch.no_grad()
    def _before_step(self, closure_loss: Any, entry: Entry | None = None) -> None:
        """Finish the pair that ends here, let the guard judge, prepare the pair that starts here."""
        pairing, params = self.pairing, parameters_of(self.optimizer)
        iteration = pairing.iteration
        iteration.in_step = True
        if iteration.task.in_pair or self.guard is not None:
            pairing.see_loss(closure_loss)
        outcome = pairing.finish(params, entry)
        if isinstance(outcome, DropReason):
            self.history.drop(outcome)
        elif outcome is not None:
            self.history.append(outcome)
        if self.guard is not None:
            self._judge(self.guard, params, closure_loss)
        if self._start:
            reason = pairing.start_obstacle(params, entry)
            if reason is not None:
                self.history.drop(reason)
            else:
                kept = None if self.guard is None else self.guard.kept_parameters(len(params))
                kept = kept if entry is None else entry.params
                pairing.before_step(self.optimizer, kept, rates_of(self.optimizer))

    def _judge(self, guard: Guard, params: list[Tensor], closure_loss: Any) -> None:
        """Take the last step back, or keep this point.

        Raises:
            SkipStepSignal: If the step must not be executed.
        """
        event = guard.judge(self.iteration, self.pairing.iteration.loss, params, self.pairing.look_closer)
        if event is None:
            return
        if event.reason in ("loss_drifted", "policy_returned") and self._lazy_state:
            self.optimizer.state.clear()  # momentum and second moments of the diverged stretch
        self.pairing.pending = None
        self.optimizer.zero_grad()
        self.events.append(event if self._on_event is None else self._on_event(event))
        raise SkipStepSignal(closure_loss)

    @torch.no_grad()
    def _after_step(self) -> None:
        """Reduce the start of the pair and move on to the next iteration."""
        pairing = self.pairing
        iteration = pairing.iteration
        if not iteration.in_step and (self._start or pairing.pending is not None):
            # The optimizer never called its closure: nothing was seen of this iteration.
            pairing.pending = None
            self.history.drop(DropReason.NO_BACKWARD)
        if iteration.before is not None:
            reason = pairing.after_step(self.optimizer)
            if reason is not None:
                self.history.drop(reason)
            self.plan.saw_step(len(iteration.passes.reached), pairing.habits.keep_copies)
            self.plan.warn_unaccounted()
        self.iteration += 1
        saw_loss = iteration.loss.mean is not None or iteration.losses_declined
        measured = pairing.pending is not None and iteration.gradients.any_seen
        self.reminders.after_step(self.iteration, measured, saw_loss)
        if self.guard is not None:
            self.guard.stepped = True
        self.begin()

    def _keep_gradients(self) -> None:
        iteration = self.pairing.iteration
        if iteration.used_gradients is not None:
            iteration.used_gradients = iteration.used_gradients.kept()
        self.pairing.mute()

    def _lose_iteration(self) -> None:
        """An exception left the step: nothing seen so far can be paired."""
        if self.pairing.pending is not None or self.pairing.iteration.before is not None:
            self.history.drop(DropReason.EXCEPTION)
        self.pairing.pending = None
        self.begin()

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return everything of ours as plain values and tensors."""
        return {
            "version": VERSION,
            "iteration": self.iteration,
            "history": self.history.state_dict(),
            "pairing": self.pairing.state_dict(),
            "guard": self._saved_guard if self.guard is None else self.guard.state_dict(),
            "plan": self.plan.state_dict(),
            "events": [asdict(event) for event in self.events],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a state; None (a bare optimizer's state) starts at iteration 0."""
        self.pairing.close()
        self._reset()
        self._saved_guard, self.events = None, []
        if state is None:
            self.iteration = 0
            self.history.load_state_dict(AlphaHistory().state_dict())
            self.plan.load_state_dict(None)
        else:
            self.iteration = int(state["iteration"])
            self.history.load_state_dict(state["history"])
            self._saved_guard = state["guard"]
            if int(state["version"]) == VERSION:
                self.pairing.load_state_dict(state["pairing"], parameters_of(self.optimizer))
                self.plan.load_state_dict(state["plan"])
            else:  # an older one: the pending measurement is dropped, what was learned is learned anew
                self.plan.load_state_dict(None)
            self.reminders.resumed(self.iteration)
            self.events = [GuardEvent(**event) for event in state["events"]]
        if self.guard is not None:
            self.guard = self._new_guard()
        self.begin()


def _with(closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if closure is None else {"closure": closure, **kwargs}
