"""The parameter change of one step: its direction and its length.

The change is the one that really happened, after clipping, weight decay and momentum. SGD leaves it
behind: it is -lr times the gradient, and the direction of such a step is always taken from there, since
the difference of float32 parameters has a wrong direction when the step is small against the parameters.
With momentum it is -lr times the buffer, up to the rounding of the parameters; that is taken, and no copy
made, where rounding makes no difference. Everywhere else it is the difference of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_ as is_same
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from alpha_optim.observe.scalars import Scalar, Scalars, Truth, added_up, free_to_read, gathered, root, scalar

Rate = float | Tensor


@dataclass(frozen=True)
class Direction:
    """Parameter change d of one step, every part of it a rate times a tensor.

    Attributes:
        bases: One tensor per parameter, in the order of `parameters_of`; None where the parameter had no
            gradient and so did not move.
        rates: The factors: the change of parameter k is ``rates[k] * bases[k]``.
        squares: Squared norms of the bases, one each.
        length: |d| over all parameters together.
        moved: Whether any parameter is not what it was.
        of_gradient: Whether the bases are the gradients that the step used (plain SGD).
        versions: Versions of the bases when the step was made.
    """

    bases: list[Tensor | None]
    rates: list[Rate]
    squares: Scalars
    length: Scalar
    moved: Truth
    of_gradient: bool
    versions: list[int]

    @property
    def changes(self) -> list[Tensor | None]:
        """The change of every parameter, as tensors of their own."""
        return [
            None if base is None else base * rate for base, rate in zip(self.bases, self.rates, strict=True)
        ]

    def intact(self) -> bool:
        """Whether nobody has written to the tensors since the step."""
        return self.versions == versions_of(self.bases)

    def keep(self) -> None:
        """Copy the tensors: somebody is about to write to them."""
        self.bases[:] = [None if base is None else base.detach().clone() for base in self.bases]
        self.versions[:] = versions_of(self.bases)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, group by group; read anew at every step since frameworks replace them."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def rates_of(optimizer: Optimizer) -> tuple[Rate, ...]:
    """Learning rates as they are now, one per group; nan where there is none."""
    rates = (group.get("lr", math.nan) for group in optimizer.param_groups)
    return tuple(rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates)


def same_tensors(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Whether two sequences hold the same tensors, not only equal ones, in the same order."""
    return len(first) == len(second) and all(map(is_same, first, second))


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
        and all(_dense_and_real(param.grad) for param in parameters_of(optimizer))
    )


def _dense_and_real(gradient: Tensor | None) -> bool:
    return gradient is None or not (gradient.is_sparse or gradient.is_complex())


def direction_left_behind(optimizer: Optimizer, moved: Truth) -> Direction:
    """Return the change that a step of SGD has just made; see `leaves_its_direction`.

    Args:
        optimizer: The optimizer.
        moved: Whether any of its parameters changed.
    """
    bases: list[Tensor | None] = []
    rates: list[Rate] = []
    plain = True
    for group in optimizer.param_groups:
        rate = -scalar(group["lr"])
        if group["momentum"] != 0:  # the buffers have the sign of maximize in them
            plain = False
            bases += [
                None if param.grad is None else optimizer.state[param].get("momentum_buffer")
                for param in group["params"]
            ]
        else:
            bases += [param.grad for param in group["params"]]
            rate = -rate if group["maximize"] else rate
        rates += [rate] * len(group["params"])
    return _direction(bases, rates, parameters_of(optimizer), moved, of_gradient=plain)


ROUNDING = 1e-6
"""Length of the rounding error of the parameters in a step, relative to the step, that makes no difference."""


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
    return bool(scalar(error) < ROUNDING * direction.length)


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


def change_since(before: list[Tensor], params: Sequence[Tensor]) -> Direction:
    """Return params - before; call after the step. ``before`` is used up: it becomes the direction."""
    torch._foreach_sub_(before, [param.detach() for param in params])
    return _direction(list(before), [-1.0] * len(before), params, None, of_gradient=False)


def _direction(
    bases: list[Tensor | None],
    rates: list[Rate],
    params: Sequence[Tensor],
    moved: Truth | None,
    of_gradient: bool,
) -> Direction:
    squares = _squares(bases, params)
    length = root(added_up(scaled(scaled(squares, rates), rates)))
    moved = length != 0 if moved is None else moved
    return Direction(bases, rates, squares, length, moved, of_gradient, versions_of(bases))


def _squares(bases: Sequence[Tensor | None], params: Sequence[Tensor]) -> Scalars:
    """Squared norms; zero for None.

    Accumulated in float64 where it matters: squares of changes of 1e-30 vanish in float32.
    """
    device = params[0].device if params else torch.device("cpu")
    there = [_as_real(base) for base in bases if base is not None]
    norms: Sequence[Tensor] = ()
    if there and all(free_to_read(t.device) and t.dtype == torch.float32 for t in there):
        norms = torch._foreach_norm(there)
        lengths: Any = torch.stack(list(norms)).tolist()
        if 1e-15 < max(lengths) < 1e15 and all(map(math.isfinite, lengths)):
            known = iter(lengths)
            return [0.0 if base is None else next(known) ** 2 for base in bases]
    if there:
        norms = torch._foreach_norm(there, 2.0, dtype=torch.float64)
    remaining = iter(norms)
    values = gathered([None if base is None else next(remaining) for base in bases], device)
    return values.square() if isinstance(values, Tensor) else [value * value for value in values]


def common_rate(rates: Sequence[Rate]) -> Rate | None:
    """The rate that all have, if that can be told without reading a tensor."""
    first = rates[0] if rates else 1.0
    if isinstance(first, Tensor):
        return first if all(rate is first for rate in rates) else None
    return None if any(isinstance(rate, Tensor) or rate != first for rate in rates) else first


def scaled(values: Scalars, rates: Sequence[Rate]) -> Scalars:
    """Multiply numbers by a rate each, without sending the rates to the device."""
    if isinstance(values, list):
        return [value * rate for value, rate in zip(values, rates, strict=True)]  # type: ignore[misc] # - floats
    common = common_rate(rates)
    if common is not None:
        return values * (common.to(values.device) if isinstance(common, Tensor) else common)
    return torch.stack(
        [
            value * (rate.to(value.device) if isinstance(rate, Tensor) else rate)
            for value, rate in zip(values.unbind(), rates, strict=True)
        ]
    )


def slopes_of_parameters(direction: Direction, gradients: Sequence[Tensor | None]) -> Scalars:
    """Inner product of change and gradient for every parameter; None counts as zero."""
    if direction.of_gradient and same_tensors(direction.bases, gradients):
        return scaled(direction.squares, direction.rates)
    products: list[Tensor | None] = [
        None if base is None or gradient is None else _dot(base, gradient)
        for base, gradient in zip(direction.bases, gradients, strict=True)
    ]
    squares = direction.squares
    device = squares.device if isinstance(squares, Tensor) else torch.device("cpu")
    return scaled(gathered(products, device), direction.rates)


def _dot(base: Tensor, gradient: Tensor) -> Tensor:
    a, b = _as_real(base), _as_real(gradient)
    if a.dim() == 4 and not a.is_contiguous() and a.stride() == b.stride():
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)  # channels last: contiguous in this order
    return torch.dot(at_least_float32(a.flatten()), at_least_float32(b.flatten()))


def _as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which slopes are computed."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
