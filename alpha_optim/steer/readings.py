"""What the guard judges, read from the device in one small transfer: the loss, and whether everything is finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alpha_optim.distributed import USUAL, local
from alpha_optim.measure.across_ranks import Report, Together
from alpha_optim.measure.step_ends import BatchLoss
from alpha_optim.observe.numbers import Number, free_to_read, read, saved
from alpha_optim.steer.point import persistent_buffers

LARGEST = 1.8e19
"""Norms above this have squares that float32 does not hold: second moments and running variances would be infinite for
ever."""


class Reading(NamedTuple):
    """What is judged, read from the device.

    Attributes:
        loss: Mean loss, None if not observed.
        variance: Variance of one sample's loss, None if not observed.
        samples: N, 0 if not known.
        params_broke: Whether a parameter that was finite is so no longer.
        buffers_broke: Whether a buffer is.
        gradient: Whether all gradients are finite, and their squares: second moments would hold an inf for ever.
        can_return: Whether the point before the last step can be put back, on every rank.
    """

    loss: float | None
    variance: float | None
    samples: int
    params_broke: bool = False
    buffers_broke: bool = False
    gradient: bool = True
    can_return: bool = True


UNSEEN = Reading(None, None, 0)
UNSEEN_LOSS = BatchLoss(None, None, 0)


class Readings:
    """Reads norms of parameters, buffers and gradients, and remembers which of the state were finite."""

    def __init__(self, model: nn.Module | None) -> None:
        """Start with nothing read.

        Args:
            model: Model whose buffers belong to the state.
        """
        self._model = model
        self._finite: Sequence[bool] | Tensor | None = None  # per tensor, at the point accepted last
        self._found: Sequence[bool] | Tensor = ()  # the same, as it was read last

    def accepted(self) -> None:
        """The point that was read last is accepted: what is not finite there is meant to be."""
        self._finite = self._found

    def read(self, loss: BatchLoss, params: Sequence[Tensor], gradients: bool = True) -> Reading:
        """Read what is judged, in one transfer.

        Args:
            loss: The loss.
            params: The parameters, with the gradients the optimizer is about to use.
            gradients: Whether to look at gradients, too.
        """
        found, known, count = self._norms(params, gradients)
        norms, mean, variance = _together(found, loss.mean, loss.variance)
        finite = [norm <= LARGEST for norm in norms]  # false for nan
        before = self._finite if self._finite is not None and len(self._finite) == count else finite
        broke = [bool(was) and not now for was, now in zip(before, finite, strict=False)]
        self._found = finite[:count]
        return Reading(mean, variance, loss.samples, any(broke[:known]), any(broke[known:]), all(finite[count:]))

    @torch.no_grad()
    def report(self, report: Report, params: Sequence[Tensor], gradients: bool = True) -> Report:
        """Add to a report to other ranks what is not finite on this one; nothing is read from the device.

        Args:
            report: The report.
            params: The parameters, with the gradients the optimizer is about to use.
            gradients: Whether to look at gradients, too.
        """
        if free_to_read(params[0].device):
            now = self.read(UNSEEN_LOSS, params, gradients)
            return replace(
                report,
                params_broke=now.params_broke,
                buffers_broke=now.buffers_broke,
                gradient_broke=not now.gradient,
            )
        norms, known, count = self._norms(params, gradients)
        finite = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]) <= LARGEST  # false for nan
        before = finite[:count]
        if self._finite is not None and len(self._finite) == count:
            before = torch.as_tensor(self._finite, device=finite.device)
        broke = before & ~finite[:count]
        self._found = finite[:count]
        return replace(
            report,
            params_broke=broke[:known].any(),
            buffers_broke=broke[known:].any(),
            gradient_broke=~finite[count:].all(),
        )

    def _norms(self, params: Sequence[Tensor], gradients: bool) -> tuple[list[Tensor], int, int]:
        """Norms of parameters, buffers and gradients, and how many are of parameters, and of them and buffers."""
        buffers = [b for entry in persistent_buffers(self._model) for b in entry if b.is_floating_point()]
        given = [param.grad for param in params if gradients and param.grad is not None]
        return _norms([*params, *buffers, *given]), len(params), len(params) + len(buffers)

    @staticmethod
    def heard(variance: Number | None, together: Together) -> Reading:
        """What is judged, over all ranks; with the variance of one sample's loss."""
        sums = together.sums
        return Reading(
            together.loss,
            saved(variance),
            together.samples,
            bool(sums.params_broke),
            bool(sums.buffers_broke),
            not sums.gradient_broke,
            not sums.no_return,
        )

    def state_dict(self) -> list[bool] | None:
        """Return plain values."""
        return None if self._finite is None else torch.as_tensor(self._finite).tolist()

    def load_state_dict(self, state: list[bool] | None) -> None:
        """Take over a state."""
        self._finite = None if state is None else list(map(bool, state))


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor ``[]``, in a type wide enough."""
    if all(type(t) in USUAL and t.dtype is torch.float32 and t.layout is torch.strided for t in tensors):
        return list(torch._foreach_norm(tensors))  # nearly always, in a third of the time
    plain = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in map(local, tensors)]
    plain = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in plain]
    narrow = [t.dtype in (torch.float16, torch.bfloat16) for t in plain]
    if not any(narrow):
        return list(torch._foreach_norm(plain))
    return [  # the norm of a large tensor is beyond what 16 bits hold
        torch.linalg.vector_norm(t, dtype=torch.float32 if wide else None)
        for t, wide in zip(plain, narrow, strict=True)
    ]


def _together(norms: list[Tensor], *others: Any) -> tuple[Any, ...]:
    """Fetch norms and other numbers; in one transfer where they lie on one device."""
    first = norms[0]
    if len({(norm.dtype, norm.get_device()) for norm in norms}) > 1:
        values = read([*norms, *others])
        return values[: len(norms)], *values[len(norms) :]
    stacked = torch.stack(norms)
    if stacked.is_cpu:
        return stacked.tolist(), *read(others)
    waiting = [other.detach().to(first.device, torch.float64) for other in others if isinstance(other, Tensor)]
    values = torch.cat([stacked.double(), *(value.reshape(1) for value in waiting)]).tolist()
    found = iter(values[len(norms) :])
    return values[: len(norms)], *(next(found) if isinstance(other, Tensor) else other for other in others)
