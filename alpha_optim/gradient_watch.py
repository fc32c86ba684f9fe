"""Sees the gradients as the backward passes leave them, before clipping or unscaling.

The slopes are those of the loss; what clipping or a loss scale leaves in ``.grad`` is not the loss
gradient. A gradient that nobody touched until the step is used where it lies. Where gradients turn
out to be modified, copies are taken from the next iteration on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


@dataclass
class _Seen:
    gradient: Tensor
    version: int
    norm: Tensor
    param_version: int
    copy: Tensor | None


class GradientWatch:
    """Hooks on the parameters that fire after a gradient was accumulated."""

    def __init__(self, on_accumulated: Callable[[Tensor], None]) -> None:
        """Prepare; nothing is hooked before `attach`.

        Args:
            on_accumulated: Called with the parameter inside the backward pass.
        """
        self._on_accumulated = on_accumulated
        self._handles: list[RemovableHandle] = []
        self._seen: dict[int, _Seen] = {}
        self._stale: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.keep_copies = False

    def attach(self, params: Sequence[Tensor]) -> None:
        """Hook every parameter that can get a gradient."""
        self.detach()
        for param in params:
            if param.requires_grad and param.is_leaf:
                self._handles.append(param.register_post_accumulate_grad_hook(self._accumulated))

    def detach(self) -> None:
        """Remove the hooks and forget what was seen."""
        self.mute()
        self._seen = {}

    def mute(self) -> None:
        """Remove the hooks; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _accumulated(self, param: Tensor) -> None:
        gradient = param.grad
        assert gradient is not None
        self._on_accumulated(param)
        copy = None
        if self.keep_copies:
            copy = gradient.detach().clone()
        version, norm = gradient._version, _norm(gradient)
        self._seen[id(param)] = _Seen(gradient, version, norm, param._version, copy)

    def gradients_gone(self, params: Sequence[Tensor]) -> bool:
        """Whether every gradient seen in this iteration was taken off its parameter or set to zero."""
        seen = [(param, self._seen[id(param)]) for param in params if id(param) in self._seen]
        return bool(seen) and all(
            param.grad is not record.gradient or not bool(record.norm.ne(0) & _norm(param.grad).ne(0))
            for param, record in seen
        )

    def not_finite(self) -> bool:
        """Whether a gradient seen in this iteration was not finite as the backward pass left it."""
        norms = [record.norm for record in self._seen.values()]
        return not all(bool(torch.isfinite(norm)) for norm in norms)

    def forget(self) -> None:
        """Forget the gradients seen so far; the hooks stay."""
        self._seen = {}

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

    def loss_gradients(self, params: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Gradients as the backward passes left them, in the order of ``params``.

        Returns:
            One entry per parameter (None: no gradient); None instead of the list if gradients were
            modified since and there is no copy.
        """
        gradients: list[Tensor | None] = []
        untouched: list[_Seen] = []
        for param in params:
            record = self._seen.get(id(param))
            if record is None:  # set by hand, or no gradient at all
                gradients.append(None if param.grad is None else param.grad.detach())
            elif record.copy is not None:
                gradients.append(record.copy)
            elif record.gradient._version == record.version:
                untouched.append(record)
                gradients.append(record.gradient.detach())
            else:
                self.keep_copies = True
                return None
        if _altered(untouched):
            self.keep_copies = True
            return None
        return gradients

    def params_edited(self, params: Sequence[Tensor]) -> bool:
        """Whether a parameter was written to between its gradient and now."""
        return any(
            record is not None and record.param_version != param._version
            for param, record in ((param, self._seen.get(id(param))) for param in params)
        )

    def step_done(self, params: Sequence[Tensor]) -> None:
        """Remember which gradients the step used up."""
        self._stale = {
            id(param): (weakref.ref(param.grad), param.grad._version)
            for param in params
            if param.grad is not None
        }


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.detach()
    values = values.coalesce().values() if values.is_sparse else values
    half = values.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if half else None)
    return norm


def _altered(records: Sequence[_Seen]) -> bool:
    """Whether gradients were altered without a trace in their version.

    GradScaler unscales without one, and so does everything that goes through ``.data``.
    """
    if not records:
        return False
    device = records[0].norm.device
    then = torch.stack([record.norm.to(device, torch.float64) for record in records])
    now = torch.stack([_norm(record.gradient).to(device, torch.float64) for record in records])
    return not bool(torch.isclose(then, now, rtol=0.0, atol=0.0, equal_nan=True).all())


SAMPLED = 32


@torch.no_grad()
def fingerprint(params: Sequence[Tensor]) -> Tensor:
    """Norm and some elements of every parameter, float64; another one means that parameters were edited.

    Versions do not tell: edits through ``.data`` leave none, weights swapped and swapped back do.
    """
    parts = []
    for param in params:
        values = torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
        parts.append(_norm(values).reshape(1))
        if values.is_contiguous():
            parts.append(values.view(-1)[:: max(1, values.numel() // SAMPLED)][:SAMPLED])
    return torch.cat([part.to(parts[0].device, torch.float64) for part in parts])
