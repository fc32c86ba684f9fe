"""Single numbers of a step: floats where reading costs nothing, tensors where it would mean waiting.

On the CPU the arithmetic behind the inner products is a few dozen operations on single numbers, each of them
ten times slower on tensors than in Python. On an accelerator reading one number waits for all work that is
queued. So what is written once here holds for both: ``+ - * /`` and the functions below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Scalar = float | Tensor
"""A float, or float64 ``[]`` on an accelerator."""
Scalars = list[float] | Tensor
"""Floats, or float64 ``[K]`` on an accelerator."""
Truth = bool | Tensor
"""A bool, or bool ``[]`` on an accelerator."""


def free_to_read(device: torch.device) -> bool:
    """Whether reading a number from a device waits for nothing."""
    return device.type == "cpu"


def readable(value: Tensor) -> Any:
    """The value as plain numbers where that costs nothing, else as it is."""
    # tolist reads memory; item() would be counted (and on a GPU wait) as a synchronisation.
    return value.tolist() if free_to_read(value.device) else value


def scalar(value: Tensor | float) -> Scalar:
    """One number, see `Scalar`."""
    if not isinstance(value, Tensor):
        return value
    number: Any = value.tolist() if free_to_read(value.device) else value.detach().double()
    return number  # type: ignore[no-any-return] # - a float or a tensor


def gathered(values: Sequence[Tensor | None], device: torch.device) -> Scalars:
    """All numbers together, zero for None.

    Args:
        values: Single numbers, of any precision and on any device.
        device: Where they are wanted.
    """
    there = [value for value in values if value is not None]
    if any(value.device != device or value.dtype != there[0].dtype for value in there):
        there = [value.to(device, torch.float64) for value in there]
    if free_to_read(device):
        known = iter(torch.stack(there).tolist() if there else ())
        return [0.0 if value is None else next(known) for value in values]
    if not there:
        return torch.zeros(len(values), dtype=torch.float64, device=device)
    together = torch.stack(there).double()
    if len(there) == len(values):
        return together
    remaining, zero = iter(together.unbind()), torch.zeros_like(together[0])
    return torch.stack([zero if value is None else next(remaining) for value in values])


def as_tensor(value: Any, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers as a tensor again."""
    if isinstance(value, (bool, float)):  # filled on the device: a copy would be waited for
        return torch.full((), value, dtype=dtype, device=device)
    return torch.as_tensor(value, dtype=dtype, device=device)


def quotient(a: Scalar, b: Scalar) -> Scalar:
    """Divide; nan where ``b`` is 0."""
    return a / b if isinstance(b, Tensor) or b != 0.0 else math.nan


def root(value: Scalar) -> Scalar:
    """Square root of a number that is not negative."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def either(truth: Truth, a: Scalar, b: Scalar) -> Scalar:
    """``a`` if true, else ``b``."""
    if isinstance(truth, Tensor):
        return torch.where(truth, a, b)
    return a if truth else b


def negated(truth: Truth) -> Truth:
    """Not true."""
    return ~truth if isinstance(truth, Tensor) else not truth


def added_up(values: Scalars) -> Scalar:
    """Sum of numbers."""
    return values.sum() if isinstance(values, Tensor) else sum(values)


def times(values: Scalars, factor: Scalar) -> Scalars:
    """Numbers times one factor."""
    if isinstance(values, Tensor) or isinstance(factor, Tensor):
        return torch.as_tensor(values, dtype=torch.float64) * factor
    return [value * factor for value in values]


def small_tensor(parts: Sequence[Scalar | bool | None], device: torch.device) -> Tensor:
    """One small float64 tensor, nan for what is missing ``[n]``."""
    numbers = [math.nan if part is None else part for part in parts]
    numbers = [readable(part) if isinstance(part, Tensor) else part for part in numbers]
    if not any(isinstance(part, Tensor) for part in numbers):
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    # One transfer of all that is known here, then one stack.
    plain = torch.tensor(
        [math.nan if isinstance(part, Tensor) else part for part in numbers], dtype=torch.float64
    ).to(device, non_blocking=True)
    known = plain.unbind()
    return torch.stack(
        [
            part.to(device, torch.float64) if isinstance(part, Tensor) else known[place]
            for place, part in enumerate(numbers)
        ]
    )
