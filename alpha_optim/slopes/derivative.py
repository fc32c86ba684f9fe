"""Derivatives of a function of the parameters along a line, in forward mode or by two reverse passes."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from alpha_optim.observe.inner_products import at_least_float32
from alpha_optim.observe.numbers import read
from alpha_optim.slopes.base import Names

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Line:
    """Where the model is differentiated, and along what.

    Attributes:
        point: Values of the parameters that move, by name.
        tangents: Their changes, divided by ``unit``.
        unit: A power of two.
        others_move: Whether parameters move that are not the model's, but the loss function's.
    """

    point: Values
    tangents: Values
    unit: float = 1.0
    others_move: bool = False

    @classmethod
    def along(cls, names: Names, params: Sequence[Tensor], point: Sequence[Tensor], changes: Any) -> Line:
        """Put parameters, values and changes together; parameters that did not move are left out."""
        moving: dict[str, tuple[Tensor, Tensor]] = {}
        others_move = False
        for param, value, change in zip(params, point, changes, strict=True):
            name = names.get(id(param))
            others_move = others_move or (name is None and change is not None)
            if name is not None and change is not None:
                wide = at_least_float32(value.detach())
                moving[name] = (wide, change.detach().to(wide.dtype))
        return cls(
            {name: value for name, (value, _) in moving.items()},
            {name: change.to_dense() if change.is_sparse else change for name, (_, change) in moving.items()},
            others_move=others_move,
        )

    def as_long_as_the_point(self) -> Line:
        """The same with a change as long as the parameters: in float16 1e-8 is zero and 1e5 infinite."""
        lengths = read(torch._foreach_norm([*self.tangents.values(), *self.point.values()]))
        change, size = math.hypot(*lengths[: len(self.tangents)]), math.hypot(*lengths[len(self.tangents) :])
        if not (0.0 < change < math.inf and 0.0 < size < math.inf):
            return self
        unit = 2.0 ** round(math.log2(change / size))  # so that nothing is rounded
        tangents = {name: value / unit for name, value in self.tangents.items()}
        return replace(self, tangents=tangents, unit=unit)


@lru_cache(maxsize=1)
def _load_forward_rules() -> None:
    """Import what torch imports at the first use of forward mode; it warns there of something of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def forward(run: Callable[[Values], list[Tensor]], line: Line) -> tuple[list[Tensor], list[Tensor]]:
    """Values of a function and its derivatives along a line, with dual numbers.

    Gradients are on, as in the loop, so that the function's own blocks of `torch.no_grad` can be told
    (`SeesLosses`); nothing requires any.
    """
    _load_forward_rules()
    with torch.enable_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, line.tangents[name]) for name, value in line.point.items()}
        pairs = [forward_ad.unpack_dual(output) for output in run(duals)]
        values = [pair.primal.detach() for pair in pairs]
        tangents = [
            torch.zeros_like(value) if pair.tangent is None else pair.tangent.detach()
            for value, pair in zip(values, pairs, strict=True)
        ]
    return values, tangents


def twice_backward(run: Callable[[Values], list[Tensor]], line: Line) -> tuple[list[Tensor], list[Tensor]]:
    """The same, with J d as the derivative of <J^T u, d>, which is linear in u."""
    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_() for name, value in line.point.items()}
        outputs = run(leaves)
        live = [output for output in outputs if output.requires_grad]
        seeds = [torch.zeros_like(output, requires_grad=True) for output in live]
        pulled = torch.autograd.grad(live, list(leaves.values()), seeds, create_graph=True, allow_unused=True)
        along = [
            (gradient * line.tangents[name]).sum()
            for name, gradient in zip(leaves, pulled, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not along:
            return [o.detach() for o in outputs], [torch.zeros_like(o) for o in outputs]
        found = iter(torch.autograd.grad(torch.stack(along).sum(), seeds, allow_unused=True))
    tangents = [
        gradient.detach() if output.requires_grad and (gradient := next(found)) is not None
        else torch.zeros_like(output) for output in outputs
    ]  # fmt: skip
    return [output.detach() for output in outputs], tangents
