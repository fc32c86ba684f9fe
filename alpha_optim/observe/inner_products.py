"""Inner products over many tensors.

On the CPU a product of two large tensors costs what reading them costs, and is formed one piece at a time, while it is
in the cache. Of small ones it is the calls that cost; on an accelerator, where each starts a kernel, that is so for
most tensors of a model. There tensors of one kind go into one vector first, a bounded number of elements at a time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from alpha_optim.distributed import USUAL, local
from alpha_optim.observe.numbers import Number, free_to_read, read

Rate = float | Tensor

PIECE = 1 << 18
"""Elements of a piece on the CPU: a megabyte each of difference and gradient stays in the cache for two products, and
pieces are few (with 64 K elements forming the step of a GPT of ten million parameters takes a fifth longer)."""
ALONE = 1 << 21
"""Elements from which a tensor goes by itself: reading 8 MB takes as long as starting the kernel."""
SMALL, FEW = 1 << 12, 8
"""The same on the CPU, where copying 16 KB takes as long as three calls; fewer than so many of them stay alone."""
TOGETHER = 1 << 24
"""Elements of one vector, for which memory is needed for a moment: 64 MB."""
SAFE = (1e-15, 1e15)
"""Norms whose squares are neither 0 nor infinite in float32, with room for the sum over parameters."""
_PLAIN = (torch.float32, torch.float64)
FLOATS = (*_PLAIN, torch.float16, torch.bfloat16)


# -------------------------------------------------------------------- products


def product(ones: Sequence[Tensor | None], others: Sequence[Tensor | None], device: torch.device,
            *factors: Sequence[Rate]) -> Tensor:  # fmt: skip
    """Sum over tensors of <one, other>, each times its factors, float64 ``[]``; None counts as zero.

    Args:
        ones: Tensors.
        others: Tensors of the same shapes.
        device: Where the sum is wanted.
        factors: Sequences with a factor for every tensor.
    """
    largest = _largest(device, ones)
    if largest is None:
        each = [None if a is None or b is None else dot(a, b) for a, b in zip(ones, others, strict=True)]
        return total(each, device, *factors)
    ones, others = _locals(ones), _locals(others)
    values, places = [], []
    for bundle in _bundles(ones, others, None, factors, largest):
        first, second = ones[bundle[0]], others[bundle[0]]
        if first is None or second is None:
            continue
        if len(bundle) > 1:
            first, second = _vector([ones[k] for k in bundle]), _vector([others[k] for k in bundle])
        values.append(dot(first, second))
        places.append(bundle[0])
    return total(values, device, *([each[place] for place in places] for each in factors))


def differences(
    old: Sequence[Tensor],
    now: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    device: torch.device,
    weights: Sequence[float],
    of_products: Sequence[float],
    overwrite: bool = False,
    squares: bool = True,
) -> tuple[Tensor, Tensor]:
    """Squared norm of d = now - old, and <d, gradient>, over all tensors, float64 ``[]``.

    Args:
        old: Tensors.
        now: Tensors of the same shapes.
        gradients: One for each; None counts as zero.
        device: Where the sums are wanted.
        weights: What each square counts for.
        of_products: What each product counts for.
        overwrite: Whether the difference is written over ``old``.
        squares: Whether the squared norm is wanted, else it is 0.
    """
    lengths: list[Tensor] = []
    products: list[Tensor] = []
    bundles = [[place] for place in range(len(old))]
    largest = _largest(device, old)
    if largest is not None:
        now, gradients = _locals(now), _locals(gradients)
        bundles = _bundles(old, now, gradients, (weights, of_products), largest)
    for bundle in bundles:
        place = bundle[0]
        if len(bundle) == 1:
            parts = _pieces(old[place], now[place], gradients[place], overwrite)
        else:
            parts = _together(bundle, old, now, gradients, overwrite)
        for difference, part in parts:
            if squares and free_to_read(device):
                lengths.append(_times(torch.dot(difference, difference), weights[place]))
            elif squares:  # squares of changes of 1e-30 vanish in float32
                lengths.append(_times(_norm64(difference).square(), weights[place]))
            if part is not None:
                products.append(_times(torch.dot(difference, part), of_products[place]))
    return total(lengths, device), total(products, device)


def dot(base: Tensor, gradient: Tensor) -> Tensor:
    """Inner product of two tensors of one shape ``[]``, in at least float32."""
    base, gradient = as_real(base), as_real(gradient)
    if _plain(base, gradient):
        return torch.dot(base.view(-1), gradient.view(-1))
    a, b = _flat(base, gradient)
    return torch.dot(a, b.to(a.dtype))


def squared_norms(tensors: Sequence[Tensor | None], device: torch.device) -> list[Number | None]:
    """Squared norms, None for None; floats where they can be read for nothing, else tensors ``[]``, float64.

    Accumulated in float64 where it matters: squares of changes of 1e-30 vanish in float32.
    """
    there = [as_real(tensor) for tensor in tensors if tensor is not None]
    readable = free_to_read(device) and all(tensor.is_cpu for tensor in there)
    norms: Sequence[Number] = ()
    if there and readable and all(tensor.dtype is torch.float32 for tensor in there):
        norms = read(torch._foreach_norm(there))
        if not (SAFE[0] < max(norms) < SAFE[1] and all(map(math.isfinite, norms))):
            norms = ()
    squares: Sequence[Number] = [norm * norm for norm in norms]
    if there and not norms:
        wide = torch._foreach_norm(there, 2.0, dtype=torch.float64)
        squares = [norm * norm for norm in read(wide)] if readable else stacked(wide, device).square().unbind()
    remaining = iter(squares)
    return [None if tensor is None else next(remaining) for tensor in tensors]


def norm(tensors: Iterator[Tensor], weights: Sequence[float] | None) -> Tensor:
    """Square root of the sum of weight times squared norm, accumulated in float64 ``[]``."""
    squares = torch.stack([_norm64(tensor.flatten()) for tensor in tensors]).square()
    return (squares if weights is None else scaled(squares, weights)).sum().sqrt()


# -------------------------------------------------------------------- many tensors as one vector


def _locals(tensors: Sequence[Any]) -> Sequence[Any]:
    """The parts of tensors that lie on this rank; None for None."""
    return (
        tensors
        if set(map(type, tensors)).issubset(USUAL)
        else [None if tensor is None else local(tensor) for tensor in tensors]
    )


def _largest(device: torch.device, tensors: Sequence[Tensor | None]) -> int | None:
    """Below how many elements tensors go together; None if all go by themselves."""
    if not free_to_read(device):
        return ALONE
    small = [tensor for tensor in tensors if tensor is not None and tensor.numel() < SMALL]
    return SMALL if len(small) >= FEW else None


def _bundles(
    ones: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    thirds: Sequence[Tensor | None] | None,
    factors: Sequence[Sequence[Rate]],
    largest: int,
) -> list[list[int]]:
    """Places of the tensors that go together, at most `TOGETHER` elements each time; of one kind, with one factor.

    Tensors of ``largest`` elements and more go by themselves.
    """
    dense, found = torch.strided, []
    latest: dict[Hashable, tuple[list[int], int]] = {}
    key: tuple[Hashable, ...]
    varied = [each for each in factors if common_rate(each) is None]
    wanted = [None] * len(ones) if thirds is None else thirds
    for place, (a, b, c) in enumerate(zip(ones, others, wanted, strict=True)):
        if a is None or b is None:
            if thirds is not None:
                found.append([place])
            continue
        dtype, size = a.dtype, a.numel()
        if (
            size >= largest
            or dtype not in FLOATS
            or b.dtype is not dtype
            or a.layout is not dense
            or b.layout is not dense
            or (c is not None and (c.dtype is not dtype or c.layout is not dense))
        ):
            found.append([place])
            continue
        key = (dtype, a.get_device(), b.get_device(), c is None)
        if varied:
            key += tuple(_value(each[place]) for each in varied)
        bundle, elements = latest.get(key, (None, 0))
        if bundle is None or elements + size > TOGETHER:
            bundle, elements = [], 0
            found.append(bundle)
        bundle.append(place)
        latest[key] = (bundle, elements + size)
    return found


def _value(factor: Rate) -> Hashable:
    return id(factor) if isinstance(factor, Tensor) else factor


def _vector(tensors: Sequence[Tensor | None]) -> Tensor:
    """Elements of several tensors in the order of their indices, in at least float32 ``[n]``."""
    with torch.no_grad():
        return at_least_float32(torch._utils._flatten_dense_tensors(tensors))


def _together(
    bundle: list[int],
    old: Sequence[Tensor],
    now: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    overwrite: bool,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The same as `_pieces`, of several tensors."""
    part = None if gradients[bundle[0]] is None else _vector([gradients[k] for k in bundle])
    before, after = [old[k] for k in bundle], [now[k].detach() for k in bundle]
    if overwrite:
        torch._foreach_neg_(before)
        torch._foreach_add_(before, after)
        yield _vector(before), part
    else:
        yield _vector(after) - _vector(before), part


# -------------------------------------------------------------------- a tensor piece by piece


def _pieces(
    old: Tensor, now: Tensor, gradient: Tensor | None, overwrite: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The difference of a parameter piece by piece, with the gradient of the piece; flat, at least float32.

    The same memory may hold one piece after the other: a piece is valid until the next.
    """
    now = local(now).detach()
    gradient = None if gradient is None else local(gradient)
    if not (_plain(old, now) and (gradient is None or _plain(gradient, now))):
        difference = torch.sub(now, old, out=old) if overwrite else at_least_float32(now) - at_least_float32(old)
        if gradient is None:
            yield at_least_float32(as_real(difference).flatten()), None
        else:
            one, other = _flat(as_real(difference), as_real(gradient))
            yield one, other.to(one.dtype)
        return
    after, before = now.view(-1), old.view(-1)
    part = None if gradient is None else gradient.detach().view(-1)
    if not now.is_cpu or now.numel() <= PIECE:
        yield torch.sub(after, before, out=before) if overwrite else after - before, part
        return
    buffer = None if overwrite else torch.empty(PIECE, dtype=now.dtype)
    for begin in range(0, now.numel(), PIECE):
        a, b = after[begin : begin + PIECE], before[begin : begin + PIECE]
        out = b if buffer is None else buffer[: len(a)]
        yield torch.sub(a, b, out=out), None if part is None else part[begin : begin + PIECE]


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two real tensors of one shape as vectors of at least float32, in the order of their memory if they share it."""
    if a.dim() == 4 and not a.is_contiguous() and a.stride() == b.stride():
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)  # channels last: contiguous in this order
    return at_least_float32(a.flatten()), at_least_float32(b.flatten())


def _plain(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are dense vectors of one real type once they are seen as flat."""
    return (
        tensor.dtype in _PLAIN
        and tensor.dtype is other.dtype
        and tensor.layout is torch.strided
        and other.layout is torch.strided
        and tensor.is_contiguous()
        and other.is_contiguous()
    )


def _norm64(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


# -------------------------------------------------------------------- sums of numbers


def stacked(values: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Numbers of any precision and on any device together, zero for None, float64 ``[K]``."""
    there = [value for value in values if value is not None]
    if not there:
        return torch.zeros(len(values), dtype=torch.float64, device=device)
    place, dtype = device.index if device.type != "cpu" else -1, there[0].dtype
    if any(value.dtype is not dtype or value.get_device() != place for value in there):
        there = [value.to(device, torch.float64) for value in there]
    together = torch.stack(there).double()
    if len(there) == len(values):
        return together
    remaining, zero = iter(together.unbind()), torch.zeros_like(together[0])
    return torch.stack([zero if value is None else next(remaining) for value in values])


def _times(value: Tensor, weight: float) -> Tensor:
    return value if weight == 1.0 else value.double() * weight


def total(values: Sequence[Number | None], device: torch.device, *factors: Sequence[Rate]) -> Tensor:
    """Sum of numbers ``[]``, each times its factors; None counts as zero; float64 ``[]``."""
    if free_to_read(device):  # a third of the time of stacking them
        numbers = [0.0 if value is None else value for value in read(values)]
        for each in factors:
            numbers = list(map(operator.mul, numbers, read(each)))
        return torch.tensor(sum(numbers), dtype=torch.float64)
    if len(values) == 1 and isinstance(values[0], Tensor) and not any(isinstance(each[0], Tensor) for each in factors):
        factor = math.prod(each[0] for each in factors)  # a kernel less for each of them
        return (values[0].to(device).double() * factor) if factor != 1.0 else values[0].to(device).double()
    together = stacked([None if value is None else torch.as_tensor(value) for value in values], device)
    for each in factors:
        together = scaled(together, each)
    return together.sum()


def common_rate(rates: Sequence[Rate]) -> Rate | None:
    """The rate that all have, if that can be told without reading a tensor."""
    first = rates[0] if rates else 1.0
    if isinstance(first, Tensor):
        return first if all(rate is first for rate in rates) else None
    return None if any(isinstance(rate, Tensor) or rate != first for rate in rates) else first


def scaled(values: Tensor, rates: Sequence[Rate]) -> Tensor:
    """Multiply numbers ``[K]`` by a rate each, without sending the rates to the device."""
    common = common_rate(rates)
    if common is not None:
        return values * (common.to(values.device) if isinstance(common, Tensor) else common)
    return torch.stack(
        [
            value * (rate.to(value.device) if isinstance(rate, Tensor) else rate)
            for value, rate in zip(values.unbind(), rates, strict=True)
        ]
    )


# -------------------------------------------------------------------- precision


def as_real(tensor: Tensor) -> Tensor:
    """The tensor without graph, dense and real; the real and imaginary part of a complex one."""
    tensor = tensor if type(tensor) in USUAL else local(tensor)
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.dtype in _PLAIN and tensor.layout is torch.strided:
        return tensor
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which slopes are computed."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
