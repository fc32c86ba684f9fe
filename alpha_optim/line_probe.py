"""Pairs the start and the end of one step, from the user's own passes.

One iteration may be the end of the pair (n-1, n) and the start of the pair (n, n+1). The end is
complete when `step` is called, the start only after it, when the direction is known. Between the two
iterations only the direction and a few numbers are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.direction import (
    Direction,
    change_since,
    copy_parameters,
    inner_product,
    is_plain_sgd,
    parameters_of,
    plain_sgd_direction,
)
from alpha_optim.gradient_watch import GradientWatch, fingerprint
from alpha_optim.losses import LossTap
from alpha_optim.pairs import BatchLoss, EndPoint, PendingPair, PendingStart, put_together, small_tensor
from alpha_optim.passes import BackwardPass, PassLog
from alpha_optim.projections.base import Backend, SampleSlopes
from alpha_optim.projections.statistics import sample_mean, sample_variance


class LineProbe:
    """Watches iterations and turns pairs of them into measurements."""

    def __init__(self, loss_fn: nn.Module | None) -> None:
        """Prepare; nothing is hooked before `begin`.

        Args:
            loss_fn: Loss function of the user, if it was given.
        """
        self._params: list[Tensor] = []
        self.log = PassLog(self._gradients_gone, self._discarded, self._pass_opened)
        self.losses = LossTap(loss_fn, self.log.forward_started, self.log.anchor)
        self.watch = GradientWatch(self._accumulated)
        self.pending: PendingStart | None = None
        self._backend: Backend | None = None
        self._edited: Tensor | None = None

    # ---------------------------------------------------------------- hooks

    def begin(self, optimizer: Optimizer, backend: Backend | None, start: bool, loss: bool) -> None:
        """Hook what the coming iteration needs.

        Args:
            optimizer: The wrapped optimizer.
            backend: Backend of the iteration; None if it is in no pair.
            start: Whether it is the start of a pair.
            loss: Whether its loss is wanted even if it is in no pair.
        """
        self.close()
        self._params = parameters_of(optimizer)
        self._backend = backend
        if backend is not None:
            end_of = self.pending.direction if self.pending is not None else None
            backend.begin(end_of, start, self._params)
        if backend is not None or loss:
            self.watch.attach(self._params)
            self.losses.attach()

    def close(self) -> None:
        """Remove every hook and forget the iteration."""
        if self._backend is not None:
            self._backend.close()
        self._backend = None
        self.watch.detach()
        self.losses.detach()
        self.log.clear()
        self._edited = None

    def mute(self) -> None:
        """Remove every hook; what was seen stays."""
        if self._backend is not None:
            self._backend.mute()
        self.watch.mute()
        self.losses.detach()

    def _gradients_gone(self) -> bool:
        return self.watch.gradients_gone(self._params)

    def _discarded(self) -> bool:
        """The passes so far do not count; whether a step was skipped for them."""
        skipped = self.watch.not_finite()
        self.watch.forget()
        if self._backend is not None:
            self._backend.discard()
        return skipped

    def _pass_opened(self) -> None:
        """Compare the parameters that this backward pass belongs to with what the step left."""
        if self.pending is not None:
            edited = self._edited_since(self.pending)
            self._edited = edited if self._edited is None else self._edited | edited

    def _edited_since(self, pending: PendingStart) -> Tensor:
        now = fingerprint(self._params)
        if now.shape != pending.fingerprint.shape:
            return torch.ones((), dtype=torch.bool, device=now.device)
        return ~torch.isclose(now, pending.fingerprint, rtol=0.0, atol=0.0, equal_nan=True).all()

    def _accumulated(self, param: Tensor) -> None:
        entry = self.log.current()
        entry.reached = True
        if self._backend is not None:
            self._backend.accumulated(param)

    # ---------------------------------------------------------------- observing

    @torch.no_grad()
    def batch_loss(self, fallback: Tensor | float | None) -> BatchLoss:
        """Put the losses of the iteration's passes together.

        Args:
            fallback: A closure's loss, used if no other was seen.
        """
        calls = [(*entry.losses(), entry.samples or 0) for entry in self.log.reached if entry.calls]
        recorded = [(call.mean, call.individual, call.samples or 0) for call in self.log.recorded]
        # What was handed over counts, unless it is a mere mean and single losses were seen.
        handed_singly = any(single is not None for _, single, _ in recorded)
        if recorded and (handed_singly or all(single is None for _, single, _ in calls)):
            calls = recorded
        samples = sum(entry.samples or 0 for entry in self.log.reached)
        if calls:
            whole = put_together(calls)
            return whole if whole.samples else replace(whole, samples=samples)
        mean = None if fallback is None else torch.as_tensor(fallback).detach()
        return BatchLoss(mean, None, samples)

    def _point(
        self,
        direction: Direction,
        gradients: Sequence[Tensor | None],
        slopes: SampleSlopes | None,
        loss: BatchLoss,
    ) -> EndPoint:
        passes = self.log.reached
        length = direction.squared_length.sqrt()
        slope = inner_product(direction.changes, gradients) / length
        gammas = [entry.gamma for entry in passes if entry.gamma is not None]
        if gammas:
            slope = slope / torch.stack([g.double().to(slope.device) for g in gammas]).sum()
        if slopes is not None and slopes.complete and len(passes) > 1:
            mean = sample_mean(slopes.values / length)
            slope = torch.where(_evenly_weighted(passes, slope.device), slope, mean)
        # Divided by the length first: squares of <d, gradient> overflow in a diverging run.
        variance = None if slopes is None else sample_variance(slopes.values / length)
        parts = [loss.mean, loss.variance, slope, variance]
        observed = (loss.mean is not None, loss.variance is not None, variance is not None)
        return EndPoint(small_tensor(parts, slope.device), loss.samples, observed)

    @torch.no_grad()
    def finish(self, gradients: Sequence[Tensor | None] | None, loss: BatchLoss) -> PendingPair | str | None:
        """Complete the pair that ends in this iteration; called before the optimizer steps.

        Args:
            gradients: Gradients of the loss, one per parameter; None if they are lost.
            loss: Loss of the iteration.

        Returns:
            The pair, the reason why it is dropped, or None if there is none.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        reason = self._obstacle(gradients)
        if reason is not None or gradients is None:
            return reason
        if len(pending.direction.changes) != len(self._params):
            return "parameters_changed"
        assert self._backend is not None
        slopes = self._backend.end_slopes(pending.direction)
        point = self._point(pending.direction, gradients, slopes, loss)
        edited = self._edited_since(pending) if self._edited is None else self._edited
        return PendingPair.of(pending, point, edited)

    def start_obstacle(self, gradients: Sequence[Tensor | None] | None) -> str | None:
        """Say why this iteration cannot start a pair, or None; called before the optimizer steps."""
        reason = self._obstacle(gradients)
        if reason is None and self.watch.params_edited(self._params):
            return "parameters_changed"
        return reason

    def _obstacle(self, gradients: Sequence[Tensor | None] | None) -> str | None:
        """Say why nothing was observed in this iteration, or None."""
        if self.log.skipped:
            return "step_skipped"
        if gradients is None:
            return "gradients_modified"
        return None if self.watch.saw_backward(self._params) else "no_backward"

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> Direction | list[Tensor]:
        """Return the direction if it is known before the step, else copies of the parameters."""
        if is_plain_sgd(optimizer):
            return plain_sgd_direction(optimizer)
        return copy_parameters(self._params)

    @torch.no_grad()
    def after_step(
        self,
        iteration: int,
        before: Direction | list[Tensor],
        gradients: Sequence[Tensor | None],
        loss: BatchLoss,
        lr: tuple[float | Tensor, ...],
    ) -> None:
        """Reduce the start along the step just made and wait for its end."""
        direction = before if isinstance(before, Direction) else change_since(before, self._params)
        assert self._backend is not None
        slopes = self._backend.start_slopes(direction, gradients)
        point = self._point(direction, gradients, slopes, loss)
        self.pending = PendingStart(iteration, direction, point, fingerprint(self._params), lr)

    def start_was_turned(self) -> bool:
        """Whether the step just made is no multiple of the gradient, where the backend needed that."""
        if self.pending is None or not self.watch.keep_copies:
            return False
        return self.pending.point.observed[2] and bool(self.pending.point.numbers[3].isnan())

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the pending step, and whether gradients are copied."""
        state: dict[str, Any] = {"keep_copies": self.watch.keep_copies, "pending": None}
        if self.pending is not None:
            pending = self.pending
            state["pending"] = {
                "iteration": pending.iteration,
                "changes": [None if c is None else c.clone() for c in pending.direction.changes],
                "moved": pending.direction.moved,
                "squared_length": pending.direction.squared_length,
                "numbers": pending.point.numbers,
                "samples": pending.point.samples,
                "observed": list(pending.point.observed),
                "fingerprint": pending.fingerprint,
                "lr": [rate.clone() if isinstance(rate, Tensor) else rate for rate in pending.lr],
            }
        return state

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Take over a state; its tensors move to the devices of ``params``."""
        self.watch.keep_copies = bool(state["keep_copies"])
        self.pending = None
        saved = state["pending"]
        if saved is None or len(saved["changes"]) != len(params):
            return
        changes = [
            None if change is None else change.to(param.device)
            for change, param in zip(saved["changes"], params, strict=True)
        ]
        device = params[0].device
        a, b, c = saved["observed"]
        self.pending = PendingStart(
            int(saved["iteration"]),
            Direction(changes, saved["squared_length"].to(device), saved["moved"].to(device)),
            EndPoint(saved["numbers"].to(device), int(saved["samples"]), (bool(a), bool(b), bool(c))),
            saved["fingerprint"].to(device),
            tuple(saved["lr"]),
        )


def _evenly_weighted(passes: Sequence[BackwardPass], device: torch.device) -> Tensor:
    """Whether every sample has the same weight in the gradient, whichever pass it came with ``[]``."""
    shares = [entry.gamma / entry.samples for entry in passes if entry.gamma is not None and entry.samples]
    if not shares:
        return torch.ones((), dtype=torch.bool, device=device)
    weights = torch.stack([share.double().to(device) for share in shares])
    return weights.max() - weights.min() <= 1e-6 * weights.abs().max()
