"""The parameter change of one step: its direction and its length.

The change is the one that really happened, after clipping, weight decay and momentum. Plain SGD leaves it
behind: it is -lr times the gradient, and the direction of such a step is always taken from there, since
the difference of float32 parameters has a wrong direction when the step is small against the parameters.
Everywhere else it is the difference of the parameters and a copy of them from before the step. The difference is
formed one piece of a parameter at a time, while it is in the cache. It is written over the copy, unless a guard that
wants to take the step back shares that; then it is formed again where it is needed. One copy is all that is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import is_ as is_same
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from alpha_optim.distributed import local, unsummed
from alpha_optim.observe.numbers import Number, Truth, free_to_read, read

Rate = float | Tensor
Weights = Sequence[float] | None
"""What parameters count for in a sum over processes, one each; None where all count the same."""

PIECE = 1 << 18
"""Elements of a piece on the CPU: a megabyte each of difference and gradient stays in the cache for two products, and
pieces are few (with 64 K elements forming the step of a GPT of ten million parameters takes a fifth longer)."""
_PLAIN = (torch.float32, torch.float64)
SAFE = (1e-15, 1e15)
"""Norms whose squares are neither 0 nor infinite in float32, with room for the sum over parameters."""


@dataclass(frozen=True)
class Change:
    """The change of every parameter as tensors: a rate times a base.

    Attributes:
        bases: One tensor per parameter, in the order of `parameters_of`; None where the parameter had no
            gradient and so did not move.
        rates: The factors: the change of parameter k is ``rates[k] * bases[k]``.
        of_gradient: Whether the bases are the gradients that the step used (plain SGD).
    """

    bases: list[Tensor | None]
    rates: list[Rate]
    of_gradient: bool

    def tensors(self) -> list[Tensor | None]:
        """The change of every parameter, as tensors of their own where the rate is not 1."""
        return [
            base if base is None or (isinstance(rate, float) and rate == 1.0) else base * rate
            for base, rate in zip(self.bases, self.rates, strict=True)
        ]


class Direction(Protocol):
    """Parameter change d of one step."""

    @property
    def length(self) -> Tensor:
        """|d| over all parameters together, float64 ``[]``."""

    @property
    def moved(self) -> Truth:
        """Whether any parameter is not what it was."""

    def products(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """<d, gradient> over all parameters, float64 ``[]``; None counts as zero."""

    def change(self, end: Sequence[Tensor] | None = None) -> Change:
        """The change as tensors; ``end`` are the parameters after the step where they have moved on since."""

    def belongs_to(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the very parameters that moved, in the shapes they had."""

    def start(self) -> list[Tensor]:
        """The parameters before the step."""

    def intact(self) -> bool:
        """Whether nobody has written to the kept tensors since the step."""

    def state(self) -> dict[str, Any]:
        """Plain values and copies of tensors, from which `restored` builds it anew."""


@dataclass
class AlongGradient:
    """The step of plain SGD.

    Attributes:
        change_: The gradients and their rates.
        squares: Squared norms of the gradients, one each, as far as they count; None where there is none.
        length: |d|.
        moved: Whether any parameter changed.
        params: The parameters.
        versions: Versions of the gradients when the step was made.
        weights: What the parameters count for, one each, in a sum over processes; None where all count the same.
        before: A copy of the parameters before the step, as long as somebody needs it.
    """

    change_: Change
    squares: list[Number | None]
    length: Tensor
    moved: Truth
    params: list[Tensor]
    versions: list[int]
    weights: Weights = None
    before: list[Tensor] | None = None

    @classmethod
    def of(cls, optimizer: Optimizer, moved: Truth, weights: Weights = None) -> AlongGradient:
        """The step that plain SGD has just made.

        Args:
            optimizer: The optimizer.
            moved: Whether any of its parameters changed.
            weights: See the class.
        """
        bases: list[Tensor | None] = []
        rates: list[Rate] = []
        for group in optimizer.param_groups:
            rate = group["lr"].detach().clone() if isinstance(group["lr"], Tensor) else float(group["lr"])
            rate = rate if group["maximize"] else -rate
            bases += [param.grad for param in group["params"]]
            rates += [rate] * len(group["params"])
        return cls._of(bases, rates, parameters_of(optimizer), moved, weights)

    @classmethod
    def _of(
        cls,
        bases: list[Tensor | None],
        rates: list[Rate],
        params: list[Tensor],
        moved: Truth,
        weights: Weights = None,
    ) -> AlongGradient:
        device = params[0].device if params else torch.device("cpu")
        squares = squared_norms(bases, device)
        if weights is not None:
            squares = [None if one is None else one * weight for one, weight in zip(squares, weights, strict=True)]
        length = _total(squares, device, rates, rates).sqrt()
        versions = versions_of(bases)
        return cls(Change(bases, rates, True), squares, length, moved, params, versions, weights)

    def products(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """See `Direction`; the norms are known where these are the gradients of the step itself."""
        bases, rates, device = self.change_.bases, self.change_.rates, self.length.device
        if same_tensors(bases, gradients):
            return _total(self.squares, device, rates)
        values = [
            None if base is None or gradient is None else dot(base, gradient)
            for base, gradient in zip(bases, gradients, strict=True)
        ]
        return _total(values, device, rates) if self.weights is None else _total(values, device, self.weights, rates)

    def change(self, end: Sequence[Tensor] | None = None) -> Change:
        """See `Direction`."""
        return self.change_

    def belongs_to(self, params: Sequence[Tensor]) -> bool:
        """See `Direction`."""
        pairs = zip(self.change_.bases, params, strict=False)
        return same_tensors(self.params, params) and all(b is None or b.shape == p.shape for b, p in pairs)

    def start(self) -> list[Tensor]:
        """See `Direction`; made anew where no copy was kept, up to rounding."""
        if self.before is not None:
            return self.before
        changes = self.change_.tensors()
        return [
            param.detach() if change is None else param.detach() - change.to(param.dtype)
            for param, change in zip(self.params, changes, strict=True)
        ]

    def intact(self) -> bool:
        """See `Direction`."""
        return self.versions == versions_of(self.change_.bases)

    def keep(self) -> None:
        """Copy the gradients: somebody is about to write to them."""
        bases = self.change_.bases
        bases[:] = [None if base is None else base.detach().clone() for base in bases]
        self.versions[:] = versions_of(bases)

    def state(self) -> dict[str, Any]:
        """See `Direction`."""
        copies = [None if base is None else base.clone() for base in self.change_.bases]
        rates, moved = list(self.change_.rates), bool(self.moved)
        return {"bases": copies, "rates": rates, "moved": moved, "intact": self.intact()}


@dataclass
class BetweenPoints:
    """The step from a copy of the parameters to where they are.

    Attributes:
        kept: The copy, shared with whoever else keeps it; or the step itself, written over the copy.
        is_step: Whether it is the step itself.
        params: The parameters.
        length: |d|.
        moved: Whether any parameter changed.
        versions: Versions of the copy when the step was made.
        weights: See `AlongGradient`.
    """

    kept: list[Tensor]
    is_step: bool
    params: list[Tensor]
    length: Tensor
    moved: Truth
    versions: list[int]
    weights: Weights = None

    @classmethod
    def of(
        cls,
        before: list[Tensor],
        params: list[Tensor],
        gradients: Sequence[Tensor | None],
        overwrite: bool,
        weights: Weights = None,
    ) -> tuple[BetweenPoints, Tensor]:
        """The step just made, and <d, gradient> along it, from one pass over the difference.

        Args:
            before: The parameters before the step.
            params: The parameters.
            gradients: Gradients at the start of the step.
            overwrite: Whether the step may be written over ``before``, which nobody else needs.
            weights: See `AlongGradient`.
        """
        device = params[0].device
        squares: list[Tensor] = []
        products: list[Tensor] = []
        each = [1.0] * len(params) if weights is None else weights
        for old, now, gradient, weight in zip(before, params, gradients, each, strict=True):
            of_product = weight if gradient is None else weight * unsummed(now, gradient)
            for difference, part in _pieces(old, now, gradient, overwrite):
                squares.append(_times(torch.dot(difference, difference), weight))
                if part is not None:
                    products.append(_times(torch.dot(difference, part), of_product))
        made = cls(before, overwrite, params, _total(squares, device), True, versions_of(before), weights)
        if free_to_read(device) and not SAFE[0] ** 2 < read([made.length])[0] < SAFE[1] ** 2:
            norms = [_norm64(flat) for difference in made._differences() for flat in (difference.flatten(),)]
            lengths = torch.stack(norms).square()
            made.length = (lengths if weights is None else scaled(lengths, weights)).sum()
        made.length = made.length.sqrt()
        made.moved = made.length != 0.0
        return made, _total(products, device)

    def _differences(self, end: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        if self.is_step:
            yield from (as_real(step) for step in self.kept)
            return
        after = self.params if end is None else end
        for old, now in zip(self.kept, after, strict=True):
            yield as_real(at_least_float32(local(now).detach()) - at_least_float32(old))

    def products(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """See `Direction`."""
        weights = self.weights or [1.0] * len(self.kept)
        if self.is_step:
            steps = zip(self.kept, self.params, gradients, weights, strict=True)
            values = [
                _times(dot(step, gradient), weight * unsummed(now, gradient))
                for step, now, gradient, weight in steps
                if gradient is not None
            ]
        else:
            values = [
                _times(torch.dot(difference, part), weight * unsummed(now, gradient))
                for old, now, gradient, weight in zip(self.kept, self.params, gradients, weights, strict=True)
                if gradient is not None
                for difference, part in _pieces(old, now, gradient, overwrite=False)
                if part is not None
            ]
        return _total(values, self.params[0].device)

    def change(self, end: Sequence[Tensor] | None = None) -> Change:
        """See `Direction`; as much memory as the parameters unless the step itself was kept."""
        if self.is_step:
            return Change(list(self.kept), [1.0] * len(self.kept), False)
        after = self.params if end is None else end
        bases: list[Tensor | None] = [now.detach() - old for old, now in zip(self.kept, after, strict=True)]
        return Change(bases, [1.0] * len(bases), False)

    def belongs_to(self, params: Sequence[Tensor]) -> bool:
        """See `Direction`."""
        pairs = zip(self.kept, params, strict=False)
        return same_tensors(self.params, params) and all(kept.shape == local(p).shape for kept, p in pairs)

    def start(self) -> list[Tensor]:
        """See `Direction`."""
        if self.is_step:
            return [now.detach() - step for now, step in zip(self.params, self.kept, strict=True)]
        return self.kept

    def intact(self) -> bool:
        """See `Direction`."""
        return self.versions == versions_of(self.kept)

    def state(self) -> dict[str, Any]:
        """See `Direction`."""
        kept = [tensor.clone() for tensor in self.kept]
        return {"kept": kept, "is_step": self.is_step, "length": float(self.length), "intact": self.intact()}


def restored(
    state: dict[str, Any], params: list[Tensor], weights: Weights = None
) -> AlongGradient | BetweenPoints | None:
    """Build a direction anew on the devices of ``params``; None if it does not belong to them."""
    kept = state["bases"] if "bases" in state else state["kept"]
    if len(kept) != len(params) or not params:
        return None
    moved: list[Any] = [
        None if tensor is None else tensor.to(param.device).clone() for tensor, param in zip(kept, params, strict=True)
    ]
    direction: AlongGradient | BetweenPoints
    if "bases" in state:
        direction = AlongGradient._of(moved, list(state["rates"]), params, state["moved"], weights)
    else:
        length = torch.tensor(state["length"], dtype=torch.float64, device=params[0].device)
        is_step, some = bool(state["is_step"]), state["length"] != 0.0
        direction = BetweenPoints(moved, is_step, params, length, some, versions_of(moved), weights)
    if not state.get("intact", True):  # it had been written to before it was saved
        direction.versions.append(-1)
    return direction


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, group by group; read anew at every step since frameworks replace them."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def rates_of(optimizer: Optimizer) -> tuple[Rate, ...]:
    """Learning rates as they are now, one per group; nan where the optimizer has none or finds its own."""
    rates = (group.get("lr", math.nan) for group in optimizer.param_groups)
    return tuple(
        rate.detach().clone() if isinstance(rate, Tensor) else math.nan if rate is None else float(rate)
        for rate in rates
    )


def same_tensors(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Whether two sequences hold the same tensors, not only equal ones, in the same order."""
    return len(first) == len(second) and all(map(is_same, first, second))


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
        and all(_as_the_step(param, param.grad) for param in parameters_of(optimizer))
    )


def _as_the_step(param: Tensor, gradient: Tensor | None) -> bool:
    """Whether the gradient is dense and real and, of a DTensor, summed already."""
    if gradient is None:
        return True
    return not (gradient.is_sparse or gradient.is_complex()) and unsummed(param, gradient) == 1.0


def versions_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """How often tensors have been written to."""
    return [-1 if tensor is None else tensor._version for tensor in tensors]


def copied(store: list[Tensor], now: Sequence[Tensor]) -> list[Tensor]:
    """Copy ``now`` into ``store``, reusing its memory where shapes and places agree; of DTensors the local parts."""
    now = [local(tensor) for tensor in now]
    if len(store) == len(now) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in zip(store, now, strict=True)
    ):
        if store:
            torch._foreach_copy_(store, [tensor.detach() for tensor in now])
        return store
    return [tensor.detach().clone() for tensor in now]


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
    if there and not norms:
        norms = torch._foreach_norm(there, 2.0, dtype=torch.float64)
        norms = read(norms) if readable else [norm.to(device) for norm in norms]
    remaining = iter([norm * norm for norm in norms])
    return [None if tensor is None else next(remaining) for tensor in tensors]


def _norm64(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


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


def _total(values: Sequence[Number | None], device: torch.device, *factors: Sequence[Rate]) -> Tensor:
    """Sum of numbers ``[]``, each times its factors; None counts as zero; float64 ``[]``."""
    if free_to_read(device):  # a third of the time of stacking them
        numbers = [0.0 if value is None else value for value in read(values)]
        for each in factors:
            numbers = [number * factor for number, factor in zip(numbers, read(each), strict=True)]
        return torch.tensor(sum(numbers), dtype=torch.float64)
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


def as_real(tensor: Tensor) -> Tensor:
    """The tensor without graph, dense and real; the real and imaginary part of a complex one."""
    tensor = local(tensor)
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which slopes are computed."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
