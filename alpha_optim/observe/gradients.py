"""Sees the gradients as the backward passes leave them, before clipping or unscaling.

The slopes are those of the loss; what clipping or a loss scale leaves in ``.grad`` is not the loss
gradient. Along the previous step the product with the gradient is taken when the backward pass ends. Along the
coming step it can only be taken after the step, from ``.grad``. Mostly that is a multiple of the loss gradient,
and some elements of every tensor, looked at when the backward pass ends and again at the step, tell the factor.
Norms are taken as well once gradients were written to in between. Where it was something else than one
factor, gradients are copied from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from alpha_optim.distributed import local
from alpha_optim.observe.hooks import being_captured, harmless, weakly
from alpha_optim.observe.memory import goes_on
from alpha_optim.observe.numbers import Truth, free_to_read
from alpha_optim.observe.some_elements import Views, differ, factor_between
from alpha_optim.observe.step_direction import copied, same_tensors

LOOKED_AT = 4
"""So many gradients tell whether they were cleared; those of single layers may be 0 anyway."""
PRECISION = 1e-5
"""Relative deviation of a gradient's norm up to which it counts as scaled by the common factor."""


@dataclass(frozen=True)
class LossGradients:
    """Gradients of what was sent backward, up to a factor.

    Attributes:
        tensors: One per parameter, None where there is none; divided by ``factor`` they are what the backward
            passes left.
        factor: What happened to them since ``[]``; None if nothing did.
        lost: Whether they were changed otherwise, so that the gradient of the loss is not known.
        versions: Versions of the tensors when they were taken.
    """

    tensors: list[Tensor | None]
    factor: Tensor | None
    lost: Truth
    versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Note what the tensors are like now."""
        self.versions[:] = [-1 if tensor is None else tensor._version for tensor in self.tensors]

    def intact(self) -> bool:
        """Whether nobody has written to them since: some optimizers use gradients as scratch memory."""
        return self.versions == [-1 if tensor is None else tensor._version for tensor in self.tensors]

    def kept(self) -> LossGradients:
        """The same in tensors that nobody else holds."""
        copies = [None if tensor is None else tensor.clone() for tensor in self.tensors]
        return LossGradients(copies, self.factor, self.lost)


@dataclass
class Habits:
    """What was learned about the loop.

    Attributes:
        compare_norms: Gradients are written to between backward pass and step.
        keep_copies: They are changed by more than a factor, and copied when the backward pass ends.
        asked: Whether a device was asked for that once.
    """

    compare_norms: bool = False
    keep_copies: bool = False
    asked: bool = False


class _Seen(NamedTuple):
    param: Tensor
    gradient: Tensor
    version: int
    param_version: int


@dataclass
class _Left:
    """What the last backward pass left, in the order of the gradients seen."""

    views: Views
    elements: Tensor
    norms: Tensor | None
    copies: list[Tensor] | None


class Gradients:
    """The gradients of one iteration."""

    def __init__(self, habits: Habits, buffer: list[Tensor]) -> None:
        """Start with none seen.

        Args:
            habits: What was learned about the loop, shared by all iterations.
            buffer: Memory for copies, shared as well.
        """
        self._habits, self._buffer = habits, buffer
        self.added_to_old = False
        """Whether they were added to those of the step before, which nobody had cleared."""
        self.written_between = False
        """Whether they were written to between two backward passes, so that the sum is not that of the passes."""
        self._params: dict[int, Tensor] = {}  # that got a gradient, by id; `GradientHooks` writes it
        self._seen: list[_Seen] = []
        self._left: _Left | None = None
        self._taken: tuple[LossGradients, Views, Tensor] | None = None  # what the step is given, some elements of it

    def forget(self) -> None:
        """Forget the gradients seen so far: they were thrown away."""
        self._params.clear()
        self._seen, self._left, self.added_to_old, self.written_between = [], None, False, False

    def pass_begins(self) -> None:
        """Another backward pass has begun, and has reached one parameter at most."""
        there = [seen for seen in self._seen if seen.param.grad is seen.gradient]
        written = [seen.gradient for seen in there if seen.gradient._version != seen.version]
        if len(written) > 1 or len(written) == len(there) == 1:
            changed = int((_norms(written) != 0.0).sum())  # the others were cleared
            self.written_between = self.written_between or changed > 1 or changed == len(there)

    def backward_ended(self, look: bool) -> None:
        """Take note of the gradients while nobody has touched them.

        Args:
            look: Whether to look at their elements, too.
        """
        self._seen = [
            _Seen(param, gradient, gradient._version, param._version)
            for param in self._params.values()
            if (gradient := param.grad) is not None
        ]
        if not self._seen or not look:
            return
        gradients = [seen.gradient for seen in self._seen]
        if self._habits.keep_copies:
            self._buffer[:] = copied(self._buffer, gradients)
        views = Views(gradients)
        self._left = _Left(
            views,
            views.now(),
            _norms(gradients) if self._habits.compare_norms else None,
            self._buffer if self._habits.keep_copies else None,
        )

    def gone(self) -> bool:
        """Whether every gradient seen in this iteration was taken off its parameter or set to zero."""
        return bool(self._seen) and all(map(_cleared, self._seen))

    def not_finite(self) -> bool:
        """Whether a gradient seen in this iteration was not finite as the backward pass left it."""
        left, gradients = self._left, [seen.gradient for seen in self._seen]
        if not gradients:
            return False
        if all(seen.gradient._version == seen.version for seen in self._seen):
            found = [_norms(gradients)]
        elif left is None:
            return False
        else:  # what was written (clipping, say) makes no number finite that was not, but zeros do
            found = [left.elements, _norms(gradients) if left.norms is None else left.norms]
        return not all(bool(torch.isfinite(numbers).all()) for numbers in found)

    @property
    def any_seen(self) -> bool:
        """Whether a backward pass has left gradients in this iteration."""
        return bool(self._params)

    def of_loss(self, params: Sequence[Tensor]) -> LossGradients:
        """Gradients as the backward passes left them, in the order of ``params``; called before the step."""
        left, self._taken = self._left, None
        if left is None:  # set by hand, or no gradient at all
            return LossGradients([param.grad for param in params], None, False)
        if left.copies is not None:
            copies = {id(seen.param): copy for seen, copy in zip(self._seen, left.copies, strict=True)}
            return LossGradients([copies.get(id(param), param.grad) for param in params], None, False)
        by_param = {id(seen.param): seen.gradient for seen in self._seen}
        tensors = [by_param.get(id(param), param.grad) for param in params]
        written = any(seen.gradient._version != seen.version for seen in self._seen)
        views = left.views if left.views.lasting else Views([seen.gradient for seen in self._seen])
        now = views.now()
        found = self._compared(tensors, now, left, written, params[0].device)
        self._taken = (found, views, now) if views.lasting else None
        return found

    def altered_by_step(self, gradients: LossGradients) -> Truth:
        """Whether the step has written to the gradients it was given in ways that versions do not tell (``.data``)."""
        if self._taken is None or self._taken[0] is not gradients:
            return False
        _, views, before = self._taken
        return differ(views.now(), before)

    def _compared(
        self, tensors: list[Tensor | None], now: Tensor, left: _Left, written: bool, device: torch.device
    ) -> LossGradients:
        """What happened to the gradients between the backward pass and the step, from some elements of them."""
        if not written and now.is_cpu and torch.equal(now, left.elements):
            return LossGradients(tensors, None, False)
        factor, lost = factor_between(now, left.elements)
        surely = lost
        if written:
            norms = _norms([seen.gradient for seen in self._seen])
            lost = lost | _otherwise(norms, left.norms, factor)
            surely = surely if left.norms is None else lost
        self._decide_on_copies(written, surely)
        return LossGradients(tensors, factor.to(device), lost.to(device))

    def _decide_on_copies(self, written: bool, lost: Tensor) -> None:
        """Copy from now on if gradients are changed by more than a factor."""
        habits = self._habits
        if lost.device.type == "cpu":  # reading memory, not waiting for a device
            habits.keep_copies = bool(lost.tolist())
        elif written and habits.compare_norms and not habits.asked:
            habits.asked, habits.keep_copies = True, bool(lost)
        habits.compare_norms = habits.compare_norms or written

    def params_edited(self, params: Sequence[Tensor]) -> bool:
        """Whether a parameter was written to between its gradient and now."""
        theirs = set(map(id, params))
        return any(seen.param._version != seen.param_version and id(seen.param) in theirs for seen in self._seen)


class GradientHooks:
    """Hooks on the parameters that fire after a gradient was accumulated."""

    def __init__(self, iteration: Callable[[], Any]) -> None:
        """Prepare; nothing is hooked before `attach`.

        Args:
            iteration: Returns the iteration in progress: its ``backward_reached()`` is called at the first gradient
                of a backward pass, ``accumulated(param)`` at each if they are wanted, ``backward_ended()`` at the end.
        """
        self._iteration = iteration
        self._handles: list[RemovableHandle] = []
        self._hooked: list[Tensor] = []
        self._awaited: int | None = None  # backward pass at whose end we look
        self._gradients = Gradients(Habits(), [])
        self._each: Callable[[Tensor], None] | None = None
        self._late = False
        self._waiting: list[Tensor] = []  # parameters that ``each`` is called with late
        self._used: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._after_step = False  # whether these were used by a step, or were there when hooks were attached
        self._passes = 0  # that have reached a parameter since

    def attach(
        self,
        params: Sequence[Tensor],
        gradients: Gradients,
        each: Callable[[Tensor], None] | None,
        late: bool = False,
    ) -> None:
        """Hook every parameter that can get a gradient; leave hooks that are there where they are.

        Args:
            params: The parameters.
            gradients: Takes note of those that get one.
            each: Called with each of them inside the backward pass, if that is wanted.
            late: Whether gradients are complete only after what others do at the end of the backward pass:
                `DistributedDataParallel` averages them over ranks there.
        """
        self._late, self._waiting = late, []
        self._awaited, self._gradients, self._each = None, gradients, each
        # Parameters of lazy layers are hooked once they exist.
        wanted = [param for param in params if param.requires_grad and param.is_leaf and not is_lazy(param)]
        if self._handles and same_tensors(wanted, self._hooked):
            return
        self.detach()
        self._hooked = wanted
        # Python's collector does not see through a tensor's hooks: a strong reference would keep all for ever.
        accumulated = weakly(self._accumulated)
        self._handles = [param.register_post_accumulate_grad_hook(accumulated) for param in wanted]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], []

    def _failed(self, error: BaseException) -> None:
        self._iteration().passes.failed(error)

    def _accumulated(self, param: Tensor) -> None:
        try:  # as `harmless` does, but for every parameter: Ctrl-C need not wait for so little
            if being_captured():
                return
            self._gradients._params[id(param)] = param
            task = torch._C._current_graph_task_id()
            if task != self._awaited:
                self._awaited = task
                engine: Any = Variable._execution_engine
                engine.queue_callback(harmless(self._ended, self._failed))
                self._passes += 1
                self._iteration().backward_reached()
            if self._each is not None and self._late:
                self._waiting.append(param)
            elif self._each is not None:
                self._each(param)
        except BaseException as error:
            self._failed(error)
            if goes_on(error):
                raise

    def _ended(self) -> None:
        self._awaited = None
        if self._late:  # once more at the end of the queue
            engine: Any = Variable._execution_engine
            engine.queue_callback(harmless(self._completed, self._failed))
        else:
            self._completed()

    def _completed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for param in waiting:
            if self._each is not None:
                self._each(param)
        if self._handles:
            self._iteration().backward_ended()

    def _held(self, params: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Gradients that the last step used and that are still there, and how often each was written to since."""
        pairs = [(param.grad, self._used.get(id(param))) for param in params if param.grad is not None]
        return [(grad, grad._version - used[1]) for grad, used in pairs if used is not None and used[0]() is grad]

    def fresh(self, params: Sequence[Tensor]) -> bool:
        """Whether there is a gradient that the last step did not already use."""
        there = sum(param.grad is not None for param in params)
        return there > sum(writes == 0 for _, writes in self._held(params))

    def reused(self, params: Sequence[Tensor]) -> bool:
        """Whether gradients are written into the tensors of the step before."""
        return bool(self._held(params))

    def pass_begins(self, params: Sequence[Tensor]) -> None:
        """A backward pass has begun; without a model it has reached its first parameter already."""
        gradients = self._gradients
        if not self._after_step:
            return
        held = self._held(params)
        before, gradients.added_to_old = gradients.added_to_old, False
        least = min((writes for _, writes in held), default=0)
        # Written to by nothing else than the passes, of which there was one before if they were added to old ones then.
        if not held or any(writes > self._passes for _, writes in held) or (not before and least > 0):
            return
        # `grad.data.zero_()` is told by no version; those that this pass has not reached yet tell by their values.
        waiting = [local(grad) for grad, writes in held if writes == least][:LOOKED_AT]
        readable = [grad for grad in waiting if free_to_read(grad.device) and grad.layout is torch.strided]
        gradients.added_to_old = any(bool(grad.any()) for grad in readable) if readable else before

    def step_done(self, params: Sequence[Tensor], after_step: bool = True) -> None:
        """Remember which gradients the step used up; or which were there when hooks were attached between two."""
        self._after_step, self._passes = after_step, 0
        self._used = {
            id(param): (weakref.ref(param.grad), param.grad._version) for param in params if param.grad is not None
        }


def _cleared(seen: _Seen) -> bool:
    """Whether a gradient was taken off its parameter or set to zero; DDP may put it into another tensor as it is."""
    now = seen.param.grad
    if now is seen.gradient:
        return now._version != seen.version and not bool(_norms([now]).any())
    return now is None or now.layout is not seen.gradient.layout or not torch.equal(local(now), local(seen.gradient))


def _otherwise(now: Tensor, then: Tensor | None, factor: Tensor) -> Tensor:
    """Whether norms say that gradients changed by something else than the factor ``[]``."""
    if then is None:
        # All looked-at elements as they were: clipping by value may have changed others.
        return factor == 1.0
    expected = then * factor.abs()
    return ((now - expected).abs() > PRECISION * expected).any()


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    """Norms of gradients, float64 ``[K]``."""
    values = [g.detach()._values() if g.is_sparse else g.detach() for g in map(local, gradients)]
    half = any(value.dtype in (torch.float16, torch.bfloat16) for value in values)
    norms = torch._foreach_norm(values, 2.0, dtype=torch.float32 if half else None)
    return torch.stack([norm.to(values[0].device, torch.float64) for norm in norms])
