"""Sees the gradients as the backward passes leave them, before clipping or unscaling.

The slopes are those of the loss; what clipping or a loss scale leaves in ``.grad`` is not the loss
gradient. Mostly it is a multiple of it, and some elements of every tensor, looked at when the backward
pass ends and again at the step, tell the factor. Norms are taken as well once gradients were written to
in between. Where it was something else than one factor, gradients are copied from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from alpha_optim.observe.hooks import weakly
from alpha_optim.observe.scalars import Scalar, Truth, readable, scalar
from alpha_optim.observe.some_elements import factor_between, stays_view, together, view_of
from alpha_optim.observe.step_direction import copied, same_tensors, versions_of

PRECISION = 1e-5
"""Relative deviation of a gradient's norm up to which it counts as scaled by the common factor."""


@dataclass(frozen=True)
class LossGradients:
    """Gradients of what was sent backward, up to a factor.

    Attributes:
        tensors: One per parameter, None where there is none; divided by ``factor`` they are what the backward
            passes left.
        factor: What happened to them since; None if nothing did.
        lost: Whether they were changed otherwise, so that the gradient of the loss is not known.
        versions: Versions of the tensors when they were taken.
    """

    tensors: list[Tensor | None]
    factor: Scalar | None
    lost: Truth
    versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Note what the tensors are like now."""
        self.versions[:] = versions_of(self.tensors)

    def intact(self) -> bool:
        """Whether nobody has written to them since: some optimizers use gradients as scratch memory."""
        return self.versions == versions_of(self.tensors)

    def kept(self) -> LossGradients:
        """The same in tensors that nobody else holds."""
        copies = [None if tensor is None else tensor.clone() for tensor in self.tensors]
        return LossGradients(copies, self.factor, self.lost)


@dataclass
class _Seen:
    gradient: Tensor
    version: int
    param_version: int


@dataclass
class _Left:
    """What the last backward pass left, in the order of ``keys``."""

    keys: list[int]
    views: list[Tensor]
    spots: Tensor
    norms: Tensor | None
    copies: list[Tensor] | None


class GradientWatch:
    """Hooks on the parameters that fire after a gradient was accumulated."""

    def __init__(self, on_accumulated: Callable[[Tensor], None]) -> None:
        """Prepare; nothing is hooked before `attach`.

        Args:
            on_accumulated: Called with the parameter inside the backward pass.
        """
        self._on_accumulated = on_accumulated
        self._handles: list[RemovableHandle] = []
        self._hooked: list[Tensor] = []
        self._seen: dict[int, _Seen] = {}
        self._left: _Left | None = None
        self._awaited: int | None = None  # backward pass at whose end we look
        self._stale: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._buffer: list[Tensor] = []
        self._looks = True
        self.compare_norms = False
        self.keep_copies = False
        self._asked = False

    def attach(self, params: Sequence[Tensor], look: bool) -> None:
        """Hook every parameter that can get a gradient; leave hooks that are there where they are.

        Args:
            params: The parameters.
            look: Whether to look at the gradients, or only see that they come.
        """
        self.forget()
        self._looks = look
        wanted = [param for param in params if param.requires_grad and param.is_leaf]
        if self._handles and same_tensors(wanted, self._hooked):
            return
        self.mute()
        self._hooked = wanted
        # Python's collector does not see through a tensor's hooks: a strong reference would keep all for ever.
        accumulated = weakly(self._accumulated)
        self._handles = [param.register_post_accumulate_grad_hook(accumulated) for param in wanted]

    def detach(self) -> None:
        """Remove the hooks and forget what was seen."""
        self.mute()
        self.forget()

    def mute(self) -> None:
        """Remove the hooks; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], []

    def forget(self) -> None:
        """Forget the gradients seen so far; the hooks stay."""
        self._seen, self._left, self._awaited = {}, None, None

    def _accumulated(self, param: Tensor) -> None:
        gradient = param.grad
        assert gradient is not None
        self._on_accumulated(param)
        self._seen[id(param)] = _Seen(gradient, gradient._version, param._version)
        if not self._looks:
            return
        task = torch._C._current_graph_task_id()
        if task != self._awaited:
            self._awaited = task
            engine: Any = Variable._execution_engine
            engine.queue_callback(self._backward_done)

    def _backward_done(self) -> None:
        """Look at the gradients while nobody has touched them."""
        self._awaited = None
        records = list(self._seen.values())
        if not records or not self._handles:
            return
        gradients = [record.gradient for record in records]
        if self.keep_copies:
            self._buffer = copied(self._buffer, gradients)
        views = [view_of(gradient) for gradient in gradients]
        self._left = _Left(
            list(self._seen),
            views,
            together(views),
            _norms(gradients) if self.compare_norms else None,
            self._buffer if self.keep_copies else None,
        )
        for record in records:
            record.version = record.gradient._version

    def gradients_gone(self, params: Sequence[Tensor]) -> bool:
        """Whether every gradient seen in this iteration was taken off its parameter or set to zero."""
        seen = [(param, self._seen[id(param)]) for param in params if id(param) in self._seen]
        return bool(seen) and all(
            param.grad is not record.gradient
            or (param.grad._version != record.version and not bool(_norms([param.grad]).any()))
            for param, record in seen
        )

    def not_finite(self) -> bool:
        """Whether a gradient seen in this iteration was not finite as the backward pass left it."""
        if self._left is None:
            return False
        seen = [record.gradient for record in self._seen.values()]
        unwritten = all(record.gradient._version == record.version for record in self._seen.values())
        norms = _norms(seen) if unwritten else self._left.spots
        return not bool(torch.isfinite(norms).all())

    def saw_backward(self, params: Sequence[Tensor]) -> bool:
        """Whether there is a gradient that the last step did not already use."""
        if self._seen:
            return True
        for param in params:
            if param.grad is not None:
                used = self._stale.get(id(param))
                if used is None or used[0]() is not param.grad or param.grad._version != used[1]:
                    return True
        return False

    def loss_gradients(self, params: Sequence[Tensor]) -> LossGradients:
        """Gradients as the backward passes left them, in the order of ``params``."""
        device = params[0].device
        left = self._left
        if left is None:  # set by hand, or no gradient at all
            return LossGradients([param.grad for param in params], None, False)
        if left.copies is not None:
            copies = dict(zip(left.keys, left.copies, strict=True))
            return LossGradients([copies.get(id(param), param.grad) for param in params], None, False)
        records = [self._seen[key] for key in left.keys]
        written = any(record.gradient._version != record.version for record in records)
        seen = {key: record.gradient for key, record in zip(left.keys, records, strict=True)}
        tensors = [seen.get(id(param), param.grad) for param in params]
        now = together(
            [
                view if stays_view(record.gradient) else view_of(record.gradient)
                for view, record in zip(left.views, records, strict=True)
            ]
        )
        if not written and now.is_cpu and torch.equal(now, left.spots):
            return LossGradients(tensors, None, False)
        factor, lost = factor_between(now, left.spots)
        surely = lost
        if written:
            norms = _norms([record.gradient for record in records])
            lost = lost | _otherwise(norms, left.norms, factor)
            surely = surely if left.norms is None else lost
        self._decide_on_copies(written, surely)
        return LossGradients(tensors, scalar(factor.to(device)), readable(lost.to(device)))

    def _decide_on_copies(self, written: bool, lost: Tensor) -> None:
        """Copy from now on if gradients are changed by more than a factor."""
        if lost.device.type == "cpu":  # reading memory, not waiting for a device
            self.keep_copies = bool(lost.tolist())
        elif written and self.compare_norms and not self._asked:
            self._asked, self.keep_copies = True, bool(lost)
        self.compare_norms = self.compare_norms or written

    def params_edited(self, params: Sequence[Tensor]) -> bool:
        """Whether a parameter was written to between its gradient and now."""
        return any(
            record is not None and record.param_version != param._version
            for param, record in ((param, self._seen.get(id(param))) for param in params)
        )

    def reuses_gradients(self, params: Sequence[Tensor]) -> bool:
        """Whether gradients are written into the tensors of the step before, or may be."""
        known = [(param, self._stale.get(id(param))) for param in params if param.grad is not None]
        return any(used is None or used[0]() is param.grad for param, used in known)

    def step_done(self, params: Sequence[Tensor]) -> None:
        """Remember which gradients the step used up."""
        self._stale = {
            id(param): (weakref.ref(param.grad), param.grad._version)
            for param in params
            if param.grad is not None
        }

    def state_dict(self) -> dict[str, bool]:
        """Return what was learned about the loop."""
        return {
            "compare_norms": self.compare_norms,
            "keep_copies": self.keep_copies,
            "asked": self._asked,
        }

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Take over what was learned about the loop."""
        self.compare_norms, self.keep_copies = bool(state["compare_norms"]), bool(state["keep_copies"])
        self._asked = bool(state["asked"])


def _otherwise(now: Tensor, then: Tensor | None, factor: Tensor) -> Tensor:
    """Whether norms say that gradients changed by something else than the factor ``[]``."""
    if then is None:
        # All looked-at elements as they were: clipping by value may have changed others.
        return factor == 1.0
    expected = then * factor.abs()
    return ((now - expected).abs() > PRECISION * expected).any()


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    """Norms of gradients, float64 ``[K]``."""
    values = [g.detach()._values() if g.is_sparse else g.detach() for g in gradients]
    half = any(value.dtype in (torch.float16, torch.bfloat16) for value in values)
    norms = torch._foreach_norm(values, 2.0, dtype=torch.float32 if half else None)
    return torch.stack([norm.to(values[0].device, torch.float64) for norm in norms])
