"""Sees the losses of the samples and the factor between loss and backward pass.

A loss function with reduction "mean" or "sum" returns one number. The losses of the samples come
from evaluating a copy of it with reduction "none", without graph and without touching random
numbers or buffers, at the moment of the user's own call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alpha_optim.observe.backward_passes import LossCall
from alpha_optim.observe.hooks import Hook, weakly
from alpha_optim.observe.module_copy import stand_in
from alpha_optim.observe.scalars import Scalar, quotient, scalar
from alpha_optim.observe.step_direction import at_least_float32
from alpha_optim.user_warning import warn_user

_WEIGHTED = (nn.CrossEntropyLoss, nn.NLLLoss)


class LossTap:
    """Hooks on one loss function; reports each call when its backward pass starts."""

    def __init__(
        self,
        loss_fn: nn.Module | None,
        on_forward: Callable[[], None],
        on_backward: Callable[[LossCall], None],
    ) -> None:
        """Prepare; nothing is hooked before `attach`.

        Args:
            loss_fn: The loss function, or None if losses are only handed over.
            on_forward: Called before each of its calls.
            on_backward: Called with the loss when its backward pass starts.
        """
        self._loss_fn = loss_fn
        self._on_forward = on_forward
        self._on_backward = on_backward
        self._removal: weakref.finalize[..., LossTap] | None = None  # of the hook, with us at the latest
        self._warned = False
        self._calls = 0

    def attach(self) -> None:
        """Hook the loss function."""
        if self._loss_fn is not None and self._removal is None:
            hook = Hook(weakly(self._seen), owner=self._loss_fn)  # a loss function often outlives the run
            handle = self._loss_fn.register_forward_hook(hook, with_kwargs=True)
            self._removal = weakref.finalize(self, handle.remove)

    def detach(self) -> None:
        """Remove the hook."""
        if self._removal is not None:
            self._removal()
            self._removal = None

    def watch(self, losses: Tensor, explicit: bool) -> None:
        """Report ``losses`` (``[N]`` or ``[N, ...]`` with graph) when its backward pass starts."""
        values = losses.detach()
        samples = values.shape[0]
        self._calls += 1
        order = self._calls

        def weighted(weights: Tensor) -> None:
            total = weights.sum()
            individual = (weights * values).reshape(samples, -1).sum(1) * (samples / total)
            self._on_backward(LossCall(individual.mean(), individual, samples, total, explicit, order))

        losses.register_hook(weighted)

    def announce(self, losses: Tensor, mean: Tensor) -> None:
        """The backward pass of the mean of ``losses`` is about to run: report it when it starts."""
        individual = _of_samples(losses.detach())
        call = LossCall(mean.detach(), individual, len(individual), torch.ones_like(mean), True)
        mean.register_hook(lambda _gradient: self._on_backward(call))

    def hand_over(self, losses: Tensor) -> LossCall:
        """Return handed over losses as a call; reports their factor to the backward pass, if it comes."""
        values = losses.detach()
        if values.dim() == 0:
            call = LossCall(values.clone(), None, None, None, True)
            if losses.requires_grad:
                losses.register_hook(lambda g: self._on_backward(replace(call, gamma=g.detach())))
            return call
        if losses.requires_grad:
            self.watch(losses, explicit=True)
        individual = _of_samples(values)
        return LossCall(individual.mean(), individual, len(individual), None, True)

    def _seen(self, loss_fn: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return
        self._on_forward()
        if output.dim() > 0:
            self.watch(output, explicit=False)
            return
        reduction = getattr(loss_fn, "reduction", None)
        individual = individual_losses(loss_fn, args, kwargs, output.detach())
        if individual is None and not self._warned:
            self._warned = True
            warn_user(
                f"{type(loss_fn).__name__} gives no losses of single samples (it needs an attribute "
                "'reduction' that accepts 'none'), so alpha uses the slopes only. Use "
                "optimizer.backward(losses) with losses of shape [N] for the full fit."
            )
        samples = None if individual is None else individual.shape[0]
        mean = output.detach() if individual is None or reduction != "sum" else individual.mean()
        self._calls += 1
        call = LossCall(mean, individual, samples, order=self._calls)
        scale = samples if reduction == "sum" and samples is not None else 1

        def start(gradient: Tensor) -> None:
            gamma = gradient.detach() if scale == 1 else gradient.detach() * scale
            self._on_backward(replace(call, gamma=gamma))

        output.register_hook(start)


def _of_samples(losses: Tensor) -> Tensor:
    """Mean over all but the first dimension ``[N]``."""
    return losses.reshape(losses.shape[0], -1).mean(1)


@torch.no_grad()
def individual_losses(loss_fn: nn.Module, args: Any, kwargs: Any, reduced: Tensor) -> Tensor | None:
    """Evaluate the losses of the samples for one call of a loss function.

    Args:
        loss_fn: Loss function that has just returned one number.
        args: Positional arguments of that call.
        kwargs: Keyword arguments of that call.
        reduced: What it returned ``[]``.

    Returns:
        Losses ``[N]`` whose mean is the mean-reduced loss: weights and ignored targets are taken into
        account. With reduction "sum" a sample's loss is the sum over its elements, and the mean is over
        samples. None if the function cannot give them.
    """
    reduction = getattr(loss_fn, "reduction", None)
    if reduction not in ("mean", "sum", "batchmean") or not (args or kwargs):
        return None
    first = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(first, Tensor) or first.dim() == 0:
        return None
    samples = first.shape[0]
    single = _unreduced(loss_fn)
    try:
        with _same_random_numbers(loss_fn, first.device):
            values = single.forward(*args, **kwargs)
    except Exception:  # whatever a loss raises that knows no "none"; told once by the caller
        return None
    if not isinstance(values, Tensor) or values.dim() == 0 or values.shape[0] != samples:
        return None
    values = at_least_float32(values)
    sums = values if values.dim() == 1 else values.reshape(samples, -1).sum(1)
    if reduction in ("batchmean", "sum"):
        return sums
    if type(loss_fn) in _WEIGHTED:  # a subclass may divide by something else
        total = _total_weight(loss_fn, args, kwargs, values)
        whole = not isinstance(total, Tensor) and total == samples
        normalised: Tensor = sums if whole else sums * quotient(float(samples), total)
        return normalised
    if type(loss_fn).__module__.startswith("torch.nn."):
        return sums * (samples / values.numel())
    # A loss of unknown make: whatever it divides by, the mean has to come out.
    mean = sums.mean()
    return torch.where(mean == 0, sums, sums * (reduced.to(sums.dtype) / mean))


def _unreduced(loss_fn: nn.Module) -> nn.Module:
    """The loss function with reduction "none"; the user's own is not touched."""
    if type(loss_fn).__module__.startswith("torch.nn.") and not loss_fn._modules:
        single: nn.Module = object.__new__(type(loss_fn))  # its buffers are read only
        single.__dict__ = dict(loss_fn.__dict__)
    else:
        single = stand_in(loss_fn)
    vars(single)["reduction"] = "none"
    return single


def _total_weight(loss_fn: Any, args: Any, kwargs: Any, values: Tensor) -> Scalar:
    """What the mean of (weighted) cross entropy divides by."""
    target = args[1] if len(args) > 1 else kwargs.get("target")
    if not isinstance(target, Tensor) or target.is_floating_point():
        return float(values.numel())
    kept = torch.ne(target, loss_fn.ignore_index)
    weight = loss_fn.weight
    if not isinstance(weight, Tensor):
        return scalar(kept.sum())
    return scalar((weight[target.clamp_min(0).clamp_max(len(weight) - 1)] * kept).sum())


@contextmanager
def _same_random_numbers(loss_fn: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave the random number generators as they were."""
    if type(loss_fn).__module__.startswith("torch.nn."):
        yield  # torch's own losses draw none
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
