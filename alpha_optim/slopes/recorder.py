"""Runs the layer hooks of one iteration, counts samples and puts passes together for the backends."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPass, BackwardPasses, partly_seen, scale_of, total_samples
from alpha_optim.slopes.base import (
    AGAIN,
    ALL,
    DERIVATIVES,
    OTHER_TERMS,
    SAMPLES,
    SUBSET,
    Names,
    SampleSlopes,
    Unaccounted,
    scattered_as_all,
)
from alpha_optim.slopes.layers import Layer, LayerCall, LayerHooks, UnsupportedLayerError

BySample = dict[BackwardPass, dict[int, Tensor]]
"""Pass -> parameter or group of parameters -> numbers of its samples ``[n]``."""
Sink = Callable[[BackwardPass, LayerCall, int], None]
"""Takes the pass, a layer's call and the number of samples wanted of it; may raise UnsupportedLayerError."""


def by_sample(rows: Tensor, per_sample: int) -> Tensor:
    """Sums ``[N]`` of the rows ``[N * per_sample]`` that belong to each sample."""
    return rows if per_sample == 1 else rows.reshape(-1, per_sample).sum(1)


class SampleRecorder:
    """Calls of layers in the watched iteration, one by one as the backward pass goes."""

    def __init__(
        self,
        names: Names,
        sampled: bool,
        keep_output: tuple[type[nn.Module], ...] = (),
    ) -> None:
        """Prepare; nothing is hooked before `begin`.

        Args:
            names: Names of the parameters of the optimizer.
            sampled: Whether only the first `SAMPLES` samples are wanted.
            keep_output: Layer types whose output is needed.
        """
        self._names = names
        self._log: BackwardPasses | None = None
        self._limit = SAMPLES if sampled else math.inf
        self._hooks = LayerHooks(self._forward_started, self._called, self._failed_hook, keep_output)
        self._sink: Sink | None = None
        self.taken: dict[BackwardPass, int] = {}
        self._reached: dict[BackwardPass, set[int]] = {}
        self._failed: dict[BackwardPass, set[int]] = {}
        self.unaccounted = Unaccounted()

    def begin(self, passes: BackwardPasses, layers: list[Layer], sink: Sink) -> None:
        """Hook the layers for an iteration with these backward passes."""
        self.close()
        self._log, self._sink = passes, sink
        self._hooks.attach(layers)

    def close(self) -> None:
        """Remove the hooks and forget the passes."""
        self.mute()
        self.discard()
        self._log = None

    def mute(self) -> None:
        """Remove the hooks; what was seen stays."""
        self._hooks.detach()

    def discard(self) -> None:
        """Forget the passes so far."""
        self.taken, self._reached, self._failed = {}, {}, {}

    @property
    def passes(self) -> BackwardPasses:
        """The backward passes of the iteration."""
        assert self._log is not None
        return self._log

    def _failed_hook(self, error: BaseException) -> None:
        if self._log is not None:
            self._log.failed(error)

    def _forward_started(self) -> None:
        self.passes.forward_started()

    def accumulated(self, param: Tensor) -> BackwardPass:
        """Note that the running pass reached a parameter."""
        entry = self.passes.current()
        self._reached.setdefault(entry, set()).add(id(param))
        return entry

    def total_samples(self) -> int:
        """Number of samples in the passes that count."""
        return total_samples(self.passes.reached)

    def refused(self) -> bool:
        """Whether what flowed through the layers cannot be split over samples; notes why."""
        reason = None
        if any(entry.mixed for entry in self.passes.reached):
            reason = "several losses with different numbers of samples in one backward pass"
        elif partly_seen(self.passes.reached):
            reason = OTHER_TERMS
        elif any(entry.again for entry in self.passes.reached):
            reason = AGAIN
        elif any(call.subset for entry in self.passes.reached for call in entry.calls):
            reason = SUBSET
        elif self.passes.differentiated_twice:
            reason = DERIVATIVES
        if reason is not None:
            self.unaccounted.add(ALL, reason)
        return reason is not None

    def sampled_passes(self) -> list[BackwardPass]:
        """Passes that carry samples; one that only adds a term without samples (a penalty) does not."""
        reached = self.passes.reached
        known = [entry for entry in reached if entry.samples is not None]
        return [entry for entry in known or reached if self.taken.get(entry) != 0]

    def missing(self, entry: BackwardPass, have: set[int]) -> bool:
        """Whether a reached parameter has no numbers of single samples; notes it by name."""
        reached = self._reached.get(entry, set())
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
        parts: list[Tensor] = []
        taken: list[BackwardPass] = []
        scale = self.total_samples() * scale_of(self.passes.reached)
        for entry in self.sampled_passes():
            projections = projections_of(entry)
            if projections is None:
                return None
            if projections:
                device = projections[0].device
                total = torch.stack([value.to(device) for value in projections]).sum(0)
                parts.append(total * scale)
                taken.append(entry)
        if not parts:
            return None
        values = scattered_as_all(parts, taken, self.passes.reached)
        return SampleSlopes(values, complete=sum(map(len, parts)) == self.total_samples())

    def _called(self, call: LayerCall) -> None:
        assert self._sink is not None
        if self.passes.muted:
            return
        entry = self.passes.current()
        entry.creates_graph = entry.creates_graph or call.creates_graph
        if entry.samples is None:
            self.failed(entry, call.layer, "the number of samples of its batch is not known")
            return
        if entry not in self.taken:
            left = self._limit - sum(self.taken.values())
            self.taken[entry] = int(max(0, min(left, entry.samples)))
        if self.taken[entry] == 0:
            return
        try:
            if call.rows_per_sample(entry.samples) > 1 and not call.reads_from(self.passes.inputs):
                raise UnsupportedLayerError("its indices, several per sample, do not come from the model's input")
            self._sink(entry, call, self.taken[entry])
        except UnsupportedLayerError as error:
            self.failed(entry, call.layer, str(error))

    def failed(self, entry: BackwardPass, layer: Layer, reason: str) -> None:
        """Note that a layer's samples cannot be told apart in a pass."""
        self._failed.setdefault(entry, set()).update(map(id, layer.params.values()))
        names = [self._names.get(id(param), "?") for param in layer.params.values()]
        self.unaccounted.add(names, f"{type(layer.module).__name__}: {reason}")


def add_to(store: dict[int, Tensor], key: int, values: Tensor) -> None:
    """Add numbers of single samples to those that earlier calls left under the same key."""
    earlier = store.get(key)
    if earlier is None:
        store[key] = values
    elif len(earlier) == len(values):  # else the pass is mixed, and refused
        store[key] = earlier + values


def project(gradients: Tensor, direction: Tensor) -> Tensor:
    """Inner product of every individual gradient with a direction, float64 ``[n]``.

    Args:
        gradients: Individual gradients ``[n, *shape]``.
        direction: Direction ``[*shape]``.
    """
    direction = direction.to(gradients.dtype).to_dense() if direction.is_sparse else direction
    return (gradients.reshape(len(gradients), -1) @ direction.to(gradients.dtype).flatten()).double()
