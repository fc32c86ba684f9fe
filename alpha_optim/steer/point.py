"""A point of training: parameters, persistent buffers, and state of an optimizer.

A point is put back all or nothing, and that is checked before anything is written. Parameters have to be the same
tensors in the same shapes as when it was kept; if not, the point is forgotten. Buffers of a module are put back if all
of them are the same tensors in the same shapes: what is replaced or grows at every call is a cache, not part of a
point. Nor are buffers that the module does not save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.distributed import initialised, is_sharded, local
from alpha_optim.observe.memory import sparing
from alpha_optim.observe.step_direction import copied, same_tensors
from alpha_optim.steer.several import Several
from alpha_optim.user_warning import warn_user

OWN_WEIGHTS = ("ScheduleFree", "Lookahead", "SAM", "Prodigy", "DAdapt")
"""Parts of the names of classes of optimizers that keep weights, or distances between weights, in their state."""
DECLARED = "state_belongs_to_weights"
"""An optimizer with this attribute, true, declares that it does, too."""
SHARD = "optim"
"""Attribute in which `ZeroRedundancyOptimizer` has the optimizer of this rank's parameters."""
_SET_BY_SCHEDULES = (
    "params",
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "betas",
    "momentum",
    "base_momentum",
    "max_momentum",
    "weight_decay",
)
"""Entries of a param group that the training loop or its schedules write; all others are the optimizer's counters."""


def persistent_buffers(model: nn.Module | None) -> list[list[Tensor]]:
    """The buffers that each module of a model saves; only of modules that have some."""
    if model is None:
        return []
    found: list[list[Tensor]] = []
    seen: set[int] = set()
    for module in model.modules():
        if module._buffers:
            kept = [
                buffer
                for name, buffer in module._buffers.items()
                if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen
            ]
            seen.update(map(id, kept))
            if kept:
                found.append(kept)
    return found


def keeps_own_weights(optimizer: Optimizer) -> bool:
    """Whether the state of an optimizer has to go back with the weights."""
    names = [base.__name__ for base in type(optimizer).__mro__]
    return bool(getattr(optimizer, DECLARED, False)) or any(part in name for part in OWN_WEIGHTS for name in names)


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The optimizer, and those that it wraps or is made of."""
    inner = [getattr(optimizer, name, None) for name in ("optimizer", "base_optimizer", SHARD)]
    inner += list(getattr(optimizer, "optimizers", ()))
    return [optimizer, *(part for entry in inner if hasattr(entry, "param_groups") for part in inner_optimizers(entry))]


class OptimizerState:
    """State of an optimizer and the counters in its groups, with those of the optimizers it wraps or is made of."""

    def __init__(self, optimizer: Optimizer, on_host: bool = False) -> None:
        """Copy it.

        Args:
            optimizer: The optimizer.
            on_host: Whether copies are kept in the memory of the CPU.
        """
        # One made of several shows their state as its own.
        parts = [part for part in inner_optimizers(optimizer) if not isinstance(part, Several)]
        self._kept: list[tuple[Any, list[tuple[Any, Any]], list[dict[str, Any]]]] = [
            (
                part,
                [(key, copy_of(value, on_host)) for key, value in part.state.items()],
                [
                    {name: copy_of(value, on_host) for name, value in group.items() if name not in _SET_BY_SCHEDULES}
                    for group in _groups(part)
                ],
            )
            for part in parts
        ]

    @property
    def of_this_rank(self) -> bool:
        """Whether it is only a part of the state, the rest of which is kept by other ranks."""
        counts = [sum(len(group["params"]) for group in _groups(part)) for part, _, _ in self._kept]
        return any(hasattr(part, SHARD) for part, _, _ in self._kept) and min(counts) < max(counts)

    def fits(self) -> bool:
        """Whether the param groups are as many as then."""
        return all(len(_groups(part)) == len(groups) for part, _, groups in self._kept)

    def restore(self) -> None:
        """Put everything back, into the tensors that are there where these have the same shape; learning rates stay."""
        for part, state, groups in self._kept:
            now = dict(part.state)
            part.state.clear()
            for key, value in state:
                part.state[key] = put_back(now.get(key), value, key)
            for group, kept in zip(_groups(part), groups, strict=True):
                group.update({name: put_back(group.get(name), value, None) for name, value in kept.items()})

    def state_dict(self) -> list[Any]:
        """Return it as plain values and tensors, state by the place of its parameter in the groups."""
        saved = []
        for part, state, groups in self._kept:
            places = {id(p): k for k, p in enumerate(p for g in _groups(part) for p in g["params"])}
            by_place = [[places[id(key)], value] for key, value in state if id(key) in places]
            saved.append([by_place, groups])
        return saved

    def load_state_dict(self, saved: list[Any]) -> None:
        """Take over a state that fits the optimizer."""
        if len(saved) != len(self._kept):
            return
        loaded = []
        for (part, _, _), (by_place, groups) in zip(self._kept, saved, strict=True):
            params = [p for g in _groups(part) for p in g["params"]]
            loaded.append((part, [(params[place], value) for place, value in by_place if place < len(params)], groups))
        self._kept = loaded


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return groups


def copy_of(value: Any, on_host: bool = False) -> Any:
    """The same, tensors and containers copied; of a tensor that is spread over ranks the part of this one."""
    if isinstance(value, Tensor):
        here = local(value).detach()
        return here.to("cpu", copy=True) if on_host else here.clone()
    if isinstance(value, dict):
        return {key: copy_of(entry, on_host) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([copy_of(entry, on_host) for entry in value]) if type(value) in (list, tuple) else value
    return value


def put_back(now: Any, kept: Any, param: Any) -> Any:
    """What was kept, in the tensors and containers that are there now where these are alike.

    Args:
        now: What is there now.
        kept: What `copy_of` made of what was there.
        param: The parameter whose state it is, on whose device new tensors belong; None where there is none.
    """
    if isinstance(kept, Tensor):
        if isinstance(now, Tensor) and local(now).shape == kept.shape and now.dtype == kept.dtype:
            local(now).copy_(kept)
            return now
        on_device = isinstance(param, Tensor) and kept.dim() > 0  # counters of steps stay on the CPU
        return kept.to(param.device, copy=True) if on_device else kept.clone()
    if isinstance(kept, dict):
        there = now if isinstance(now, dict) else {}
        return {key: put_back(there.get(key), value, param) for key, value in kept.items()}
    if type(kept) in (list, tuple):
        entries = now if isinstance(now, (list, tuple)) and len(now) == len(kept) else [None] * len(kept)
        return type(kept)([put_back(a, b, param) for a, b in zip(entries, kept, strict=True)])
    return kept


def all_finite(params: Sequence[Tensor]) -> bool:
    """Whether all parameters are; those that are spread over ranks are not looked at, for ranks could disagree."""
    whole = [param.detach() for param in params if not is_sharded(param)]
    # Of 8 bits there are kinds for which torch has no such question.
    wide = [param.float() if param.is_floating_point() and param.element_size() == 1 else param for param in whole]
    return all(bool(torch.isfinite(param).all()) for param in wide)


class Point:
    """Copies of what belongs to a point; empty at first."""

    def __init__(self, on_host: bool = False, whole: bool = False) -> None:
        """Prepare.

        Args:
            on_host: Whether copies are kept in the memory of the CPU.
            whole: Whether the state of any optimizer belongs to it, not only of those that keep weights of their own.
        """
        self._on_host, self._whole = on_host, whole
        self._too_large = False  # memory has run out: another try would fail as well, after a long search for some
        self.forget()

    def forget(self) -> None:
        """Free the copies."""
        self.forget_weights()
        self._buffers: list[list[Tensor]] = []
        self.buffers: list[list[Tensor]] = []
        """Copies of the buffers, by module."""

    def forget_weights(self) -> None:
        """Free all copies but those of the buffers."""
        self._params: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        self._state: OptimizerState | None = None
        self.params: list[Tensor] = []
        """Copies of the parameters."""

    def __bool__(self) -> bool:
        """Whether a point is kept."""
        return bool(self._params)

    def keep(self, params: Sequence[Tensor], model: nn.Module | None, optimizer: Optimizer | None = None) -> None:
        """Copy a point, over the last one where that fits; where memory runs out there is none from then on.

        Args:
            params: The parameters.
            model: The model whose buffers belong to it.
            optimizer: The optimizer.
        """
        if self._too_large:
            self.forget()  # buffers too, which are copied by themselves
        elif self._whole and initialised():  # one rank must not go on without a point that others go back to
            self._keep(params, model, optimizer)
        else:
            with sparing(self._gone):
                self._keep(params, model, optimizer)

    def _gone(self) -> None:
        self.forget()
        self._too_large = True
        warn_user(
            "memory ran out while a point of training was copied: "
            + (
                "the search for the learning rate ends, and the rate given is kept."
                if self._whole
                else "from here on steps that explode are not taken back. AlphaScheduler(guard='cpu') keeps the copy "
                "in the memory of the CPU."
            )
        )

    def _keep(self, params: Sequence[Tensor], model: nn.Module | None, optimizer: Optimizer | None) -> None:
        self._params = list(params)
        self._shapes = [param.shape for param in params]
        self.params = self._copied(self.params, self._params)
        self._buffers = persistent_buffers(model)
        stores = self.buffers if len(self.buffers) == len(self._buffers) else [[] for _ in self._buffers]
        self.buffers = [self._copied(store, now) for store, now in zip(stores, self._buffers, strict=True)]
        whole = optimizer is not None and (self._whole or any(map(keeps_own_weights, inner_optimizers(optimizer))))
        self._state = OptimizerState(optimizer, self._on_host) if optimizer is not None and whole else None

    def keep_buffers(self, model: nn.Module | None) -> None:
        """Copy the buffers alone."""
        with sparing(self.forget):
            self._buffers = persistent_buffers(model)
            self.buffers = [self._copied([], now) for now in self._buffers]

    def _copied(self, store: list[Tensor], now: list[Tensor]) -> list[Tensor]:
        now = [local(tensor) for tensor in now]
        if not self._on_host:
            return copied(store, now)
        if len(store) == len(now) and all(
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(store, now, strict=True)
        ):
            for kept, tensor in zip(store, now, strict=True):
                kept.copy_(tensor.detach())
            return store
        return [tensor.detach().to("cpu", copy=True) for tensor in now]

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether it is a point of these very tensors."""
        same = same_tensors(self._params, list(params)) and bool(self._params)
        shapes = same and all(param.shape == shape for param, shape in zip(params, self._shapes, strict=True))
        return shapes and (self._state is None or self._state.fits())

    @torch.no_grad()
    def restore(self, params: Sequence[Tensor], model: nn.Module | None) -> bool:
        """Put the point back, bit for bit.

        Args:
            params: The parameters now.
            model: The model.

        Returns:
            False if it is not a point of these tensors: then nothing is written, and the weights are forgotten.
        """
        if not self.fits(params):
            self.forget_weights()
            return False
        for param, kept in zip(params, self.params, strict=True):
            local(param).copy_(kept)
        self.restore_buffers(model)
        if self._state is not None:
            self._state.restore()
        return True

    @property
    def of_this_rank(self) -> bool:
        """Whether a state dict of it would be of use to this rank only."""
        return self._state is not None and self._state.of_this_rank

    @torch.no_grad()
    def restore_buffers(self, model: nn.Module | None) -> None:
        """Put the buffers back, of the modules whose buffers are the same tensors in the same shapes."""
        now = {id(buffer) for buffers in persistent_buffers(model) for buffer in buffers}
        for buffers, copies in zip(self._buffers, self.buffers, strict=True):
            unchanged = all(
                id(buffer) in now and local(buffer).shape == kept.shape
                for buffer, kept in zip(buffers, copies, strict=True)
            )
            if unchanged:
                for buffer, kept in zip(buffers, copies, strict=True):
                    local(buffer).copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything."""
        return {
            "params": [kept.clone() for kept in self.params],
            "buffers": [[kept.clone() for kept in copies] for copies in self.buffers],
            "own": [] if self._state is None else self._state.state_dict(),
        }

    def load_state_dict(
        self, state: dict[str, Any], params: Sequence[Tensor], model: nn.Module | None, optimizer: Optimizer | None
    ) -> bool:
        """Take over a state; whether it is one of these tensors, else the point stays empty."""
        self.forget()
        buffers = persistent_buffers(model)
        flat = [*params, *(buffer for entry in buffers for buffer in entry)]
        kept = [*state["params"], *(copy for entry in state["buffers"] for copy in entry)]
        if not params or [local(t).shape for t in flat] != [t.shape for t in kept]:
            return False
        self.keep(params, model, optimizer)
        if not self:  # no memory
            return False
        for mine, saved in zip(self.params, state["params"], strict=True):
            mine.copy_(saved)
        for own, copies in zip(self.buffers, state["buffers"], strict=True):
            for mine, saved in zip(own, copies, strict=True):
                mine.copy_(saved)
        if self._state is not None:
            self._state.load_state_dict(state["own"])
        return True
