"""Pairs the start and the end of one step, from the user's own passes.

One iteration may be the end of the pair (n-1, n) and the start of the pair (n, n+1). The end is
complete when `step` is called, the start only after it, when the direction is known. Between the two
iterations only the direction and a few numbers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.alpha.records import DropReason
from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.distributed import Ranks
from alpha_optim.measure.across_ranks import StartAcrossRanks
from alpha_optim.measure.exchange import Exchange, tolerance_of
from alpha_optim.measure.iteration import Iteration, Task, Unused
from alpha_optim.measure.refresh import Role, Variances
from alpha_optim.measure.step_ends import (
    BatchLoss,
    EndPoint,
    EndSeen,
    PendingPair,
    PendingStart,
    batch_loss,
    sample_variance,
)
from alpha_optim.observe.backward_passes import BackwardPasses, gamma_of, inseparable
from alpha_optim.observe.gradients import GradientHooks, Gradients, Habits
from alpha_optim.observe.losses import LossHooks
from alpha_optim.observe.memory import goes_on, is_out_of_memory
from alpha_optim.observe.model_calls import ModelHooks
from alpha_optim.observe.numbers import Number, Truth, free_to_read, read
from alpha_optim.observe.some_elements import SomeElements, differ
from alpha_optim.observe.step_direction import (
    AlongGradient,
    BetweenPoints,
    Direction,
    copied,
    is_of_torch,
    is_plain_sgd,
    parameters_of,
    same_tensors,
)
from alpha_optim.slopes.base import OTHER_TERMS, Backend, Expected, SampleSlopes

R = TypeVar("R")


@dataclass(frozen=True)
class Entry:
    """Where the parameters were when `step` was called with a closure and gradients were there already.

    Attributes:
        elements: Some elements of every parameter.
        params: A copy of the parameters.
        edited: Whether they had been changed since the backward pass.
    """

    elements: Tensor
    params: list[Tensor]
    edited: bool


class Pairing:
    """Hooks iterations and turns pairs of them into measurements."""

    def __init__(self, model: nn.Module | None, loss_fn: nn.Module | None, sample_dim: int, sampled: bool) -> None:
        """Prepare; nothing is hooked before `begin`.

        Args:
            model: The model, if it was given.
            loss_fn: Loss function of the user, if it was given.
            sample_dim: Dimension along which samples lie.
            sampled: Whether variances are measured now and then, on few samples.
        """
        self._sample_dim = sample_dim
        self.variances = Variances(sampled)
        self.habits = Habits()
        self.pending: PendingStart | None = None
        self.losses = LossHooks(loss_fn, sample_dim, self._now)
        self._model_hooks = ModelHooks(model, sample_dim, self._now)
        self.gradient_hooks = GradientHooks(self._now)
        self._buffer: list[Tensor] = []  # for copies of gradients, reused
        self._before: list[Tensor] = []  # parameters before a step, reused
        self._some_elements = SomeElements()
        self._frozen: set[int] | None = None  # parameters that were not trained when the pending step was made
        self._untold = False  # whether samples did not add up in an iteration without a backend
        self._keep_direction = False  # the gradients of a step are written to before the next
        self.exchange: Exchange | None = None  # with the other processes that train the model, if there are any
        nothing = Task(0, False, None, None, frozenset(), sample_dim, guarded=False, checks=False)
        self.iteration = self._new(nothing, [])

    def _now(self) -> Iteration:
        return self.iteration

    def _new(self, task: Task, params: list[Tensor]) -> Iteration:
        gradients = Gradients(self.habits, self._buffer)
        return Iteration(task, params, gradients, self._some_elements, self.gradient_hooks.pass_begins)

    def go_on_from(self, before: Pairing) -> None:
        """Take over from another one, that was interrupted, what is known and whom it talks to: ranks stay in step."""
        self.variances, self.habits = before.variances, before.habits
        self._keep_direction, self._untold = before._keep_direction, before._untold
        if before.exchange is not None:
            self.exchange = before.exchange
            self.exchange.on_doubt = self._doubt

    # ---------------------------------------------------------------- hooks

    def begin(
        self,
        optimizer: Optimizer,
        backend: Backend | None,
        number: int,
        starts: bool,
        guarded: bool,
        ranks: Ranks | None = None,
        ended: bool = False,
    ) -> None:
        """Hook what the coming iteration needs.

        Args:
            optimizer: The wrapped optimizer.
            backend: Backend of the iteration; None if it is in no pair.
            number: The coming iteration.
            starts: Whether it is the start of a pair.
            guarded: Whether a guard judges its loss, measured or not.
            ranks: The processes that train the model together, if there are several.
            ended: Whether a step ends here, as far as these have planned, whatever this one has seen of it.
        """
        self.talk_to(ranks)
        if backend is None and not guarded and self.iteration.idle:
            return  # nor was there anything to see in the last one
        self._close_backend()
        params = parameters_of(optimizer)
        if not same_tensors(params, self.iteration.params):
            self.variances.forget()
        due, checks, failed = frozenset[Role](), False, None
        if backend is not None:
            try:
                due = self._due(backend, number, starts, self.pending is not None if ranks is None else ended)
                if self._untold:
                    self._untold = False
                    backend.doubted(OTHER_TERMS)
                checks = "start" in due and backend.check_due()
            except Exception as error:  # a backend of the user's own
                if goes_on(error):
                    raise
                due, failed = frozenset[Role](), error
        task = Task(number, starts, self.pending, backend, due, self._sample_dim, guarded, checks)
        last, self.iteration = self.iteration, self._new(task, params)
        if number == last.task.number and not last.in_step:  # hooked anew; after a call of `step` all is judged
            self.iteration.take_over(last.unused())
        passes = self.iteration.passes
        if failed is not None:
            passes.failed(failed)
        if backend is not None and due:
            end_of = self.pending.direction if "end" in due and self.pending is not None else None
            _harmlessly(passes, lambda: backend.begin(passes, end_of, "start" in due, params))
        if backend is not None:
            self.gradient_hooks.step_done(params, after_step=last.in_step or number != last.task.number)
        if backend is not None or guarded:
            self._model_hooks.attach()
            each = backend.accumulated if backend is not None and due else None
            self.gradient_hooks.attach(params, self.iteration.gradients, each, late=ranks is not None)
            self.losses.attach()
        else:
            self._model_hooks.detach()
            self.gradient_hooks.detach()
            self.losses.detach()

    def talk_to(self, ranks: Ranks | None) -> None:
        """Exchange what is seen with these ranks; None: measure by itself what this process sees."""
        if ranks is None:
            self.exchange = None
        elif self.exchange is None or self.exchange.ranks is not ranks:
            self.exchange = Exchange(ranks, self.variances, self._doubt)

    def _due(self, backend: Backend, number: int, starts: bool, ends: bool) -> frozenset[Role]:
        """At which ends of a step variances are measured anew."""
        roles: list[tuple[Role, bool]] = [("start", starts), ("end", ends)]
        cost = backend.cost(self.variances.samples)
        return frozenset(role for role, wanted in roles if wanted and self.variances.due(role, number, cost))

    def _close_backend(self) -> None:
        task = self.iteration.task
        if task.backend is not None and task.due:
            task.backend.close()

    def close(self) -> None:
        """Remove every hook and forget the iteration."""
        self._close_backend()
        self.iteration = self._new(replace(self.iteration.task, backend=None, due=frozenset()), [])
        self._model_hooks.detach()
        self.gradient_hooks.detach()
        self.losses.detach()

    def mute(self) -> None:
        """Remove every hook; what was seen stays."""
        task = self.iteration.task
        if task.backend is not None and task.due:
            task.backend.mute()
        self._model_hooks.detach()
        self.gradient_hooks.detach()
        self.losses.detach()

    def gradients_overwritten(self) -> None:
        """The gradients are about to be zeroed in place: keep those that are the pending direction."""
        if self.pending is not None and isinstance(self.pending.direction, AlongGradient):
            self.pending.direction.keep()

    # ---------------------------------------------------------------- the loss

    def see_loss(self, fallback: Any) -> BatchLoss:
        """Put the loss of the iteration together, with the variance as it was the last time if not seen now."""
        iteration = self.iteration
        self.losses.warn_of(iteration.passes.reached)
        try:
            if iteration.passes.trouble is None:  # else nothing is known
                iteration.loss = self._loss(fallback if isinstance(fallback, (Tensor, float, int)) else None)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            iteration.passes.failed(error)
        return iteration.loss

    def _loss(self, fallback: Tensor | float | None) -> BatchLoss:
        iteration = self.iteration
        loss = batch_loss(iteration.passes, fallback)
        if self.exchange is not None:
            pass  # what is known of variances comes from all ranks
        elif loss.variance is not None:
            self.variances.saw_loss(loss.variance)
        elif loss.complete and loss.samples != 1:
            loss = BatchLoss(loss.mean, self.variances.of_loss, loss.samples, True, loss.individual)
        elif iteration.task.due:
            self.variances.saw_loss(None)
        return loss

    # ---------------------------------------------------------------- the end of a step

    def finish(self, params: Sequence[Tensor], entry: Entry | None = None) -> EndSeen | DropReason | None:
        """Look at the end of the step that ends in this iteration; called before the optimizer steps.

        Args:
            params: Parameters of the optimizer as they are now.
            entry: Where they were when `step` was called, if the optimizer has moved away since.

        Returns:
            What was seen, the reason why the pair is dropped, or None if there is none.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        reason = self._obstacle()
        if reason is not None:
            return reason
        iteration, direction = self.iteration, pending.direction
        frozen, self._frozen = self._frozen, None
        if not direction.belongs_to(params) or (frozen is not None and _frozen(params) - frozen):
            return DropReason.PARAMETERS_CHANGED  # of those frozen since nobody knows the slope here
        if not direction.intact():
            self._keep_direction = True
            return DropReason.DIRECTION_OVERWRITTEN
        product = iteration.end_product
        if product is None:  # gradients set by hand
            product = direction.products([param.grad for param in iteration.params])
        backend, slopes = iteration.task.backend, None
        edited = iteration.was_edited()
        due = "end" in iteration.task.due and backend is not None and not self._nothing_to_scatter()
        if due and backend is not None:
            at = params if entry is None else entry.params
            slopes = _harmlessly(iteration.passes, lambda: backend.end_slopes(direction, at))
        return EndSeen(pending, product, edited, slopes, due and slopes is None)

    def _nothing_to_scatter(self) -> bool:
        """Whether the batch has one sample only; of several processes, whether this one has none."""
        iteration = self.iteration
        return iteration.loss.samples == 1 if self.exchange is None else iteration.without_data()

    def paired(self, seen: EndSeen) -> PendingPair | DropReason:
        """Put both ends of a step together."""
        start, direction = seen.start, seen.start.direction
        if not isinstance(start.point, EndPoint):  # made when others were there
            return DropReason.OTHER_RANK
        # Where somebody has changed the parameters since, the slopes of samples are those of another point.
        point = self._observe("end", direction, seen.product, None, seen.edited, seen.slopes)
        return PendingPair(
            start.iteration,
            direction.length,
            direction.moved,
            seen.edited,
            start.point,
            point,
            start.lr,
            self._doubt,
        )

    def _observe(
        self,
        role: Role,
        direction: Direction,
        product: Tensor,
        factor: Tensor | None,
        lost: Truth,
        slopes: SampleSlopes | None,
    ) -> EndPoint:
        """One end of a step; variances as they were the last time if not measured now."""
        iteration, loss = self.iteration, self.iteration.loss
        passes = iteration.passes.reached
        gamma = gamma_of(passes)
        due = role in iteration.task.due
        alone = loss.samples == 1 or inseparable(passes)
        loss_variance = loss.variance
        slope_variance: Number | None = None
        doubtful: Truth = False
        backend = iteration.task.backend
        told = backend is not None and bool(backend.unaccounted.reasons)
        known = self.variances.of_slope(role) if self.variances.sampled and self.exchange is None else None
        if due and not alone and slopes is None and not told and known is not None:
            # In vain this time only (the model was called otherwise, say): what is known stands until the next one.
            slope_variance = known
            self.variances.missed()
        elif due and not alone:
            if slopes is not None:
                # Along d / |d|, so that it can stand in for other steps.
                slope_variance = sample_variance(slopes.values / direction.length.to(slopes.values.device))
                doubtful = self._doubtful(role, slopes, product, factor, gamma, lost)
                if doubtful is True:  # already told
                    doubtful, slope_variance = False, None
                if slopes.losses is not None:
                    loss_variance = sample_variance(slopes.losses)
                    self.variances.saw_loss(loss_variance)
            # Of a step of no length nothing is learned, and nan would stand for all that follow, till the next time.
            stands = slope_variance is not None and self.variances.sampled
            stands = stands or free_to_read(direction.length.device)
            if not (stands and read([direction.length])[0] == 0.0):
                self.variances.measured(role, iteration.task.number, slope_variance, loss.samples)
        elif not alone:
            slope_variance = self.variances.of_slope(role)
        if loss.samples == 1 or (told and slope_variance is None):
            loss_variance = None  # where samples interact their losses say no more than their slopes
        return EndPoint(product, factor, gamma, loss.mean, loss_variance, slope_variance, lost, doubtful, loss.samples)

    def _doubtful(
        self,
        role: Role,
        slopes: SampleSlopes,
        product: Tensor,
        factor: Tensor | None,
        gamma: Tensor | None,
        lost: Truth,
    ) -> Truth:
        """Whether all samples together do not give the slope of the gradients."""
        if not slopes.complete or (role == "start" and not slopes.repeated):
            return False
        slope = _slope_of_loss(product, factor, gamma)
        # A sum that is not finite is told by its own status, not by this one.
        apart = slopes.apart_from(slope, tolerance_of(self.iteration.params))
        apart = apart & ~torch.as_tensor(lost, device=apart.device)
        if free_to_read(apart.device):
            if read([apart])[0]:
                self._doubt()
                return True
            return False
        return apart

    def _doubt(self) -> None:
        """Samples did not add up to the gradient: tell the backend that found them, or the next one that is at hand."""
        backend = self.iteration.task.backend
        self._untold = backend is None
        if backend is not None:
            backend.doubted(OTHER_TERMS)

    # ---------------------------------------------------------------- the start of a step

    def start_obstacle(self, params: Sequence[Tensor], entry: Entry | None = None) -> DropReason | None:
        """Say why this iteration cannot start a pair of ``params``; None if it can."""
        reason = self._obstacle()
        if reason is not None:
            return reason
        iteration = self.iteration
        edited = iteration.gradients.params_edited(params) if entry is None else entry.edited
        as_hooked = same_tensors(params, iteration.params) and not edited
        return None if as_hooked else DropReason.PARAMETERS_CHANGED

    def _obstacle(self) -> DropReason | None:
        """Say why nothing was observed in this iteration, or None."""
        iteration = self.iteration
        trouble = iteration.passes.trouble
        if trouble is not None:
            return DropReason.OUT_OF_MEMORY if trouble.out_of_memory else DropReason.EXCEPTION
        if iteration.passes.skipped:
            return DropReason.STEP_SKIPPED
        gradients = iteration.gradients
        # Those of the step before may have been exchanged since (`param.grad = torch.autograd.grad(...)`).
        gradients.added_to_old = gradients.added_to_old and self.gradient_hooks.reused(iteration.params)
        if gradients.added_to_old or gradients.written_between:
            return DropReason.GRADIENTS_MODIFIED
        seen = iteration.gradients.any_seen or self.gradient_hooks.fresh(iteration.params)
        return None if seen else DropReason.NO_BACKWARD

    def entry(self) -> Entry | None:
        """Keep where the parameters are, if a backward pass has left gradients before `step` was called."""
        iteration = self.iteration
        watched = iteration.task.in_pair or iteration.task.guarded
        if not watched or not iteration.gradients.any_seen:
            return None
        params = iteration.params
        elements, edited = self._some_elements.of(params), iteration.gradients.params_edited(params)
        return Entry(elements, [param.detach().clone() for param in params], edited)

    def left(self, entry: Entry) -> bool:
        """Whether the parameters are no longer where they were."""
        return bool(read([differ(self._some_elements.of(self.iteration.params), entry.elements)])[0])

    def before_step(self, optimizer: Optimizer, kept: list[Tensor] | None, lr: tuple[float | Tensor, ...]) -> None:
        """Keep what tells the direction after the step.

        Args:
            optimizer: The wrapped optimizer.
            kept: A copy of the parameters that a guard keeps anyway.
            lr: Learning rates of the step.
        """
        iteration = self.iteration
        iteration.used_gradients = iteration.gradients.of_loss(iteration.params)
        iteration.lr = lr
        if is_plain_sgd(optimizer):
            iteration.before = iteration.elements_now()
            if iteration.records:  # differences of parameters tell nothing after a step that is too long
                iteration.start = [param.detach().clone() for param in iteration.params] if kept is None else kept
        elif kept is not None:
            self._before = []
            iteration.before = kept
        else:
            self._before = copied(self._before, iteration.params)
            iteration.before = self._before

    def after_step(self, optimizer: Optimizer) -> DropReason | None:
        """Reduce the start along the step just made and wait for its end; or the reason why it is dropped."""
        iteration = self.iteration
        gradients, before = iteration.used_gradients, iteration.before
        assert gradients is not None
        assert before is not None
        altered: Truth = not gradients.intact()
        if altered is False and not is_of_torch(optimizer):
            altered = iteration.gradients.altered_by_step(gradients)
            if iteration.task.due:  # a device is waited for then anyway
                altered = read([altered])[0] != 0.0
        if isinstance(altered, Tensor):
            lost = altered | torch.as_tensor(gradients.lost, device=altered.device)
            gradients = iteration.used_gradients = replace(gradients, lost=lost)
        elif altered:  # used as scratch memory by the optimizer: copied from now on
            self.habits.keep_copies = True
            return DropReason.GRADIENTS_MODIFIED
        params = iteration.params
        elements = self._some_elements.of(params)
        direction: AlongGradient | BetweenPoints
        weights = None if self.exchange is None else self.exchange.ranks.weights
        if isinstance(before, Tensor):
            direction = AlongGradient.of(optimizer, differ(elements, before), weights)
            direction.before = iteration.start
            product = direction.products(gradients.tensors)
        else:
            # Where slopes of samples are due the point itself is needed, too.
            overwrite = before is self._before and "start" not in iteration.task.due
            direction, product = BetweenPoints.of(before, params, gradients.tensors, overwrite, weights)
        slopes, backend = None, iteration.task.backend
        due = "start" in iteration.task.due and backend is not None and not self._nothing_to_scatter()
        if due and backend is not None:
            expected = self._expected(product, gradients.factor)
            slopes = _harmlessly(iteration.passes, lambda: backend.start_slopes(direction, gradients, expected))
        point: EndPoint | StartAcrossRanks
        if self.exchange is None:
            point = self._observe("start", direction, product, gradients.factor, gradients.lost, slopes)
        else:
            point = self.exchange.start(iteration, direction, product, slopes, due and slopes is None)
        if isinstance(direction, AlongGradient):
            direction.before = None
            self._keep_direction = self._keep_direction or self.gradient_hooks.reused(params)
            if self._keep_direction or iteration.task.number == 0:  # nothing is known of the loop yet
                direction.keep()
        self.pending = PendingStart(iteration.task.number, direction, point, elements, iteration.lr)
        self._frozen = _frozen(params)
        return None

    def _expected(self, product: Tensor, factor: Tensor | None) -> Expected:
        """What the mean over all samples at the start has to be."""
        iteration = self.iteration
        if self.exchange is not None:  # this rank's samples are a part of all; all together are looked at later
            return Expected(None, iteration.loss.mean, iteration.interacting, iteration.all_of_loss())
        slope = _slope_of_loss(product, factor, gamma_of(iteration.passes.reached))
        gradients = iteration.used_gradients
        lost = gradients is not None and gradients.lost
        if isinstance(lost, Tensor):  # nan is compared with nothing, and asks no device
            slope = torch.where(lost.to(slope.device), math.nan, slope)
        return Expected(slope, iteration.loss.mean, iteration.interacting, iteration.all_of_loss())

    # ---------------------------------------------------------------- resume

    def state_dict(self, tensors: bool = True) -> dict[str, Any]:
        """Return what a resumed run needs: the pending step, variances, skipped passes, what was learned of the loop.

        Args:
            tensors: Whether the pending step is in it.
        """
        habits, pending = self.habits, self.pending if tensors else None
        exchange = None if self.exchange is None else self.exchange.state_dict()  # reads what waits to be read
        return {
            "habits": [habits.compare_norms, habits.keep_copies, habits.asked],
            "keep_direction": self._keep_direction,
            "untold": self._untold,
            "variances": self.variances.state_dict(),
            "pending": None if pending is None else pending.state_dict(),
            "unused": to_plain(self.iteration.unused()),
            "exchange": exchange,
        }

    def load_state_dict(
        self, state: dict[str, Any], params: list[Tensor], iteration: int, ranks: Ranks | None = None
    ) -> None:
        """Take over a state of an iteration; its tensors move to the devices of ``params``."""
        self.talk_to(ranks)
        if self.exchange is not None and state.get("exchange") is not None:
            self.exchange.load_state_dict(state["exchange"])
        habits = self.habits
        habits.compare_norms, habits.keep_copies, habits.asked = map(bool, state["habits"])
        self.variances.load_state_dict(state["variances"])
        self._keep_direction, self._untold = bool(state["keep_direction"]), bool(state.get("untold", False))
        self.iteration = self._new(replace(self.iteration.task, number=iteration), params)
        unused = {name: value for name, value in state.get("unused", {}).items() if name != "discarded"}  # until 0.2.0
        self.iteration.take_over(from_plain(Unused, unused, "unused"))
        pending = state["pending"]
        self.pending = None if pending is None else PendingStart.from_state(pending, params, ranks)


def _frozen(params: Sequence[Tensor]) -> set[int]:
    """Which parameters are not trained."""
    return {id(param) for param in params if not param.requires_grad}


def _harmlessly(passes: BackwardPasses, call: Callable[[], R]) -> R | None:
    """What a backend answers; None, and it is told, if it raises something that is not about memory."""
    try:
        return call()
    except Exception as error:
        if is_out_of_memory(error) or goes_on(error):
            raise
        passes.failed(error)
        return None


def _slope_of_loss(product: Tensor, factor: Tensor | None, gamma: Tensor | None) -> Tensor:
    """<d, gradient of the mean loss> from that of the gradients used: not clipped, nor scaled."""
    slope = product if factor is None else product / factor
    return slope if gamma is None else slope / gamma
