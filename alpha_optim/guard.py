"""When to take a step back, and how.

A step is judged by the loss that follows it. It is taken back when that loss is not finite, or has
risen by more than its own noise explains:

    f1 - f0 > k sqrt(var_f0 / N0 + var_f1 / N1),

with k the Student-t quantile of one in a million at N0 + N1 - 2 degrees of freedom (4.9 for batches
of 128, 7.4 for 8). Per-sample losses of an exploding batch scatter as widely as they rise, and for
scalar losses there is no variance at all; so a rise of more than `SCATTER` times the usual difference
between consecutive batches counts too, once `WARM` differences are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from alpha_optim.pairs import BatchLoss
from alpha_optim.records import GuardEvent

FALSE_ALARM = 1e-6
SCATTER = 10.0
WARM = 10
MEMORY = 0.98  # weight of the past in the usual difference


@lru_cache(maxsize=4096)
def rise_limit(samples_start: int, samples_end: int) -> float:
    """The k of the module docstring, a pure number; infinite below two samples at either end."""
    if samples_start < 2 or samples_end < 2:
        return math.inf
    from scipy.special import stdtrit

    return float(stdtrit(samples_start + samples_end - 2, 1.0 - FALSE_ALARM))


class Guard:
    """Keeps the point before the last step and goes back to it."""

    def __init__(self, model: nn.Module | None) -> None:
        """Start with nothing kept.

        Args:
            model: Model whose floating point buffers are kept together with the parameters.
        """
        self._model = model
        self._params: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._loss: Tensor | None = None  # loss before the step and variance of its mean [2]
        self._samples = 0
        self._scatter: Tensor | None = None  # mean squared difference of consecutive losses []
        self._differences = 0
        self.stepped = False

    @torch.no_grad()
    def judge(self, iteration: int, loss: BatchLoss, params: Sequence[Tensor]) -> GuardEvent | None:
        """Say what is wrong with the point reached, or None; reads one boolean from the device.

        Args:
            iteration: The iteration whose step is about to be made.
            loss: Its loss.
            params: The parameters, with the gradients the optimizer is about to use.
        """
        device = params[0].device
        gradients = [param.grad for param in params if param.grad is not None]
        checks = {
            "loss_not_finite": _not_finite([] if loss.mean is None else [loss.mean], device),
            "state_not_finite": _not_finite([*params, *self._floating_buffers()], device),
            "loss_rose": self._rose(loss, device),
            "gradient_not_finite": _not_finite(gradients, device),
        }
        if not bool(torch.stack(list(checks.values())).any()):
            return None
        reason = next(name for name, failed in checks.items() if bool(failed))
        before = float(self._loss[0]) if self._loss is not None and self.stepped else math.nan
        after = math.nan if loss.mean is None else float(loss.mean)
        blame = self.stepped and reason != "gradient_not_finite"
        return GuardEvent(iteration, reason, before, after, restored=blame)

    @torch.no_grad()
    def keep(self, params: Sequence[Tensor], loss: BatchLoss) -> None:
        """Keep the point from which a step is about to be made."""
        self._params = _kept(self._params, params)
        self._buffers = _kept(self._buffers, self._floating_buffers())
        if loss.mean is None:
            self._loss, self._samples = None, 0
            return
        mean = loss.mean.double()
        if self._loss is not None:
            squared = (mean - self._loss[0].to(mean.device)).square()
            if self._scatter is None:
                self._scatter = squared
            else:
                weight = MEMORY if self._differences >= WARM else self._share()
                self._scatter = weight * self._scatter.to(mean.device) + (1.0 - weight) * squared
            self._differences += 1
        noise = torch.full_like(mean, math.nan) if loss.variance is None else loss.variance.double()
        self._loss, self._samples = torch.stack([mean, noise.to(mean.device)]), loss.samples

    @torch.no_grad()
    def restore(self, params: Sequence[Tensor]) -> None:
        """Put parameters and floating point buffers back, bit for bit."""
        for now, kept in zip(params, self._params, strict=True):
            now.copy_(kept)
        for now, kept in zip(self._floating_buffers(), self._buffers, strict=True):
            now.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next judgement needs; tensors are copies."""
        return {
            "params": [kept.clone() for kept in self._params] if self.stepped else [],
            "buffers": [kept.clone() for kept in self._buffers] if self.stepped else [],
            "loss": self._loss,
            "samples": self._samples,
            "scatter": self._scatter,
            "differences": self._differences,
            "stepped": self.stepped,
        }

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Take over a state; tensors move to where the parameters are."""
        fits = len(state["params"]) == len(params)
        self.stepped = bool(state["stepped"]) and fits
        pairs = zip(state["params"], params, strict=True) if fits else ()
        self._params = [kept.to(param.device) for kept, param in pairs]
        self._buffers = [
            kept.to(now.device) for kept, now in zip(state["buffers"], self._floating_buffers(), strict=False)
        ]
        self._loss, self._scatter = state["loss"], state["scatter"]
        self._samples, self._differences = int(state["samples"]), int(state["differences"])

    def _rose(self, loss: BatchLoss, device: torch.device) -> Tensor:
        """Whether the loss rose beyond its noise ``[]``."""
        if loss.mean is None or self._loss is None or not self.stepped:
            return torch.zeros((), dtype=torch.bool, device=device)
        before, variance_before = self._loss.to(device)
        rise = loss.mean.to(device, torch.float64) - before
        rose = torch.zeros((), dtype=torch.bool, device=device)
        limit = rise_limit(self._samples, loss.samples)
        if loss.variance is not None and math.isfinite(limit):
            noise = variance_before / self._samples + loss.variance.to(device) / loss.samples
            rose = rise > limit * noise.sqrt()  # False where a variance is nan
        if self._scatter is not None and self._differences >= WARM:
            rose = rose | (rise > SCATTER * self._scatter.to(device).sqrt())
        elif loss.variance is None:
            rose = rise > 2.0 * before.abs()
        return rose

    def _share(self) -> float:
        """Plain mean of the first differences before the memory has filled."""
        return self._differences / (self._differences + 1.0)

    def _floating_buffers(self) -> list[Tensor]:
        if self._model is None:
            return []
        return [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]


def _not_finite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether a norm is not finite ``[]``.

    Also where numbers are finite but their squares are not: second moments and running variances would
    hold an inf for ever.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.bool, device=device)
    dense = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in tensors]
    norms = torch.stack([norm.to(device, torch.float32) for norm in torch._foreach_norm(dense)])
    return ~torch.isfinite(norms.square().sum())


def _kept(store: list[Tensor], now: Sequence[Tensor]) -> list[Tensor]:
    """Copy ``now`` into ``store``, reusing its memory where shapes and places agree."""
    if len(store) == len(now) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        for a, b in zip(store, now, strict=True)
    ):
        if store:
            torch._foreach_copy_(store, [tensor.detach() for tensor in now])
        return store
    return [tensor.detach().clone() for tensor in now]
