"""When to take a step back, and how.

A step is judged by the loss that follows it. It is taken back when that loss is not finite, or has
risen by more than its own noise explains:

    f1 - f0 > k sqrt(var_f0 / N0 + var_f1 / N1),

with k the Student-t quantile of one in a million at N0 + N1 - 2 degrees of freedom (4.9 for batches
of 128, 7.4 for 8), or by more than `SCATTER` times the usual difference between consecutive batches:
losses of an exploding batch scatter as widely as they rise, and a single number has no variance. What
is taken back counts among the usual differences too, so that a heavy-tailed loss cannot stop a run. A run
that diverges over many steps goes back further, see `good_point`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from alpha_optim.direction import copied
from alpha_optim.good_point import GoodPoint
from alpha_optim.pairs import BatchLoss
from alpha_optim.records import GuardEvent

FALSE_ALARM = 1e-6
SCATTER = 10.0
WARM = 10
"""Number of differences after which their mean counts."""
MEMORY = 0.98
"""Weight of the past in that mean."""


@lru_cache(maxsize=4096)
def rise_limit(samples_start: int, samples_end: int) -> float:
    """The k of the module docstring, a pure number; infinite below two samples at either end."""
    if samples_start < 2 or samples_end < 2:
        return math.inf
    from scipy.special import stdtrit

    return float(stdtrit(samples_start + samples_end - 2, 1.0 - FALSE_ALARM))


class Guard:
    """Keeps the point before the last step and the last good point, and goes back to them."""

    def __init__(self, model: nn.Module | None) -> None:
        """Start with nothing kept.

        Args:
            model: Model whose floating point buffers are kept together with the parameters.
        """
        self._model = model
        self._last: list[Tensor] = []
        self._good = GoodPoint()
        self._loss: Tensor | None = None  # loss before the step and variance of one sample's [2]
        self._samples = 0
        self._scatter: Tensor | None = None  # mean squared difference of consecutive losses []
        self._differences = 0
        self.stepped = False
        self.return_wanted = False  # to the good point, by a policy
        self.point_trusted = True  # by a policy: whether the point reached may become the good point

    @torch.no_grad()
    def judge(self, iteration: int, loss: BatchLoss, params: Sequence[Tensor]) -> GuardEvent | None:
        """Judge the point reached, with one small transfer from the device, and put right what is wrong.

        Args:
            iteration: The iteration whose step is about to be made.
            loss: Its loss.
            params: The parameters, with the gradients the optimizer is about to use.

        Returns:
            None if the step may be made; else what was wrong and whether a point was restored.
        """
        device, state = params[0].device, self._state(params)
        gradients = [param.grad for param in params if param.grad is not None]
        drifted, improved = self._good.drifted(device), self._good.improved(device)
        never = torch.zeros((), dtype=torch.bool, device=device)
        checks = {
            "loss_not_finite": _not_finite([] if loss.mean is None else [loss.mean], device),
            "state_not_finite": _not_finite(state, device),
            "loss_rose": self._rose(loss, device),
            "loss_drifted": never if drifted is None else drifted,
            "gradient_not_finite": _not_finite(gradients, device),
            "improved": never if improved is None else improved,
        }
        *failed, better = torch.stack(list(checks.values())).tolist()
        reason = next((name for name, bad in zip(checks, failed, strict=False) if bad), None)
        if reason == "loss_drifted" and self._good.accept(state):
            reason = drifted = None  # the window is closed
        if self.return_wanted and self._good.tensors:
            reason = "policy_returned"
        self.return_wanted = False
        if reason is not None:
            return self._put_right(iteration, reason, loss, state)
        if drifted is not None:
            self._good.close_window(better and self.point_trusted, state)
        self._keep(loss, state)
        return None

    def _put_right(self, iteration: int, reason: str, loss: BatchLoss, state: Sequence[Tensor]) -> GuardEvent:
        """Restore what the reason asks for."""
        before, after = math.nan, math.nan if loss.mean is None else float(loss.mean)
        restored = True
        if reason in ("loss_drifted", "policy_returned"):
            before, after = self._good.levels()
            self._good.go_back(state, counts=reason == "loss_drifted")
        elif self.stepped and reason != "gradient_not_finite":
            if reason == "loss_rose" and loss.mean is not None:
                self._note_difference(loss.mean)
            before = before if self._loss is None else float(self._loss[0])
            for now, kept in zip(state, self._last, strict=True):
                now.copy_(kept)
        else:
            restored = False
        self.stepped = False
        return GuardEvent(iteration, reason, before, after, restored)

    def _keep(self, loss: BatchLoss, state: Sequence[Tensor]) -> None:
        """Keep the point from which a step is about to be made."""
        self._last = copied(self._last, state)
        if loss.mean is None:
            self._loss, self._samples = None, 0
            return
        mean = loss.mean.double()
        self._note_difference(mean)
        error = None
        noise = torch.full_like(mean, math.nan)
        if loss.variance is not None and loss.samples:
            noise = loss.variance.to(mean.device, torch.float64)
            error = (noise / loss.samples).sqrt()
        self._loss, self._samples = torch.stack([mean, noise]), loss.samples
        self._good.note(mean, error, state)

    def _note_difference(self, mean: Tensor) -> None:
        """Update the usual squared difference of consecutive losses."""
        if self._loss is None:
            return
        squared = (mean.double() - self._loss[0].to(mean.device)).square()
        weight = MEMORY if self._differences >= WARM else self._differences / (self._differences + 1.0)
        past = squared if self._scatter is None else self._scatter.to(mean.device)
        self._scatter = weight * past + (1.0 - weight) * squared
        self._differences += 1

    def _rose(self, loss: BatchLoss, device: torch.device) -> Tensor:
        """Whether the loss rose beyond its noise ``[]``."""
        never = torch.zeros((), dtype=torch.bool, device=device)
        if loss.mean is None or self._loss is None or not self.stepped:
            return never
        before, variance_before = self._loss.to(device)
        rise = loss.mean.to(device, torch.float64) - before
        rose = never
        limit = rise_limit(self._samples, loss.samples)
        if loss.variance is not None and math.isfinite(limit):
            noise = variance_before / self._samples + loss.variance.to(device) / loss.samples
            rose = torch.gt(rise, limit * noise.sqrt())  # False where a variance is nan
        if self._scatter is not None and self._differences >= WARM:
            rose = rose | torch.gt(rise, SCATTER * self._scatter.to(device).sqrt())
        elif loss.variance is None:
            rose = torch.gt(rise, 2.0 * before.abs())
        return rose

    def _state(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Parameters and the model's floating point buffers."""
        buffers = [] if self._model is None else list(self._model.buffers())
        return [*params, *(buffer for buffer in buffers if buffer.is_floating_point())]

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next judgement needs; tensors are copies."""
        return {
            "last": [kept.clone() for kept in self._last] if self.stepped else [],
            "good": self._good.state_dict(),
            "loss": self._loss,
            "samples": self._samples,
            "scatter": self._scatter,
            "differences": self._differences,
            "stepped": self.stepped,
            "return_wanted": self.return_wanted,
            "point_trusted": self.point_trusted,
        }

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Take over a state; tensors move to where the parameters are."""
        now = self._state(params)
        fits = len(state["last"]) == len(now)
        self.stepped = bool(state["stepped"]) and fits
        self._last = [k.to(n.device) for k, n in zip(state["last"], now, strict=True)] if fits else []
        self._good.load_state_dict(state["good"], now)
        self.return_wanted = bool(state.get("return_wanted", False))
        self.point_trusted = bool(state.get("point_trusted", True))
        self._loss, self._scatter = state["loss"], state["scatter"]
        self._samples, self._differences = int(state["samples"]), int(state["differences"])


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
