"""Do the contributions of the samples add up to the gradient, for every group of parameters?

With c_i the contribution of sample i to a group, before any factor is divided out, the sum over all
samples of the iteration is <change of the group, its gradient>, which is known from the gradients alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alpha_optim.slopes.base import Names, SampleSlopes
from alpha_optim.slopes.layers import Layer

TOLERANCE = 1e-2
"""Deviation that counts, relative to all absolute contributions together; rounding in float32 is 1e-6."""
TOLERANCE_HALF = 5e-2
"""The same where parameters have 16 bits."""

NOT_ADDED_UP = "its samples do not add up to its gradient"


class SelfCheck:
    """Compares, and remembers what failed until somebody reads it."""

    def __init__(self, names: Names) -> None:
        """Start with nothing watched."""
        self._names = names
        self._key: tuple[int, ...] | None = None
        self._groups: dict[int, int] = {}  # id of a parameter -> its group
        self._members: dict[int, list[int]] = {}  # group -> indices of its parameters
        self._params: Sequence[Tensor] = ()
        self._sums: dict[int, list[Tensor]] = {}
        self._failed: tuple[list[int], Tensor] | None = None
        self.done = False

    def watch(self, layers: Sequence[Layer], params: Sequence[Tensor]) -> None:
        """Group the parameters: those that layers use together belong together."""
        key = (len(layers), *map(id, params))
        if key == self._key:
            return
        self._key, self._params = key, params
        groups = {id(param): index for index, param in enumerate(params)}
        for layer in layers:
            shared = {groups[id(param)] for param in layer.params.values()}
            merged = {old: min(shared) for old in shared}
            groups = {key: merged.get(group, group) for key, group in groups.items()}
        self._groups = groups
        self._members = {}
        for index, param in enumerate(params):
            self._members.setdefault(groups[id(param)], []).append(index)

    def group_of(self, layer: Layer) -> int:
        """The group that a layer's parameters belong to."""
        return self._groups[id(next(iter(layer.params.values())))]

    def collect(self, slopes: SampleSlopes | None, passes: Sequence[dict[int, Tensor]]) -> None:
        """Take what an answer was made of, in place of the last one's.

        Args:
            slopes: The answer, if there is one.
            passes: The contributions of the samples, pass by pass: group -> ``[n]``.
        """
        self._sums = {}
        if slopes is None:
            return
        if not slopes.complete:
            self.done = True  # several passes share the samples: it cannot be made here
            return
        for groups in passes:
            for group, values in groups.items():
                self._sums.setdefault(group, []).append(values)

    def passed(self, of_parameters: Tensor, known: Tensor) -> Tensor | None:
        """Whether all groups add up ``[]``; None if there is nothing to compare.

        Args:
            of_parameters: <change, gradient> of every parameter, float64 ``[K]``.
            known: Whether those are known ``[]``; nothing fails otherwise.
        """
        if not self._sums:
            return None
        self.done = True
        device = of_parameters.device
        ids = list(self._sums)
        values = [
            torch.cat(parts).to(device) if len(parts) > 1 else parts[0].to(device)
            for parts in self._sums.values()
        ]
        contributions = torch.stack(values)
        expected = self._of_groups(ids, of_parameters)
        size = contributions.abs().sum() + of_parameters.abs().sum()
        half = any(param.dtype in (torch.float16, torch.bfloat16) for param in self._params)
        tolerance = TOLERANCE_HALF if half else TOLERANCE
        # A sum that is not finite is told by its own status, not by this one.
        failed = ((contributions.sum(1) - expected).abs() > tolerance * size) & known.to(device)
        self._failed = (ids, failed)
        self._sums = {}
        return ~failed.any()

    def _of_groups(self, ids: list[int], of_parameters: Tensor) -> Tensor:
        """What the contributions of groups have to add up to ``[G]``."""
        if ids == list(range(len(of_parameters))):  # every parameter on its own
            return of_parameters
        slopes = of_parameters.unbind()
        return torch.stack(
            [sum((slopes[i] for i in self._members[g][1:]), slopes[self._members[g][0]]) for g in ids]
        )

    def read(self) -> list[str]:
        """Names of the parameters whose samples did not add up, fetched from the device; each time once."""
        if self._failed is None:
            return []
        ids, failed = self._failed
        self._failed = None
        groups = [group for group, bad in zip(ids, failed.tolist(), strict=True) if bad]
        return [
            self._names.get(id(self._params[index]), "?") for group in groups for index in self._members[group]
        ]
