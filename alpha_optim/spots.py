"""Some elements of every tensor, to see cheaply whether tensors changed, and by which factor.

Reading all parameters costs as much as an optimizer step. `COUNT` elements of each, spread over the
tensor, cost next to nothing and show every change that concerns a tensor as a whole; tensors of at most
`COUNT` elements are compared completely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

COUNT = 256
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@lru_cache(maxsize=4096)
def stride_of(elements: int) -> int:
    """Distance between two looked-at elements; coprime to the size, so that it walks through all columns."""
    stride = max(1, elements // COUNT)
    while math.gcd(stride, elements) != 1:
        stride -= 1
    return stride


def spots_of(tensor: Tensor) -> Tensor:
    """Up to `COUNT` elements of a tensor, a view where memory allows ``[n]``."""
    values = tensor.detach()
    if values.is_sparse:
        values = values._values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    count = min(COUNT, values.numel())
    dense = values.is_contiguous() or (
        values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    )
    values = values if dense else values.flatten()
    return values.as_strided((count,), (stride_of(max(1, values.numel())),), values.storage_offset())


@torch.no_grad()
def spots(tensors: Sequence[Tensor]) -> Tensor:
    """Elements of all tensors in one; a copy ``[n]``."""
    parts = [spots_of(tensor) for tensor in tensors]
    if not parts:
        return torch.empty(0)
    if any(part.device != parts[0].device or part.dtype != parts[0].dtype for part in parts):
        parts = [part.to(parts[0].device, torch.float64) for part in parts]
    return torch.cat(parts)


@torch.no_grad()
def differ(now: Tensor, then: Tensor) -> Tensor:
    """Whether two results of `spots` differ in any bit ``[]``; so nan equals nan."""
    if now.shape != then.shape or now.dtype != then.dtype:
        return torch.ones((), dtype=torch.bool, device=now.device)
    bits = _BITS[now.element_size()]
    return torch.ne(now.view(bits), then.to(now.device).view(bits)).any()


@torch.no_grad()
def factor_between(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """By which one factor values changed, and whether it was something else.

    Args:
        now: Spots now ``[n]``.
        then: Spots of the same tensors before, not all zero.

    Returns:
        The factor, float64 ``[]`` (exactly 1 if no bit changed), and whether the change is not explained by
        one factor, within rounding ``[]``.
    """
    if now.shape != then.shape:
        return torch.ones((), dtype=torch.float64, device=now.device), _true(now.device)
    same = ~differ(now, then)
    limits = torch.finfo(torch.promote_types(now.dtype, then.dtype))
    new, old = now.double(), then.to(now.device).double()
    # Divided by the largest first: squares of scaled gradients overflow or vanish.
    unit = old.abs().max()
    unit = torch.where(unit > 0, unit, 1.0)
    old_unit = old / unit
    squared = old_unit.square().sum()
    factor = torch.where(squared > 0, (new / unit * old_unit).sum() / squared, 1.0)
    expected = factor * old
    aside = (new - expected).abs() > 16 * limits.eps * expected.abs() + limits.tiny
    return torch.where(same, 1.0, factor), ~same & (aside.any() | ~torch.isfinite(factor))


def _true(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=device)
