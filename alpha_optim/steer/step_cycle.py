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
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.measure.end_point import batch_loss
from alpha_optim.measure.line_probe import LineProbe
from alpha_optim.measure.plan import Plan
from alpha_optim.measure.step_ends import BatchLoss
from alpha_optim.observe.checks import check_losses
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.step_direction import parameters_of, rates_of
from alpha_optim.steer.guard import Guard
from alpha_optim.steer.reminders import Reminders

VERSION = 1


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
        self.probe = LineProbe(self.plan.model, self.plan.loss_fn, self.plan.variance == "sampled")
        self.plan.forget_backends()
        self._in_step = False
        self._before: Tensor | list[Tensor] | None = None
        self._gradients: LossGradients | None = None
        self._loss = BatchLoss(None, None, 0)
        self._rates: tuple[float | Tensor, ...] = ()

    # ---------------------------------------------------------------- between steps

    def begin(self) -> None:
        """Hook what the coming iteration needs."""
        if not self.active:
            return
        self._start = self.plan.wants(self.iteration)
        in_pair = self._start or self.probe.pending is not None
        backend = self.plan.backend(self.probe.log) if in_pair else None
        loss = self.guard is not None
        self.probe.begin(self.optimizer, backend, self.iteration, self._start, loss)

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
        self.probe.close()
        self.probe.pending = None
        self.active = False

    def gradients_cleared(self, in_place: bool) -> None:
        """``zero_grad`` was called; whether gradients are overwritten."""
        if self.active and not self._in_step:
            if in_place:
                self.probe.gradients_overwritten()
            self.probe.log.discard()

    # ---------------------------------------------------------------- losses handed over

    def backward(self, losses: Tensor) -> Tensor:
        """Run the backward pass of the mean of ``losses``; see `AlphaGuided.backward`."""
        check_losses(losses, "backward", self.probe.log.forwards, graph=True)
        mean = losses.mean()
        if self.active:
            self.probe.losses.announce(losses, mean)
        mean.backward()
        return mean.detach()

    def record_losses(self, losses: Tensor) -> None:
        """Take note of losses; see `AlphaGuided.record_losses`."""
        check_losses(losses, "record_losses", self.probe.log.forwards, graph=False)
        if self.active:
            self.probe.log.recorded.append(self.probe.losses.hand_over(losses))

    # ---------------------------------------------------------------- the step

    # Inside a compiled function this runs as it is; what should be compiled is the wrapped optimizer's step.
    @torch._disable_dynamo  # type: ignore[attr-defined] # - as torch marks its own optimizers
    def step(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Measure, guard, step; see `AlphaGuided.step`."""
        if not self.active:
            self.iteration += 1
            return self.optimizer.step(**_with(closure, kwargs))
        try:
            if closure is None:
                self._before_step(None)
            inner = None if closure is None else self._watched(closure)
            result = self.optimizer.step(**_with(inner, kwargs))
        except SkipStepSignal as skip:
            self._begin_again()
            return skip.args[0]
        except BaseException:
            self._lose_iteration("exception")
            raise
        self._after_step()
        return result

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, its first evaluation seen as end of n-1 and start of n."""
        calls = 0

        def evaluate() -> Any:
            nonlocal calls
            calls += 1
            if self._in_step:
                if calls == 2:  # later evaluations overwrite the gradients
                    self._keep_gradients()
                return closure()
            loss = closure()
            self._before_step(loss)
            return loss

        return evaluate

    @torch.no_grad()
    def _before_step(self, closure_loss: Any) -> None:
        """Finish the pair that ends here, let the guard judge, prepare the pair that starts here."""
        self._in_step = True
        probe, params = self.probe, parameters_of(self.optimizer)
        watched = self._start or probe.pending is not None
        self._gradients = probe.watch.loss_gradients(params) if watched else None
        if watched or self.guard is not None:
            scalar = closure_loss if isinstance(closure_loss, (Tensor, float, int)) else None
            self._loss = batch_loss(probe.log, scalar)
        outcome = probe.finish(self.iteration, self._gradients, self._loss)
        if isinstance(outcome, str):
            self.history.drop(outcome)
        elif outcome is not None:
            self.history.append(outcome)
        if self.guard is not None:
            self._judge(self.guard, params, closure_loss)
        self._before = None
        if self._start:
            reason = probe.start_obstacle(params)
            if reason is not None:
                self.history.drop(reason)
            else:
                self._before = probe.before_step(self.optimizer)
                self._rates = rates_of(self.optimizer)

    def _judge(self, guard: Guard, params: list[Tensor], closure_loss: Any) -> None:
        """Take the last step back, or keep this point.

        Raises:
            SkipStepSignal: If the step must not be executed.
        """
        event = guard.judge(self.iteration, self._loss, params)
        if event is None:
            return
        if event.reason in ("loss_drifted", "policy_returned") and self._lazy_state:
            self.optimizer.state.clear()  # momentum and second moments of the diverged stretch
        self.probe.pending = None
        self.optimizer.zero_grad()
        self.events.append(event if self._on_event is None else self._on_event(event))
        raise SkipStepSignal(closure_loss)

    @torch.no_grad()
    def _after_step(self) -> None:
        """Reduce the start of the pair and move on to the next iteration."""
        if not self._in_step and (self._start or self.probe.pending is not None):
            # The optimizer never called its closure: nothing was seen of this iteration.
            self.probe.pending = None
            self.history.drop("no_backward")
        if self._before is not None:
            assert self._gradients is not None
            reason = self.probe.after_step(
                self.iteration, self.optimizer, self._before, self._gradients, self._loss, self._rates
            )
            if reason is not None:
                self.history.drop(reason)
            self.plan.saw_step(len(self.probe.log.reached), self.probe.watch.keep_copies)
            self.plan.warn_unaccounted()
        self.probe.watch.step_done(parameters_of(self.optimizer))
        self._in_step, self._before, self._gradients = False, None, None
        self.iteration += 1
        self.reminders.after_step(self.iteration, self.probe.pending is not None, self._loss.mean is not None)
        if self.guard is not None:
            self.guard.stepped = True
        self.begin()

    def _keep_gradients(self) -> None:
        if self._gradients is not None:
            self._gradients = self._gradients.kept()
        self.probe.mute()

    def _begin_again(self) -> None:
        """The step was not executed: the iteration starts anew."""
        self._in_step, self._before, self._gradients = False, None, None
        self.begin()

    def _lose_iteration(self, reason: str) -> None:
        """An exception left the step: nothing seen so far can be paired."""
        if self.probe.pending is not None or self._before is not None:
            self.history.drop(reason)
        self.probe.pending = None
        self._begin_again()

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return everything of ours as plain values and tensors."""
        return {
            "version": VERSION,
            "iteration": self.iteration,
            "history": self.history.state_dict(),
            "probe": self.probe.state_dict(),
            "guard": self._saved_guard if self.guard is None else self.guard.state_dict(),
            "plan": self.plan.state_dict(),
            "events": [asdict(event) for event in self.events],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a state; None (a bare optimizer's state) starts at iteration 0."""
        self.probe.close()
        self._reset()
        self._saved_guard, self.events = None, []
        if state is None:
            self.iteration = 0
            self.history.load_state_dict(AlphaHistory().state_dict())
            self.plan.load_state_dict(None)
        else:
            self.iteration = int(state["iteration"])
            self.history.load_state_dict(state["history"])
            self.probe.load_state_dict(state["probe"], parameters_of(self.optimizer))
            self._saved_guard = state["guard"]
            self.plan.load_state_dict(state["plan"])
            self.reminders.resumed(self.iteration)
            self.events = [GuardEvent(**event) for event in state["events"]]
        if self.guard is not None:
            self.guard = self._new_guard()
        self.begin()


def _with(closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if closure is None else {"closure": closure, **kwargs}
