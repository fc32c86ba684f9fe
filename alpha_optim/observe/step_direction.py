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
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from alpha_optim.distributed import USUAL, local, unsummed
from alpha_optim.observe.inner_products import (
    FLOATS,
    SAFE,
    Rate,
    as_real,
    at_least_float32,
    differences,
    norm,
    product,
    squared_norms,
    total,
)
from alpha_optim.observe.numbers import Number, Truth, free_to_read, read

Weights = Sequence[float] | None
"""What parameters count for in a sum over processes, one each; None where all count the same."""


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
        length = total(squares, device, rates, rates).sqrt()
        versions = versions_of(bases)
        return cls(Change(bases, rates, True), squares, length, moved, params, versions, weights)

    def products(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """See `Direction`; the norms are known where these are the gradients of the step itself."""
        bases, rates, device = self.change_.bases, self.change_.rates, self.length.device
        if same_tensors(bases, gradients):
            return total(self.squares, device, rates)
        return product(bases, gradients, device, *([] if self.weights is None else [self.weights]), rates)

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
        each, of_products = _counts(params, gradients, weights)
        square, along = differences(before, params, gradients, device, each, of_products, overwrite)
        made = cls(before, overwrite, params, square.sqrt(), True, versions_of(before), weights)
        if free_to_read(device) and not SAFE[0] < read([made.length])[0] < SAFE[1]:
            made.length = norm(made._differences(), weights)
        made.moved = made.length != 0.0
        return made, along

    def _differences(self, end: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        if self.is_step:
            yield from (as_real(step) for step in self.kept)
            return
        after = self.params if end is None else end
        for old, now in zip(self.kept, after, strict=True):
            yield as_real(at_least_float32(local(now).detach()) - at_least_float32(old))

    def products(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """See `Direction`."""
        device = self.params[0].device
        each, of_products = _counts(self.params, gradients, self.weights)
        if self.is_step:
            return product(self.kept, gradients, device, of_products)
        return differences(self.kept, self.params, gradients, device, each, of_products, squares=False)[1]

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


def _counts(
    params: Sequence[Tensor], gradients: Sequence[Tensor | None], weights: Weights
) -> tuple[Sequence[float], Sequence[float]]:
    """What squares and products with gradients count for in a sum over processes, one each."""
    each = [1.0] * len(params) if weights is None else weights
    pairs = zip(each, params, gradients, strict=True)
    return each, [weight if g is None else weight * unsummed(param, g) for weight, param, g in pairs]


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


def is_of_torch(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of torch's own, which write to no gradient without counting its versions.

    So are several of those as one, if it is this package that puts them together.
    """
    ours = type(optimizer).__module__.startswith(__name__.split(".")[0] + ".")
    parts = getattr(optimizer, "optimizers", ()) if ours else (optimizer,)
    return all(type(part).__module__.startswith("torch.optim.") for part in parts)


def is_plain_sgd(optimizer: Optimizer) -> bool:
    """Whether a step is exactly -lr * gradient: SGD without momentum, weight decay, step hooks or a step of its own."""
    step = vars(optimizer).get("step")
    return (
        type(optimizer) is torch.optim.SGD
        and (step is None or hasattr(step, "_wrapped_by_lr_sched"))  # torch's schedulers count calls
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not _global_optimizer_pre_hooks
        and not _global_optimizer_post_hooks
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
    if gradient is None or (type(gradient) in USUAL and gradient.dtype in FLOATS and gradient.layout is torch.strided):
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
