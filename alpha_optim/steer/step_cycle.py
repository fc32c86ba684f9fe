"""What happens around one optimizer step, in order.

All mutable state of a wrapped optimizer lives in one `Session`, so that proxies of the optimizer
(Lightning, Accelerate) share it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alpha_optim.alpha.guard_log import GuardLog
from alpha_optim.alpha.history import AlphaHistory, Pending
from alpha_optim.alpha.records import DropReason, GuardEvent, GuardReason
from alpha_optim.distributed import Ranks, asked_by_checkpoint, fingerprint, initialised
from alpha_optim.measure.across_ranks import PairAcrossRanks, Report, Together
from alpha_optim.measure.pairing import Entry, Pairing
from alpha_optim.measure.plan import Plan
from alpha_optim.measure.step_ends import EndSeen
from alpha_optim.observe.checks import check_losses
from alpha_optim.observe.memory import sparing
from alpha_optim.observe.numbers import read
from alpha_optim.observe.step_direction import parameters_of, rates_of
from alpha_optim.policies.base import Place
from alpha_optim.steer.guard import Guard
from alpha_optim.steer.reminders import UNSCHEDULED, Reminders
from alpha_optim.steer.search import Search
from alpha_optim.user_warning import warn_user

VERSION = 4
RESTS = 2
"""After so many executed steps without the scheduler's nothing is judged: somebody else has taken over."""
OTHERS = 3
"""After so many steps before which another network's backward pass came through here it is no accident."""
PATIENT = 3
"""After so many steps whose measurement had no memory nothing is measured."""
_STEERED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
"""The last session with a scheduler of each model."""


class Steering(Protocol):
    """What a scheduler answers and is told."""

    def wants(self, iteration: int) -> bool:
        """Whether the iteration is to be measured, where the optimizer has ``every=None``."""

    def guard_acted(self, event: GuardEvent) -> GuardEvent:
        """The guard did something; returns the event with what follows for the rates."""

    def not_stepped(self) -> None:
        """Several steps were made without the scheduler's."""

    def nothing_seen(self) -> None:
        """Steps are no longer seen from here on."""

    def reached_by_others(self) -> None:
        """Backward passes of another network come through the parameters."""

    def around_step(self) -> AbstractContextManager[None]:
        """Entered while the wrapped optimizer steps."""


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
        self.events = GuardLog()
        self.skipped = 0
        """Calls of `step` that the guard did not execute."""
        self.search = Search(plan.model, plan.optimizer)
        self.reminders = Reminders(plan.loss_fn)
        self._steering: Steering | None = None
        self._reached = 0  # steps before which another network's backward pass came through
        self._scheduled_at = 0  # iteration at which the scheduler was stepped last
        self._accepted: Callable[[], None] | None = None  # for the call in progress
        self.ranks: Ranks | None = None
        """The processes that train the model together, if there are several."""
        self._separate = False  # whether processes were found to train models of their own
        self._started_before = False  # whether a pair began with the last step
        self._saved_guard: dict[str, Any] | None = None
        self._ran_out = 0  # steps whose measurement had no memory
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
        # Of several processes all have to measure the same iterations.
        gives_up = self._ran_out >= PATIENT and self.ranks is None
        self._start = not gives_up and self.plan.wants(self.iteration)
        self._hook()

    def _hook(self) -> None:
        """Hook the coming iteration, of which it is known whether it is measured."""
        self._find_ranks()
        in_pair = self._start or self.pairing.pending is not None
        if self.ranks is not None:  # on all of them alike, whatever one could not measure
            in_pair = self._start or self._started_before
        backend = self.plan.backend() if in_pair else None
        guarded = self.guard is not None
        ended = self._started_before
        self.pairing.begin(self.optimizer, backend, self.iteration, self._start, guarded, self.ranks, ended)
        if self.guard is not None and self.guard.lacks_buffers and not self._resting:
            self.pairing.iteration.before_forward = self.guard.keep_buffers

    def _find_ranks(self) -> None:
        """Look for other processes that train the same model."""
        if self._separate or not initialised():
            self.ranks = None
            return
        params = parameters_of(self.optimizer)
        if self.ranks is None or not self.ranks.train(params):
            self.ranks = Ranks.found(self.plan.model, params)

    @property
    def progress(self) -> int:
        """Steps executed, and calls that the guard did not execute."""
        return self.iteration + self.skipped

    def steered(self, steering: Steering, guard: bool | str) -> None:
        """A scheduler takes over.

        Args:
            steering: The scheduler.
            guard: Whether points are judged; ``"cpu"``: and kept in the memory of the CPU.
        """
        self.scheduler_stepped()
        self._steering = steering
        if self.plan.model is not None:
            _STEERED[self.plan.model] = weakref.ref(self)
        self.plan.ask_policy(steering.wants)
        self.guard = self._new_guard(guard == "cpu") if guard else None
        self.begin()

    def scheduler_stepped(self) -> None:
        """The scheduler was built or stepped."""
        self._scheduled_at = self.iteration
        self.reminders.scheduler_stepped(self.iteration)

    def restore_point(self, place: Place) -> bool:
        """Go on from a point that a search has kept; False, and nothing is changed, if there is none that fits."""
        if not self.search.restore(place):
            return False
        self.history.abandoned = self.search.abandoned(place, self.iteration, self.history.abandoned)
        if self.pairing.pending is not None:
            self.pairing.pending = None
            self.history.drop(DropReason.RESTORED)
        self._started_before = False
        if self.guard is not None:
            self.guard.moved(parameters_of(self.optimizer))
        if self.active:
            self._hook()
        return True

    def _new_guard(self, on_host: bool) -> Guard:
        """A guard that remembers what was saved, if anything was."""
        guard = Guard(self.plan.model, self.optimizer, on_host)
        if self._saved_guard is not None:
            guard.load_state_dict(self._saved_guard, parameters_of(self.optimizer))
        return guard

    def check_unsteered(self) -> None:
        """Refuse a second scheduler, of this optimizer or of another one on the same model.

        Raises:
            ValueError: If there is one.
        """
        other = None if self.plan.model is None else _STEERED.get(self.plan.model, lambda: None)()
        # Of an earlier phase of training the other one has made steps, and this one none.
        together = other is not None and other is not self and other.active and other.iteration == self.iteration
        if other is not None and together and not self._shares_parameters(other):
            names = [type(session.optimizer).__name__ for session in (other, self)]
            raise ValueError(
                f"another optimizer of this model ({names[0]}) already has an AlphaScheduler, and two of them would "
                f"take back different steps; wrap both as one: AlphaGuided([{names[0].lower()}, {names[1].lower()}], "
                "model, loss_fn), or detach() the other one if it is done"
            )
        if self._steering is not None:
            raise ValueError(
                "this optimizer already has an AlphaScheduler, and only one can set its rates; combine "
                "policies with Bounded and WithWarmup, and schedules with schedule="
            )

    def _shares_parameters(self, other: Session) -> bool:
        """Whether another session, perhaps of an earlier run, has parameters of this one."""
        mine = set(map(id, parameters_of(self.optimizer)))
        return any(id(param) in mine for param in parameters_of(other.optimizer))

    def detach(self) -> None:
        """Remove every hook; from here on the wrapped optimizer steps alone."""
        self.pairing.close()
        self.pairing.pending = None
        if self.active and self._steering is not None:
            self._steering.nothing_seen()
        self.active = False

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
        if self.ranks is None:  # else it is judged at the next step, when ranks talk
            self._judge_skipped_passes(None)

    def _judge_skipped_passes(self, together: Together | None) -> bool:
        """Judge passes that came to no step: a gradient scaler skips what is not finite, and a loss that is not counts.

        Args:
            together: What all ranks have seen, if there are several.

        Returns:
            Whether gradients at hand can be used: not if a point was put back.
        """
        losses, self.pairing.iteration.lost_losses = self.pairing.iteration.lost_losses, []
        if together is not None:
            losses = [torch.tensor(math.nan)] if together.sums.pass_broke else []
        can_return = together is None or not together.sums.no_return
        events = [event for loss in losses if (event := self._judge_skipped(loss, can_return)) is not None]
        return not any(event.restored for event in events)

    def _judge_skipped(self, loss: Tensor | None, can_return: bool) -> GuardEvent | None:
        if self.guard is None or self._resting or loss is None:
            return None
        event = self.guard.abandoned(self.iteration, read([loss])[0], parameters_of(self.optimizer), can_return)
        if event is not None:
            self.pairing.pending = None
            event = self._note(event)
        return event

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
        finally:
            self._accepted = None

    def _step(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        if not self.active:
            self._tell_accepted()
            self.iteration += 1
            return self.optimizer.step(**_with(closure, kwargs))
        if self._fills_state(closure):
            return self.optimizer.step(**kwargs)
        if self.pairing.iteration.idle:
            return self._step_unwatched(closure, kwargs)
        if self.ranks is not None and self.ranks.leave_early():
            return self._step_unseen(closure, kwargs)
        if self.guard is not None:
            self.guard.notice_edits(parameters_of(self.optimizer))
        try:
            with self._around_step():
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
        with self._around_step():
            result = self.optimizer.step(**_with(closure, kwargs))
        self.iteration += 1
        self._started_before = False
        self.reminders.after_step(self.iteration, measured=False, saw_loss=False)
        self._remind_scheduler()
        self.begin()
        return result

    def _step_unseen(self, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
        """Step without a word to other ranks, some of which may have left the loop."""
        self.reminders.ranks_leave()
        if self._steering is not None:
            self._steering.nothing_seen()
        self.pairing.pending = None
        if self.guard is not None:
            self.guard.forget()
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

    @torch.no_grad()
    def _before_step(self, closure_loss: Any, entry: Entry | None = None) -> None:
        """Finish the pair that ends here, let the guard judge, prepare the pair that starts here.

        Raises:
            SkipStepSignal: If the step must not be executed.
        """
        pairing, params = self.pairing, parameters_of(self.optimizer)
        iteration = pairing.iteration
        iteration.in_step = True
        if iteration.task.in_pair or self.guard is not None:
            pairing.see_loss(closure_loss)
        if iteration.passes.discarded and self._steering is not None:
            self._reached += 1
            if self._reached == OTHERS:
                self._steering.reached_by_others()
        seen: EndSeen | DropReason | None = DropReason.OUT_OF_MEMORY
        with sparing(self._ran_out_of_memory):
            seen = pairing.finish(params, entry)
        moved = None
        if entry is not None and self.guard is not None:  # judged and kept is the point that the step starts from
            moved = [param.detach().clone() for param in params]
            _write(params, entry.params)
        event, used, together = None, True, None
        outcome: Pending | DropReason | None
        if self.ranks is not None and self._train_one_model(self.ranks, params):
            together, outcome = self._exchange(self.ranks, seen, params)
        else:
            outcome = pairing.paired(seen) if isinstance(seen, EndSeen) else seen
        if self.guard is not None:
            used = self._judge_skipped_passes(together)
            if used:
                event, used = self._judge(self.guard, params, together)
        self._record(outcome, event)
        if not used:
            pairing.pending = None
            self.optimizer.zero_grad()
            self.skipped += 1
            raise SkipStepSignal(closure_loss)
        self._tell_accepted()
        if moved is not None:
            _write(params, moved)
        if self._start:
            reason = pairing.start_obstacle(params, entry)
            if reason is not None:
                self.history.drop(reason)
            else:
                kept = None if self.guard is None else self.guard.kept_parameters(params)
                kept = kept if entry is None else entry.params
                with sparing(self._out_of_memory):
                    pairing.before_step(self.optimizer, kept, rates_of(self.optimizer))

    def _train_one_model(self, ranks: Ranks, params: list[Tensor]) -> bool:
        """Whether all ranks hold the same model; where only this one is watched, it is measured by itself if not.

        Raises:
            ValueError: If a scheduler is to find a rate for all of them.
        """
        apart = ranks.compare_models(params)
        if apart is None:
            return True
        if self._steering is not None:
            raise ValueError(apart)
        warn_user(f"{apart}. Every process is measured by itself.")
        self._separate, self.ranks = True, None
        self.pairing.talk_to(None)
        return False

    def _exchange(
        self, ranks: Ranks, seen: EndSeen | DropReason | None, params: list[Tensor]
    ) -> tuple[Together, PairAcrossRanks | DropReason | None]:
        """Tell all ranks what this one has seen, and hear what they have.

        Raises:
            RuntimeError: If one does not answer, or has other learning rates.
        """
        steered = self._steering is not None
        rates = [group.get("lr") for group in self.optimizer.param_groups] if steered else None
        report = Report(rates=fingerprint(rates))
        if self.guard is not None and not self._resting:
            lost = read(self.pairing.iteration.lost_losses)
            report = self.guard.report(params, report, not all(map(math.isfinite, lost)))
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

    @property
    def _resting(self) -> bool:
        """Whether nobody steps the scheduler."""
        return self.iteration - self._scheduled_at >= RESTS

    def _judge(self, guard: Guard, params: list[Tensor], together: Together | None) -> tuple[GuardEvent | None, bool]:
        """Let the guard judge the point reached; returns what it did and whether the step is made.

        Raises:
            RuntimeError: If that is asked for inside a backward pass.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "AlphaScheduler's guard cannot judge a step inside the backward pass (one optimizer per parameter, "
                "stepped by a gradient hook): a step taken back there would break autograd. Use "
                "AlphaScheduler(..., guard=False)."
            )
        if self._resting:
            guard.rest(self.iteration, self.pairing.iteration.loss if together is None else together.loss)
            return None, True
        event, used = guard.judge(self.iteration, self.pairing.iteration.loss, params, together)
        if event is None:
            return None, used
        return self._note(event), used

    def _note(self, event: GuardEvent) -> GuardEvent:
        """Tell the scheduler of an event, and remember it."""
        event = event if self._steering is None else self._steering.guard_acted(event)
        self.events.append(event)
        return event

    def finish(self, loss: float | None) -> None:
        """Judge the point that the last step reached; see `AlphaScheduler.finish`."""
        if self.guard is None or not self.active:
            return
        self._judge_lost()
        params, together = parameters_of(self.optimizer), None
        if self.ranks is not None:
            if self.ranks.leave_early():
                return
            report = self.guard.report(params, Report(), False, gradients=False)
            assert self.pairing.exchange is not None
            together = self.pairing.exchange.after_last(loss, report, params[0].device)
        event = self.guard.finish(self.iteration, loss, params, together)
        if event is not None:
            self.pairing.pending = None
            self._note(event)

    def _tell_accepted(self) -> None:
        """The point reached is accepted; in a search only the one that it ends at counts."""
        if self._accepted is not None and not self.search.under_way:
            with torch.enable_grad():
                self._accepted()

    def _around_step(self) -> AbstractContextManager[None]:
        return nullcontext() if self._steering is None else self._steering.around_step()

    def _remind_scheduler(self) -> None:
        if self._steering is not None and self.iteration - self._scheduled_at == UNSCHEDULED + 1:
            self._steering.not_stepped()

    @torch.no_grad()
    def _reduce_start(self) -> None:
        """Reduce the start of the pair."""
        pairing = self.pairing
        iteration = pairing.iteration
        if not iteration.in_step and (self._start or pairing.pending is not None):
            # The optimizer never called its closure: nothing was seen of this iteration.
            pairing.pending = None
            self.history.drop(DropReason.NO_BACKWARD)
        if iteration.before is not None:
            with sparing(self._out_of_memory):
                reason = pairing.after_step(self.optimizer)
                if reason is not None:
                    self.history.drop(reason)
            self.plan.saw_step(len(iteration.passes.reached), pairing.habits.keep_copies)
            self.plan.warn_unaccounted()

    def _out_of_memory(self) -> None:
        """The pair that begins here is not measured."""
        self.pairing.pending = self.pairing.iteration.before = None
        self.history.drop(DropReason.OUT_OF_MEMORY)
        self._ran_out_of_memory()

    def _ran_out_of_memory(self) -> None:
        """Once this has happened a few times nothing is measured."""
        self._ran_out += 1
        if self._ran_out == 1:
            warn_user(
                "memory ran out while alpha was measured; the step is made as ever, and where this happens again "
                "measuring stops. Less is needed with a smaller batch, with every=10 (now and then only) or with "
                "AlphaScheduler(guard='cpu')."
            )

    def _after_step(self) -> None:
        """Move on to the next iteration."""
        pairing, iteration = self.pairing, self.pairing.iteration
        self.iteration += 1
        self._started_before = self._start
        together = iteration.together
        saw_loss = iteration.loss.mean is not None or iteration.losses_declined
        saw_loss = saw_loss or (together is not None and iteration.without_data())
        measured = pairing.pending is not None and iteration.gradients.any_seen
        self.reminders.after_step(self.iteration, measured, saw_loss)
        self._remind_scheduler()
        if self.guard is not None:
            self.guard.step_made(parameters_of(self.optimizer))
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

    def state_dict(self, tensors: bool = True) -> dict[str, Any]:
        """Return everything of ours as plain values and tensors.

        Args:
            tensors: Whether the pending step and the guard's points, which are as large as the parameters, are in it.
        """
        guard = None
        if tensors:
            guard = self._saved_guard if self.guard is None else self.guard.state_dict()
        return {
            "version": VERSION,
            "iteration": self.iteration,
            "history": self.history.state_dict(),
            "pairing": self.pairing.state_dict(tensors),
            "guard": guard,
            "plan": self.plan.state_dict(),
            "skipped": self.skipped,
            "searching": self.search.under_way,
            "trial": self.search.trial,
            "search_points": self.search.state_dict() if tensors else None,
            "scheduled_at": self._scheduled_at,
            "started_before": self._started_before,
            "events": self.events.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a state; None (a bare optimizer's state) starts at iteration 0."""
        self.pairing.close()
        self._reset()
        self._saved_guard, self.events = None, GuardLog()
        self.search.forget()
        self.skipped = 0
        if state is None:
            self.iteration = self._scheduled_at = 0
            self.history.load_state_dict(AlphaHistory().state_dict())
            self.plan.load_state_dict(None)
        else:
            self.iteration = int(state["iteration"])
            self.history.load_state_dict(state["history"])
            self._saved_guard = state["guard"]
            self.skipped, self.search.under_way = int(state.get("skipped", 0)), bool(state.get("searching", False))
            self.search.trial = bool(state.get("trial", False))
            self.search.load_state_dict(state.get("search_points"))
            self._scheduled_at = int(state.get("scheduled_at", self.iteration))
            self._started_before = bool(state.get("started_before", False))
            if int(state["version"]) >= 2:
                self._find_ranks()
                params = parameters_of(self.optimizer)
                self.pairing.load_state_dict(state["pairing"], params, self.iteration, self.ranks)
                self.plan.load_state_dict(state["plan"])
            else:  # an older one: the pending measurement is dropped, what was learned is learned anew
                self.plan.load_state_dict(None)
            self.reminders.resumed(self.iteration)
            self.events.load_state_dict(state["events"])
        if self.guard is not None:
            self.guard = self._new_guard(self.guard.on_host)
        self.begin()


def _with(closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if closure is None else {"closure": closure, **kwargs}


def _write(params: list[Tensor], values: list[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
