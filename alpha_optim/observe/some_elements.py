"""Some elements of every tensor, to see cheaply whether tensors changed, and by which factor.

Reading all parameters costs as much as an optimizer step. `BLOCKS` runs of `RUN` neighbours, spread over
the tensor, cost next to nothing and show every change that concerns a tensor as a whole; tensors of at most
that many elements are compared completely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from alpha_optim.distributed import USUAL, local
from alpha_optim.observe.inner_products import FLOATS
from alpha_optim.observe.numbers import Truth, free_to_read

BLOCKS, RUN = 16, 16  # a run of float32 is one cache line, and a cache line is what reading costs
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@lru_cache(maxsize=4096)
def layout(elements: int, runs: bool = True) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of what is looked at; runs start in different columns, whatever the shape.

    Args:
        elements: Elements of the tensor.
        runs: Whether neighbours are looked at together; of an accelerator one vector for each tensor is put into one
            with the others by one kernel, which takes longer to start than to read.
    """
    if elements <= BLOCKS * RUN:
        return (elements,), (1,)
    blocks, length = (BLOCKS, RUN) if runs else (BLOCKS * RUN, 1)
    stride = (elements - length) // (blocks - 1)
    while math.gcd(stride, elements) != 1:
        stride -= 1
    return ((BLOCKS, RUN), (stride, 1)) if runs else ((blocks,), (stride,))


def view_of(tensor: Tensor) -> Tensor:
    """Some elements of a tensor; a view, except of tensors with gaps; ``[blocks, run]`` on the CPU, or ``[n]``."""
    values = local(tensor)
    values = values.detach() if values.requires_grad else values
    if values.is_sparse:
        values = values._values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if not values.is_contiguous() and not (
        values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    ):
        values = values.flatten()
    return values.as_strided(*layout(values.numel(), values.is_cpu))


def stays_view(tensor: Tensor) -> bool:
    """Whether a view made by `view_of` shows what is written to the tensor later."""
    tensor = local(tensor)
    return not tensor.is_sparse and not tensor.is_complex() and tensor.is_contiguous()


class Views:
    """Some elements of several tensors, to be copied together again and again.

    Attributes:
        lasting: Whether they show what is written to the tensors later.
    """

    __slots__ = ("_alike", "_runs", "_short", "lasting")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Look at the tensors."""
        self._runs: list[Tensor] = []
        self._short: list[Tensor] = []
        self.lasting = True
        kinds = set()
        for tensor in tensors:
            usual = type(tensor) in USUAL and tensor.dtype in FLOATS and tensor.is_contiguous()
            whole = usual and tensor.numel() <= BLOCKS * RUN
            if whole:  # a view of it would be most of the work
                view = tensor.detach() if tensor.requires_grad else tensor
            elif usual:  # in a third of the time
                view = tensor.detach().as_strided(*layout(tensor.numel(), tensor.is_cpu))
            else:
                view = view_of(tensor)
                self.lasting = self.lasting and stays_view(tensor)
            (self._short if whole or view.dim() == 1 else self._runs).append(view)
            kinds.add((view.dtype, view.get_device()))
        self._alike = len(kinds) <= 1

    def now(self) -> Tensor:
        """The elements as they are now; a copy ``[n]``, in float64 where types or places differ."""
        runs, short = self._runs, self._short
        if not self._alike:
            place = (runs or short)[0].device
            runs = [view.to(place, torch.float64) for view in runs]
            short = [view.to(place, torch.float64) for view in short]
        # Of many tensors in one go: a reshape each would be most of the work.
        whole = [torch._utils._flatten_dense_tensors(short)] if short else []
        if runs:
            return torch.cat([torch.cat(runs).view(-1), *whole])
        return torch.cat(whole) if whole else torch.empty(0)


class SomeElements:
    """Looks at some elements of the same tensors again and again."""

    def __init__(self) -> None:
        """Start with no tensors."""
        self._places: list[int] = []
        self._views = Views(())

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Elements of tensors as they are now ``[n]``."""
        places = [local(tensor).data_ptr() for tensor in tensors]
        if places != self._places:
            self._views = Views(tensors)
            self._places = places if self._views.lasting else []
        return self._views.now()


def differ(now: Tensor, then: Tensor) -> Truth:
    """Whether the same elements differ in any bit; so nan equals nan."""
    if now.shape != then.shape or now.dtype != then.dtype:
        return True
    bits = _BITS[now.element_size()]
    if free_to_read(now.device) and free_to_read(then.device):
        return not torch.equal(now.view(bits), then.view(bits))
    return torch.ne(now.view(bits), then.to(now.device).view(bits)).any()


def factor_between(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """By which one factor values changed, and whether it was something else.

    Args:
        now: Elements now ``[n]``.
        then: The same elements before.

    Returns:
        The factor, float64 ``[]`` (exactly 1 if no bit changed), and whether the change is not explained by
        one factor, within rounding ``[]``.
    """
    if now.shape != then.shape:
        one = torch.ones((), dtype=torch.float64, device=now.device)
        return one, one.bool()
    changed = differ(now, then)
    same = ~changed if isinstance(changed, Tensor) else torch.full((), not changed, device=now.device)
    limits = torch.finfo(torch.promote_types(now.dtype, then.dtype))
    new, old = now.double(), then.to(now.device).double()
    unit: Tensor | float = 1.0
    if limits.bits == 64:  # squares of scaled gradients overflow or vanish
        unit = old.abs().max()
        unit = torch.where(unit > 0, unit, 1.0)
    old_unit = old / unit
    squared = torch.dot(old_unit, old_unit)
    factor = torch.where(squared > 0, torch.dot(new / unit, old_unit) / squared, 1.0)
    expected = factor * old
    aside = (new - expected).abs() > torch.add(limits.tiny, expected.abs(), alpha=16 * limits.eps)
    return torch.where(same, 1.0, factor), ~same & (aside.any() | ~torch.isfinite(factor))
