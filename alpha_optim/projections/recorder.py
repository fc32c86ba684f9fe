"""Runs the layer hooks of one iteration and hands individual gradients to a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alpha_optim.hooks import Hook
from alpha_optim.passes import BackwardPass, PassLog
from alpha_optim.projections.base import Names, SampleSlopes, Unaccounted
from alpha_optim.projections.individual import NEEDS_OUTPUT, UnsupportedLayerError, individual_gradients
from alpha_optim.projections.layers import Layer, LayerCall, LayerTap, layers_of, tensors_in

Sink = Callable[[BackwardPass, Tensor, Tensor], None]

SAMPLED = 16
"""How many samples ``variance="sampled"`` uses."""


class SampleRecorder:
    """Individual gradients of the watched iteration, layer by layer as the backward pass goes."""

    def __init__(self, model: nn.Module, names: Names, log: PassLog, sampled: bool) -> None:
        """Prepare; nothing is hooked before `begin`.

        Args:
            model: The model.
            names: Names of the parameters of the optimizer.
            log: Backward passes of the iteration.
            sampled: Whether only the first `SAMPLED` samples are wanted.
        """
        self._model = model
        self._names = names
        self._log = log
        self._limit = SAMPLED if sampled else math.inf
        self._tap = LayerTap(log.forward_started, self._called, NEEDS_OUTPUT)
        self._root: RemovableHandle | None = None
        self._sink: Sink | None = None
        self._known: list[Layer] = []
        self._known_for: tuple[int, ...] | None = None
        self.taken: dict[BackwardPass, int] = {}
        self.reached: dict[BackwardPass, set[int]] = {}
        self._failed: dict[BackwardPass, set[int]] = {}
        self.unaccounted = Unaccounted()

    def begin(self, params: Sequence[Tensor], sink: Sink) -> None:
        """Hook the model; ``sink(pass, param, gradients [n, ...])`` gets the individual gradients."""
        self.close()
        self._sink = sink
        self._tap.attach(self._layers(params))
        hook = Hook(self._model_called, owner=self._model)
        self._root = self._model.register_forward_hook(hook, with_kwargs=True)

    def close(self) -> None:
        """Remove the hooks and forget the passes."""
        self.mute()
        self.discard()

    def mute(self) -> None:
        """Remove the hooks; what was seen stays."""
        self._tap.detach()
        if self._root is not None:
            self._root.remove()
            self._root = None

    def _layers(self, params: Sequence[Tensor]) -> list[Layer]:
        """Layers with parameters of the optimizer; found anew when those change."""
        key = tuple(map(id, params))
        if key != self._known_for:
            self._known, self._known_for = layers_of(self._model, {id(param) for param in params}), key
        return self._known

    def discard(self) -> None:
        """Forget the passes so far."""
        self.taken, self.reached, self._failed = {}, {}, {}

    def accumulated(self, param: Tensor) -> BackwardPass:
        """Note that the running pass reached a parameter."""
        entry = self._log.current()
        self.reached.setdefault(entry, set()).add(id(param))
        return entry

    def total_samples(self) -> int:
        """Number of samples in the passes that count."""
        return sum(entry.samples or 0 for entry in self._log.reached)

    def refused(self) -> bool:
        """Whether what flowed through the layers cannot be split over samples; notes why."""
        reason = None
        if any(entry.mixed for entry in self._log.reached):
            reason = "several losses with different numbers of samples in one backward pass"
        elif self._log.differentiated_twice:
            reason = "the loss contains derivatives of the model (create_graph=True)"
        if reason is not None:
            self.unaccounted.add(["all parameters"], reason)
        return reason is not None

    def sampled_passes(self) -> list[BackwardPass]:
        """Passes that carry samples; one that only adds a term without samples (a penalty) does not."""
        reached = self._log.reached
        known = [entry for entry in reached if entry.samples is not None]
        return [entry for entry in known or reached if self.taken.get(entry) != 0]

    def missing(self, entry: BackwardPass, have: set[int]) -> bool:
        """Whether a reached parameter has no individual gradients; notes it by name."""
        reached = self.reached.get(entry, set())
        lost = (reached - have) | (reached & self._failed.get(entry, set()))
        self.unaccounted.add(
            sorted(self._names.get(key, "?") for key in lost),
            "it got a gradient outside the calls of the modules that own it",
        )
        return bool(lost)

    def combine(self, projections_of: Callable[[BackwardPass], list[Tensor] | None]) -> SampleSlopes | None:
        """Add up the projections of every pass over its parameters, and put the passes together.

        Args:
            projections_of: The projections ``[n]`` of a pass, one per parameter; None if one is missing.

        Returns:
            The slopes of the samples, unscaled; None if they are not known.
        """
        if self.refused():
            return None
        parts, taken = [], 0
        for entry in self.sampled_passes():
            projections = projections_of(entry)
            if projections is None:
                return None
            if projections:
                device = projections[0].device
                total = torch.stack([value.to(device) for value in projections]).sum(0)
                parts.append(total * self.scale(entry))
                taken += self.taken[entry]
        if not parts:
            return None
        return SampleSlopes(torch.cat(parts), complete=taken == self.total_samples())

    def scale(self, entry: BackwardPass) -> Tensor | float:
        """Factor from a sample's share of what was sent backward to its own gradient: N_j / gamma_j."""
        if entry.gamma is None:
            return float(self.total_samples())
        assert entry.samples is not None
        return entry.samples / entry.gamma.double()

    def _model_called(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Anchor the backward pass at the model's output, for losses that are not seen."""
        if not torch.is_grad_enabled():
            return
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        batched = [tensor for tensor in tensors if tensor.dim() > 0]
        batched += [tensor for tensor in tensors_in((args, kwargs)) if tensor.dim() > 0]
        samples = batched[0].shape[0] if batched else None
        self._log.forward_started(samples)

        def arrived(_gradient: Tensor) -> None:
            if self._root is not None:
                self._log.anchor(samples=samples)

        for tensor in tensors:
            handle = tensor.register_hook(arrived)
            # The last layer may have returned this very tensor: the anchor has to come before its hook.
            hooks: Any = tensor._backward_hooks
            anchor, others = hooks.pop(handle.id), list(hooks.items())
            hooks.clear()
            hooks.update([(handle.id, anchor), *others])

    def _called(self, call: LayerCall) -> None:
        assert self._sink is not None
        entry = self._log.current()
        entry.creates_graph = entry.creates_graph or call.creates_graph
        if entry.samples is None:
            self._unsupported(entry, call, "the number of samples of its batch is not known")
            return
        if entry not in self.taken:
            left = self._limit - sum(self.taken.values())
            self.taken[entry] = int(max(0, min(left, entry.samples)))
        if self.taken[entry] == 0:
            return
        try:
            gradients = individual_gradients(call, entry.samples, self.taken[entry])
        except UnsupportedLayerError as error:
            self._unsupported(entry, call, str(error))
            return
        for name, values in gradients.items():
            self._sink(entry, call.layer.params[name], values)

    def _unsupported(self, entry: BackwardPass, call: LayerCall, reason: str) -> None:
        self._failed.setdefault(entry, set()).update(map(id, call.layer.params.values()))
        names = [self._names.get(id(param), "?") for param in call.layer.params.values()]
        self.unaccounted.add(names, f"{type(call.layer.module).__name__}: {reason}")


def add_gradients(cache: dict[int, Tensor], param: Tensor, gradients: Tensor) -> None:
    """Add individual gradients to those that earlier calls left for the same parameter."""
    earlier = cache.get(id(param))
    if earlier is None:
        cache[id(param)] = gradients
    elif len(earlier) == len(gradients):  # else the pass is mixed, and refused
        cache[id(param)] = earlier + gradients


def project(gradients: Tensor, direction: Tensor) -> Tensor:
    """Inner product of every individual gradient with a direction, float64 ``[n]``.

    Args:
        gradients: Individual gradients ``[n, *shape]``.
        direction: Direction ``[*shape]``.
    """
    direction = direction.to(gradients.dtype).to_dense() if direction.is_sparse else direction
    return (gradients.flatten(1) @ direction.to(gradients.dtype).flatten()).double()
