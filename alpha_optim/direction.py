"""The parameter change of one step: its direction and its length.

The change is the one that really happened, after clipping, weight decay and momentum. SGD leaves it
behind: it is -lr times the gradient, and the direction of such a step is always taken from there, since
the difference of float32 parameters has a wrong direction when the step is small against the parameters.
With momentum it is -lr times the buffer, up to the rounding of the parameters; that is taken, and no copy
made, where rounding makes no difference. Everywhere else it is the difference of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from alpha_optim.spots import differ, spots

Rate = float | Tensor


@dataclass(frozen=True)
class Direction:
    """Parameter change d of one step, every part of it a rate times a tensor.

    Attributes:
        bases: One tensor per parameter, in the order of `parameters_of`; None where the parameter had no
            gradient and so did not move.
        rates: The factors: the change of parameter k is ``rates[k] * bases[k]``.
        squares: Squared norms of the bases, float64 ``[K]``.
        moved: Whether any parameter is not what it was ``[]``.
        of_gradient: Whether the bases are the gradients that the step used (plain SGD).
        versions: Versions of the bases when the step was made.
    """

    bases: list[Tensor | None]
    rates: list[Rate]
    squares: Tensor
    moved: Tensor
    of_gradient: bool
    versions: list[int]

    @property
    def squared_length(self) -> Tensor:
        """|d|^2 over all parameters together, float64 ``[]``."""
        return scaled(scaled(self.squares, self.rates), self.rates).sum()

    @property
    def changes(self) -> list[Tensor | None]:
        """The change of every parameter, as tensors of their own."""
        return [
            None if base is None else base * rate for base, rate in zip(self.bases, self.rates, strict=True)
        ]

    def intact(self) -> bool:
        """Whether nobody has written to the tensors since the step."""
        return self.versions == versions_of(self.bases)

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the tensors: somebody is about to write to them."""
        self.bases[:] = [None if base is None else base.detach().clone() for base in self.bases]
        self.versions[:] = versions_of(self.bases)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, group by group; read anew at every step since frameworks replace them."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def versions_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """Versions of tensors; they rise with every write that autograd knows of."""
    return [-1 if tensor is None else tensor._version for tensor in tensors]


def is_plain_sgd(optimizer: Optimizer) -> bool:
    """Whether a step is exactly -lr * gradient: SGD without momentum, weight decay or step hooks."""
    return leaves_its_direction(optimizer) and all(group["momentum"] == 0 for group in optimizer.param_groups)


def leaves_its_direction(optimizer: Optimizer) -> bool:
    """Whether gradients or momentum buffers are the direction of a step, up to the rate."""
    return (
        type(optimizer) is torch.optim.SGD
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and all(
            not group["nesterov"]
            and not group.get("differentiable", False)
            # Without momentum the decay and the gradient are added up on the way only.
            and (group["momentum"] != 0 or (group["weight_decay"] == 0 and group["dampening"] == 0))
            for group in optimizer.param_groups
        )
        and not any(
            param.grad is not None and (param.grad.is_sparse or param.is_complex())
            for param in parameters_of(optimizer)
        )
    )


@torch.no_grad()
def direction_left_behind(optimizer: Optimizer, before: Tensor) -> Direction:
    """Return the change that a step of SGD has just made; see `leaves_its_direction`.

    Args:
        optimizer: The optimizer.
        before: `spots` of its parameters before the step.
    """
    bases: list[Tensor | None] = []
    rates: list[Rate] = []
    for group in optimizer.param_groups:
        rate = -group["lr"]
        rate = rate.detach().clone() if isinstance(rate, Tensor) else rate
        if group["momentum"] != 0:  # the buffers have the sign of maximize in them
            bases += [
                None if param.grad is None else optimizer.state[param].get("momentum_buffer")
                for param in group["params"]
            ]
        else:
            bases += [param.grad for param in group["params"]]
            rate = -rate if group["maximize"] else rate
        rates += [rate] * len(group["params"])
    params = parameters_of(optimizer)
    return Direction(
        bases,
        rates,
        _squares(bases, params),
        differ(spots(params), before),
        of_gradient=is_plain_sgd(optimizer),
        versions=versions_of(bases),
    )


ROUNDING = 1e-6
"""Length of the rounding error of the parameters in a step, relative to the step, that makes no difference."""


@torch.no_grad()
def well_resolved(direction: Direction, some_elements: Tensor) -> bool:
    """Whether the parameters are fine enough for a step that it and what came of it are the same.

    Args:
        direction: A step, on the CPU: its length is read.
        some_elements: `spots` of the parameters.
    """
    if not some_elements.is_floating_point():
        return False
    size = some_elements.double().square().mean().sqrt()
    # A third of the spacing of numbers in each of the parameters, independently of each other: against the
    # step it is this much shorter, and it is no more aligned with a gradient than with any other direction.
    error = torch.finfo(some_elements.dtype).eps / 3.0 * size
    resolved: Any = (error < ROUNDING * direction.squared_length.sqrt()).tolist()
    return bool(resolved)


@torch.no_grad()
def copied(store: list[Tensor], now: Sequence[Tensor]) -> list[Tensor]:
    """Copy ``now`` into ``store``, reusing its memory where shapes and places agree."""
    if len(store) == len(now) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        for a, b in zip(store, now, strict=True)
    ):
        if store:
            torch._foreach_copy_(store, [tensor.detach() for tensor in now])
        return store
    return [tensor.detach().clone() for tensor in now]


@torch.no_grad()
def change_since(before: list[Tensor], params: Sequence[Tensor]) -> Direction:
    """Return params - before; call after the step. ``before`` is used up: it becomes the direction."""
    torch._foreach_sub_(before, [param.detach() for param in params])
    squares = _squares(before, params)
    bases: list[Tensor | None] = list(before)
    rates: list[Rate] = [-1.0] * len(before)
    return Direction(bases, rates, squares, squares.sum() != 0, of_gradient=False, versions=versions_of(bases))


def _squares(bases: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Squared norms, float64 ``[K]``; zero for None.

    Accumulated in float64 where it matters: squares of changes of 1e-30 vanish in float32.
    """
    there = [_as_real(base) for base in bases if base is not None]
    device = params[0].device if params else torch.device("cpu")
    if not there:
        return torch.zeros(len(bases), dtype=torch.float64, device=device)
    norms = None
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in there):
        norms = torch.stack(list(torch._foreach_norm(there))).double()
        # tolist: reads memory, where item() would be counted (and on a GPU wait) as a synchronisation.
        length: Any = norms.square().sum().sqrt().tolist()
        norms = norms if 1e-15 < length < 1e15 else None
    if norms is None:
        wide = torch._foreach_norm(there, 2.0, dtype=torch.float64)
        norms = torch.stack([norm.to(device) for norm in wide])
    return _spread(norms.square(), bases)


def _spread(values: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Put values of the tensors that are there among zeros for those that are not ``[K]``."""
    if all(base is not None for base in bases):
        return values
    remaining = iter(values.unbind())
    zero = torch.zeros_like(values[0])
    return torch.stack([zero if base is None else next(remaining) for base in bases])


def scaled(values: Tensor, rates: Sequence[Rate]) -> Tensor:
    """Multiply numbers by a rate each, without sending the rates to the device ``[K]``."""
    first = rates[0] if rates else 1.0
    if all(rate is first or (isinstance(first, float) and rate == first) for rate in rates):
        return values * (first.to(values.device) if isinstance(first, Tensor) else first)
    return torch.stack(
        [
            value * (rate.to(value.device) if isinstance(rate, Tensor) else rate)
            for value, rate in zip(values.unbind(), rates, strict=True)
        ]
    )


@torch.no_grad()
def slopes_of_parameters(direction: Direction, gradients: Sequence[Tensor | None]) -> Tensor:
    """Inner product of change and gradient for every parameter, float64 ``[K]``; None counts as zero."""
    device = direction.squares.device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    products = []
    for base, gradient, square in zip(direction.bases, gradients, direction.squares.unbind(), strict=True):
        if base is None or gradient is None:
            products.append(zero)
        elif base is gradient:
            products.append(square)
        else:
            products.append(_dot(base, gradient).to(device, torch.float64))
    return scaled(torch.stack(products), direction.rates) if products else zero.reshape(1)


def _dot(base: Tensor, gradient: Tensor) -> Tensor:
    a, b = _as_real(base), _as_real(gradient)
    if a.dim() == 4 and not a.is_contiguous() and a.stride() == b.stride():
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)  # channels last: contiguous in this order
    return torch.dot(_at_least_float32(a.flatten()), _at_least_float32(b.flatten()))


def _as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
