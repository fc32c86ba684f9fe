"""The parameter change of one step: its direction and its length.

The change is the one that really happened, after clipping, weight decay and momentum. For plain SGD
it is written as -lr * gradient: the difference of float32 parameters has a wrong direction when the
step is small against the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Direction:
    """Parameter change d of one step.

    Attributes:
        changes: Change of every parameter, in the order of `parameters_of`; None where the
            parameter had no gradient and so did not move.
        squared_length: |d|^2 over all parameters together, float64 ``[]``.
        moved: Boolean tensor ``[]``: whether any parameter is not what it was.
    """

    changes: list[Tensor | None]
    squared_length: Tensor
    moved: Tensor


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, group by group; read anew at every step since frameworks replace them."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def is_plain_sgd(optimizer: Optimizer) -> bool:
    """Whether a step is exactly -lr * gradient: SGD without momentum, weight decay or step hooks."""
    return (
        type(optimizer) is torch.optim.SGD
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and all(
            group["momentum"] == 0
            and group["weight_decay"] == 0
            and group["dampening"] == 0
            and not group["nesterov"]
            and not group.get("differentiable", False)
            for group in optimizer.param_groups
        )
        and not any(
            param.grad is not None and (param.grad.is_sparse or param.is_complex())
            for param in parameters_of(optimizer)
        )
    )


def plain_sgd_rates(optimizer: Optimizer) -> list[float | Tensor]:
    """Signed factor between gradient and change for every parameter of plain SGD: -lr, or +lr."""
    rates: list[float | Tensor] = []
    for group in optimizer.param_groups:
        rate = group["lr"] if group["maximize"] else -group["lr"]
        rate = rate.detach().clone() if isinstance(rate, Tensor) else rate
        rates += [rate] * len(group["params"])
    return rates


@torch.no_grad()
def plain_sgd_direction(optimizer: Optimizer) -> Direction:
    """Return the change that plain SGD is about to make; call before its step."""
    params, changes = parameters_of(optimizer), []
    for param, rate in zip(params, plain_sgd_rates(optimizer), strict=True):
        changes.append(None if param.grad is None else param.grad * rate)
    pairs = [(p.detach(), c) for p, c in zip(params, changes, strict=True) if c is not None]
    squared = squared_norm([change for _, change in pairs])
    return Direction(changes, squared, _moves(pairs, squared))


def _moves(pairs: list[tuple[Tensor, Tensor]], squared_length: Tensor) -> Tensor:
    """Whether adding the changes alters any parameter ``[]``: a step below their resolution does not."""
    if not pairs:
        return torch.zeros((), dtype=torch.bool, device=squared_length.device)
    device = squared_length.device
    if device.type == "cpu":  # reading a number costs nothing here, comparing all parameters does
        largest = max(float(torch.linalg.vector_norm(param)) for param, _ in pairs)
        count = sum(param.numel() for param, _ in pairs)
        coarsest = max(torch.finfo(param.dtype).eps for param, _ in pairs)
        # Some change is at least the root mean square; no parameter exceeds the largest norm.
        if math.sqrt(float(squared_length) / count) > coarsest * largest:
            return torch.ones((), dtype=torch.bool)
    altered = [(torch.add(param, change) != param).any() for param, change in pairs]
    return torch.stack([entry.to(device) for entry in altered]).any()


@torch.no_grad()
def copy_parameters(params: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of the parameters without graph."""
    return [param.detach().clone() for param in params]


@torch.no_grad()
def change_since(before: list[Tensor], params: Sequence[Tensor]) -> Direction:
    """Return params - before; call after the step. ``before`` is used up."""
    now = [param.detach() for param in params]
    changes = list(torch._foreach_sub(now, before))
    squared = squared_norm(changes)
    return Direction(list(changes), squared, squared != 0)


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares over all tensors together, float64 ``[]``.

    Accumulated in float64 where it matters: squares of changes of 1e-30 vanish in float32.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors):
        fast = torch.stack(list(torch._foreach_norm(list(tensors)))).double().square().sum()
        if 1e-30 < float(fast) < 1e30:
            return fast
    norms = [torch.linalg.vector_norm(_as_real(t), dtype=torch.float64) for t in tensors]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()


@torch.no_grad()
def inner_product(changes: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Tensor:
    """Sum over parameters of <change, gradient>, float64 ``[]``; None counts as zero."""
    total: Tensor | None = None
    for change, gradient in zip(changes, gradients, strict=True):
        if change is None or gradient is None:
            continue
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        a, b = _as_real(change).flatten(), _as_real(gradient.detach()).flatten()
        product = torch.dot(_at_least_float32(a), _at_least_float32(b)).double()
        total = product if total is None else total + product.to(total.device)
    return torch.zeros((), dtype=torch.float64) if total is None else total


def _as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
