"""What happens around one optimizer step, in order.

All mutable state of a wrapped optimizer lives in one `Session`, so that proxies of the optimizer
(Lightning, Accelerate) share it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from alpha_optim.alpha.history import AlphaHistory, Pending
from alpha_optim.alpha.records import DropReason, GuardEvent, GuardReason
from alpha_optim.distributed import Ranks, asked_by_checkpoint, fingerprint
from alpha_optim.measure.across_ranks import PairAcrossRanks, Report, Together
from alpha_optim.measure.pairing import Entry, Pairing
from alpha_optim.measure.plan import Plan
from alpha_optim.measure.processes import Processes
from alpha_optim.measure.step_ends import EndSeen
from alpha_optim.observe.checks import check_losses
from alpha_optim.observe.hooks import being_captured
from alpha_optim.observe.interrupts import uninterrupted
from alpha_optim.observe.memory import Shortage, sparing
from alpha_optim.observe.step_direction import parameters_of, rates_of, same_tensors
from alpha_optim.policies.base import Place
from alpha_optim.steer.reminders import Reminders, text_of_two_schedulers
from alpha_optim.steer.search import Search
from alpha_optim.steer.supervision import Steering, Supervision

VERSION = 4
_STEERED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
"""The last session with a scheduler of each model."""


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
        self.skipped = 0
        """Calls of `step` that the guard did not execute."""
        self.resumed_at = 0
        """Iteration of the state that was loaded last."""
        self.tasks: set[int] = set()
        """Of autograd: the backward passes of the last step."""
        self.supervision = Supervision(plan.model, plan.optimizer)
        self.search = Search(plan.model, plan.optimizer)
        self.processes = Processes(plan.model)
        self.reminders = Reminders(plan.loss_fn)
        self._shortage = Shortage()
        self._accepted: Callable[[], None] | None = None  # for the call in progress
        self._started_before = False  # whether a pair began with the last step
        self._reset()
        self.begin()

    def _reset(self) -> None:
        """Forget the iteration in progress and the pending step."""
        plan = self.plan
        self.pairing = Pairing(plan.model, plan.loss_fn, plan.sample_dim, plan.variance == "sampled")
        plan.forget_backends()

    # ---------------------------------------------------------------- between steps

    @uninterrupted()
    def begin(self) -> None:
        """Hook what the coming iteration needs."""
        if self.active:
            # Of several processes all have to measure the same iterations.
            gives_up = self._shortage.lasts and self.processes.ranks is None
            self._hook(starts=not gives_up and self.plan.wants(self.iteration))

    def _hook(self, starts: bool) -> None:
        """Hook the coming iteration.

        Args:
            starts: Whether it is to be the start of a pair.
        """
        self.processes.look_for(parameters_of(self.optimizer))
        ranks, guard = self.processes.ranks, self.supervision.guard
        in_pair = starts or self.pairing.pending is not None
        if ranks is not None:  # on all of them alike, whatever one could not measure
            in_pair = starts or self._started_before
        backend = self.plan.backend() if in_pair else None
        ended = self._started_before
        self.pairing.begin(self.optimizer, backend, self.iteration, starts, guard is not None, ranks, ended)
        if guard is not None:
            self.pairing.iteration.before_forward = self._model_is_about_to_be_called

    def _model_is_about_to_be_called(self) -> None:
        """Buffers change in the forward pass: those of a batch that is not used are put back to what they are now."""
        guard = self.supervision.judges(self.iteration)
        if guard is not None:
            guard.model_is_about_to_be_called(parameters_of(self.optimizer))

    @property
    def _starts(self) -> bool:
        """Whether the iteration in progress is the start of a pair."""
        return self.pairing.iteration.task.starts

    @property
    def progress(self) -> int:
        """Steps executed, and calls that the guard did not execute."""
        return self.iteration + self.skipped

    @uninterrupted()
    def steered(self, steering: Steering, guard: bool | str) -> None:
        """A scheduler takes over.

        Args:
            steering: The scheduler.
            guard: Whether points are judged; ``"cpu"``: and kept in the memory of the CPU.
        """
        if self.plan.model is not None:
            _STEERED[self.plan.model] = weakref.ref(self)
        self.scheduler_stepped()
        self.plan.ask_policy(steering.wants)
        self.supervision.steered(steering, guard)
        self.begin()

    def scheduler_stepped(self) -> None:
        """The scheduler was built or stepped."""
        self.supervision.scheduler_stepped(self.iteration)
        self.reminders.scheduler_stepped()
        other = self._steered_last()
        if other is not None and other is not self and other.iteration > 0 and not self._shares_parameters(other):
            self.reminders.two_schedulers([type(session.optimizer).__name__ for session in (other, self)])

    @uninterrupted()
    def restore_point(self, place: Place) -> bool:
        """Go on from a point that a search has kept; False, and nothing is changed, if there is none that fits."""
        if not self.search.restore(place):
            return False
        self.history.abandoned = self.search.abandoned(place, self.iteration, self.history.abandoned)
        if self.pairing.pending is not None:
            self.pairing.pending = None
            self.history.drop(DropReason.RESTORED)
        self._started_before = False
        if self.supervision.guard is not None:
            self.supervision.guard.moved(parameters_of(self.optimizer))
        if self.active:
            self._hook(self._starts)
        return True

    def check_unsteered(self) -> None:
        """Refuse a second scheduler, of this optimizer or of another one on the same model.

        Raises:
            ValueError: If there is one.
        """
        other = self._steered_last()
        # Of an earlier phase of training the other one has made steps, and this one none.
        together = other is not None and other is not self and other.iteration == self.iteration
        if other is not None and together and not self._shares_parameters(other):
            raise ValueError(text_of_two_schedulers([type(session.optimizer).__name__ for session in (other, self)]))
        if self.supervision.steering is not None:
            raise ValueError(
                "this optimizer already has an AlphaScheduler, and only one can set its rates; combine "
                "policies with Bounded and WithWarmup, and schedules with schedule=. For a second phase of training: "
                "optimizer.detach(), set the rate, and wrap optimizer.optimizer anew"
            )

    def _steered_last(self) -> Session | None:
        """The session of this model to which a scheduler came last, if it is not detached."""
        other = None if self.plan.model is None else _STEERED.get(self.plan.model, lambda: None)()
        return other if other is not None and other.active else None

    def _shares_parameters(self, other: Session) -> bool:
        """Whether another session, perhaps of an earlier run, has parameters of this one."""
        mine = set(map(id, parameters_of(self.optimizer)))
        return any(id(param) in mine for param in parameters_of(other.optimizer))

    @uninterrupted()
    def detach(self) -> None:
        """Remove every hook; from here on the wrapped optimizer steps alone."""
        if self.active:
            self.supervision.nothing_seen()
        self.close()

    @uninterrupted()
    def close(self) -> None:
        """Remove every hook."""
        self.active = False
        self.pairing.close()
        self.pairing.pending = None

    @uninterrupted()
    def gradients_cleared(self, in_place: bool) -> None:
        """``zero_grad`` was called; whether gradients are overwritten."""
        if self.active and not self.pairing.iteration.in_step:
            if in_place:
                self.pairing.gradients_overwritten()
            self.pairing.iteration.passes.cleared()
            self._judge_lost()

    def _judge_lost(self) -> None:
        """The passes so far come to no step."""
        self.pairing.iteration.passes.discard()
        if self.processes.ranks is None:  # else it is judged at the next step, when ranks talk
            self._judge_skipped_passes(None)

    def _judge_skipped_passes(self, together: Together | None) -> bool:
        """Judge passes that came to no step.

        Args:
            together: What all ranks have seen, if there are several.

        Returns:
            Whether gradients at hand can be used: not if a point was put back.
        """
        losses, self.pairing.iteration.lost_losses = self.pairing.iteration.lost_losses, []
        if together is not None:
            losses = [torch.tensor(math.nan)] if together.sums.pass_broke else []
        can_return = together is None or not together.sums.no_return
        events = self.supervision.judge_lost(self.iteration, losses, can_return)
        if events:
            self.pairing.pending = None
        return not any(event.restored for event in events)

    # ---------------------------------------------------------------- losses handed over

    def backward(self, losses: Tensor) -> Tensor:
        """Run the backward pass of the mean of ``losses``; see `AlphaGuided.backward`."""
        check_losses(losses, "backward", self.pairing.iteration.passes.forwards, graph=True)
        mean = losses.mean()
        if self.active and losses.numel() > 0:
            self.pairing.losses.announce(losses, mean)
        mean.backward()
        return mean.detach()

    def record_losses(self, losses: Tensor) -> None:
        """Take note of losses; see `AlphaGuided.record_losses`."""
        check_losses(losses, "record_losses", self.pairing.iteration.passes.forwards, graph=False)
        if self.active and losses.numel() > 0:
            self.pairing.iteration.passes.record(self.pairing.losses.hand_over(losses))

    # ---------------------------------------------------------------- the step

    # Inside a compiled function this runs as it is; what should be compiled is the wrapped optimizer's step.
    @torch._disable_dynamo  # type: ignore[attr-defined] # - as torch marks its own optimizers
    def step(
        self, closure: Callable[[], Any] | None, kwargs: dict[str, Any], accepted: Callable[[], None] | None = None
    ) -> Any:
        """Measure, guard, step; see `AlphaGuided.step`.

        Args:
            closure: As torch's.
            kwargs: Passed on to the wrapped optimizer.
            accepted: Called when the point reached has been accepted.
        """
        self._accepted = accepted
        try:
            return self._step(closure, kwargs)
        except Exception:
            raise
        except BaseException as error:
            if uninterrupted.cut_short or not isinstance(error, KeyboardInterrupt):  # else nothing is half done
                self._start_over()
            raise
        finally:
            self._accepted = None

    def _step(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        if self.supervision.steering is None and self.search.under_way:  # a state that was loaded without a scheduler's
            self.search.goes_on(under_way=False, trial=False, over=True)
        if not self.active:
            self._tell_accepted()
            self.iteration += 1
            return self.optimizer.step(**_with(closure, kwargs))
        if being_captured():  # before a rate is read
            self.reminders.captured()
            return self._step_unwatched(closure, kwargs)
        if self._fills_state(closure):
            return self.optimizer.step(**kwargs)
        if self.pairing.iteration.idle:
            return self._step_unwatched(closure, kwargs)
        if self.processes.ranks is not None and self.processes.ranks.leave_early():
            return self._step_unseen(closure, kwargs)
        if self.supervision.guard is not None:
            self.supervision.guard.notice_edits(parameters_of(self.optimizer))
        if self.search.was_edited():
            self.supervision.parameters_edited()
        try:
            with self.supervision.around_step():
                if closure is None:
                    self._before_step(None)
                inner = None if closure is None else self._watched(closure, self.pairing.entry())
                result = self.optimizer.step(**_with(inner, kwargs))
                self._reduce_start()
        except SkipStepSignal as skip:
            self.begin()  # the step was not executed: the iteration starts anew
            return skip.args[0]
        except BaseException:
            self._lose_iteration()
            raise
        self._after_step()
        return result

    def _fills_state(self, closure: Callable[[], Any] | None) -> bool:
        """Whether this is no step of training: distributed checkpoints make one at rate 0 to fill an empty state."""
        if closure is not None or self.optimizer.state:
            return False
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        still = all(isinstance(rate, (float, Tensor)) and float(rate) == 0.0 for rate in rates)
        return still and asked_by_checkpoint()

    def _step_unwatched(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Step without a look at it."""
        self._tell_accepted()
        with self.supervision.around_step():
            result = self.optimizer.step(**_with(closure, kwargs))
        self._after_unwatched()
        return result

    @uninterrupted()
    def _after_unwatched(self) -> None:
        self.iteration += 1
        self._started_before = False
        self.reminders.after_step(self.supervision.steps_alone(self.iteration), measured=False, saw_loss=False)
        self.supervision.step_made(self.iteration)
        self.search.step_made()
        self.begin()

    def _step_unseen(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Step without a word to other ranks, some of which may have left the loop."""
        self.reminders.ranks_leave()
        self.supervision.nothing_seen()
        self.pairing.pending = None
        if self.supervision.guard is not None:
            self.supervision.guard.forget()
        return self._step_unwatched(closure, kwargs)

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

    @uninterrupted()
    @torch.no_grad()
    def _before_step(self, closure_loss: Any, entry: Entry | None = None) -> None:
        """Finish the pair that ends here, let the guard judge, prepare the pair that starts here.

        Raises:
            SkipStepSignal: If the step must not be executed.
        """
        pairing, params = self.pairing, parameters_of(self.optimizer)
        iteration, guard = pairing.iteration, self.supervision.guard
        iteration.in_step = True
        if iteration.task.in_pair or guard is not None:
            pairing.see_loss(closure_loss)
        self._look_for_others()
        seen: EndSeen | DropReason | None = DropReason.OUT_OF_MEMORY
        with sparing(self._shortage.occurred):
            seen = pairing.finish(params, entry)
        self._shortage.noticed(iteration.passes.trouble)
        moved = None
        if entry is not None and guard is not None:  # judged and kept is the point that the step starts from
            moved = [param.detach().clone() for param in params]
            _write(params, entry.params)
        together = None
        outcome: Pending | DropReason | None
        ranks = self.processes.of_one_model(params, self.supervision.steering is not None)
        if ranks is not None:
            together, outcome = self._exchange(ranks, seen)
        else:
            pairing.talk_to(None)  # that others train models of their own may have been found just now
            if isinstance(seen, EndSeen):
                outcome = DropReason.OUT_OF_MEMORY
                with sparing(self._shortage.occurred):
                    outcome = pairing.paired(seen)
            else:
                outcome = seen
        event, used = None, True
        if guard is not None:  # else nobody waits for what other ranks say
            used = self._judge_skipped_passes(together)
        if used:
            event, used = self._judge(together, params)
        self._record(outcome, event)
        if not used:
            pairing.pending = None
            self.optimizer.zero_grad()
            self.skipped += 1
            raise SkipStepSignal(closure_loss)
        self._tell_accepted()
        if moved is not None:
            _write(params, moved)
        if self._starts:
            with sparing(self._out_of_memory):
                reason = pairing.start_obstacle(params, entry)
                if reason is not None:
                    self.history.drop(reason)
                else:
                    kept = None if guard is None else guard.kept_parameters(params)
                    kept = kept if entry is None else entry.params
                    pairing.before_step(self.optimizer, kept, rates_of(self.optimizer))

    def _look_for_others(self) -> None:
        """Tell the schedulers of networks whose backward passes go through each other."""
        passes = self.pairing.iteration.passes
        self.tasks = {entry.task for entry in passes.reached}
        if tasks := passes.of_others:
            self.supervision.meets_another_network()
            for other in [found() for found in _STEERED.values()]:
                if other is not None and other is not self and other.active and tasks & other.tasks:
                    other.supervision.meets_another_network()

    def _judge(self, together: Together | None, params: list[Tensor]) -> tuple[GuardEvent | None, bool]:
        """Let the guard judge the point reached; returns what it did, and whether the step is made."""
        loss = self.pairing.iteration.loss
        if together is not None:  # ranks have to decide together
            return self.supervision.judge(self.iteration, loss, together)
        with sparing(self._unjudged):
            return self.supervision.judge(self.iteration, loss, None)
        return None, self._looks_finite(params)

    def _exchange(
        self, ranks: Ranks, seen: EndSeen | DropReason | None
    ) -> tuple[Together, PairAcrossRanks | DropReason | None]:
        """Tell all ranks what this one has seen, and hear what they have.

        Raises:
            RuntimeError: If one does not answer, or has other learning rates.
        """
        steered = self.supervision.steering is not None
        rates = [group.get("lr") for group in self.optimizer.param_groups] if steered else None
        lost = self.pairing.iteration.lost_losses
        report = self.supervision.report(self.iteration, Report(rates=fingerprint(rates)), lost)
        exchange = self.pairing.exchange
        assert exchange is not None
        together, outcome = exchange.at_step(self.pairing.iteration, seen, report, read_now=steered)
        if steered:
            ranks.check_rates(together.sums.rates, rates)
        return together, outcome

    def _record(self, outcome: Pending | DropReason | None, event: GuardEvent | None) -> None:
        """Take the pair that ends here into the history; that of a batch that is not finite is dropped."""
        if isinstance(outcome, DropReason):
            self.history.drop(outcome)
        elif outcome is not None:
            unusable = event is not None and event.skipped and event.reason in (
                GuardReason.LOSS_NOT_FINITE, GuardReason.GRADIENT_NOT_FINITE, GuardReason.STATE_NOT_FINITE,
                GuardReason.NO_EFFECT,
            )  # fmt: skip
            if unusable:
                self.history.drop(DropReason.NOT_FINITE)
            else:
                self.history.append(outcome)

    def finish(self, loss: float | None) -> None:
        """Judge the point that the last step reached; see `AlphaScheduler.finish`."""
        guard, ranks = self.supervision.judges(self.iteration), self.processes.ranks
        if guard is None or not self.active:
            return
        self._judge_lost()
        together = None
        if ranks is not None:
            if ranks.leave_early():
                return
            params = parameters_of(self.optimizer)
            report = guard.report(Report(), params, False, gradients=False)
            assert self.pairing.exchange is not None
            together = self.pairing.exchange.after_last(loss, report, params[0].device)
        if self.supervision.finish(self.iteration, loss, together) is not None:
            self.pairing.pending = None

    def _tell_accepted(self) -> None:
        """The point reached is accepted; in a search only the one that it ends at counts."""
        if self._accepted is not None and not self.search.under_way:
            with torch.enable_grad():
                self._accepted()

    @uninterrupted()
    @torch.no_grad()
    def _reduce_start(self) -> None:
        """Reduce the start of the pair."""
        pairing = self.pairing
        iteration = pairing.iteration
        if not iteration.in_step and (iteration.task.starts or pairing.pending is not None):
            # The optimizer never called its closure: nothing was seen of this iteration.
            pairing.pending = None
            self.history.drop(DropReason.NO_BACKWARD)
        if iteration.before is not None:
            with sparing(self._out_of_memory):
                reason = pairing.after_step(self.optimizer)
                if reason is not None:
                    self.history.drop(reason)
            self._shortage.noticed(iteration.passes.trouble)
            self.plan.saw_step(iteration.passes, pairing.habits.keep_copies)
            self.plan.warn_unaccounted(pairing.losses.subset_told)

    def _looks_finite(self, params: list[Tensor]) -> bool:
        """Whether loss and gradients are finite, as far as that can be told number by number."""
        loss = self.pairing.iteration.loss.mean
        values = [] if loss is None else [loss]
        with suppress(Exception):
            values += [param.grad.norm() for param in params if param.grad is not None and not param.grad.is_sparse]
        return all(math.isfinite(value) for value in map(float, values))

    def _unjudged(self) -> None:
        """There was no memory to judge the point, which is accepted and not gone back to."""
        if self.supervision.guard is not None:
            self.supervision.guard.forget()
        self._shortage.occurred()

    def _out_of_memory(self) -> None:
        """The pair that begins here is not measured."""
        self.pairing.pending = self.pairing.iteration.before = None
        self.history.drop(DropReason.OUT_OF_MEMORY)
        self._shortage.occurred()

    @uninterrupted()
    def _after_step(self) -> None:
        """Move on to the next iteration."""
        pairing, iteration = self.pairing, self.pairing.iteration
        self.iteration += 1
        self._started_before = iteration.task.starts
        together = iteration.together
        saw_loss = iteration.loss.mean is not None or iteration.losses_declined
        saw_loss = saw_loss or (together is not None and iteration.without_data())
        measured = pairing.pending is not None and iteration.gradients.any_seen
        self.reminders.after_step(self.supervision.steps_alone(self.iteration), measured, saw_loss)
        if iteration.gradients.added_to_old and same_tensors(parameters_of(self.optimizer), iteration.params):
            self.reminders.not_cleared()
        self.supervision.step_made(self.iteration)
        self.search.step_made(None if pairing.pending is None else pairing.pending.elements)
        if self.supervision.guard is not None:
            self.supervision.guard.step_made(parameters_of(self.optimizer))
        self.begin()

    def _keep_gradients(self) -> None:
        iteration = self.pairing.iteration
        if iteration.used_gradients is not None:
            iteration.used_gradients = iteration.used_gradients.kept()
        self.pairing.mute()

    @uninterrupted()
    def _start_over(self) -> None:
        """Something of ours was interrupted in the middle: nothing of it is kept."""
        uninterrupted.cut_short = False
        before = self.pairing
        if before.pending is not None:
            self.history.drop(DropReason.EXCEPTION)
        with suppress(Exception):
            before.close()
        self._reset()
        self.pairing.go_on_from(before)
        if self.supervision.guard is not None:
            self.supervision.guard.forget()
        self.begin()

    @uninterrupted()
    def _lose_iteration(self) -> None:
        """An exception left the step: nothing seen so far can be paired."""
        if self.pairing.pending is not None or self.pairing.iteration.before is not None:
            self.history.drop(DropReason.EXCEPTION)
        self.pairing.pending = None
        self.begin()

    # ---------------------------------------------------------------- resume

    def state_dict(self, tensors: bool = True) -> dict[str, Any]:
        """Return everything of ours as plain values and tensors.

        Args:
            tensors: Whether the pending step and the guard's points, which are as large as the parameters, are in it.
        """
        return {
            "version": VERSION,
            "iteration": self.iteration,
            "history": self.history.state_dict(),
            "pairing": self.pairing.state_dict(tensors),
            "plan": self.plan.state_dict(),
            "skipped": self.skipped,
            "searching": self.search.under_way,
            "trial": self.search.trial,
            "search_points": self.search.state_dict() if tensors else None,
            "started_before": self._started_before,
            **self.supervision.state_dict(tensors),
        }

    @uninterrupted()
    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a state; None (a bare optimizer's state) starts at iteration 0."""
        self.pairing.close()
        self._reset()
        self.search.forget()
        self.skipped = self.resumed_at = 0
        if state is None:
            self.iteration = 0
            self.history.load_state_dict(AlphaHistory().state_dict())
            self.plan.load_state_dict(None)
        else:
            self.iteration = int(state["iteration"])
            self.history.load_state_dict(state["history"])
            self.skipped, self.search.under_way = int(state.get("skipped", 0)), bool(state.get("searching", False))
            self.search.trial = bool(state.get("trial", False))
            self.search.load_state_dict(state.get("search_points"))
            self._started_before = bool(state.get("started_before", False))
            if int(state["version"]) >= 2:
                params = parameters_of(self.optimizer)
                self.processes.look_for(params)
                self.pairing.load_state_dict(state["pairing"], params, self.iteration, self.processes.ranks)
                self.plan.load_state_dict(state["plan"])
            else:  # an older one: the pending measurement is dropped, what was learned is learned anew
                self.plan.load_state_dict(None)
            self.reminders.resumed()
            self.resumed_at = self.iteration
        self.supervision.load_state_dict(state, self.iteration)
        self.begin()


def _with(closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if closure is None else {"closure": closure, **kwargs}


def _write(params: list[Tensor], values: list[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
