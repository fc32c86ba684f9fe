"""The backward passes of one iteration: which there were, with how many samples and which losses.

An iteration may have several backward passes (gradient accumulation). Each is opened by an anchor,
a hook on the loss value or on the model's output, which fires before any layer's. Passes that never
reach a parameter of the optimizer (another network, a gradient of the input) do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossCall:
    """One evaluation of the loss whose backward pass is running.

    Attributes:
        mean: The mini-batch loss, detached ``[]``.
        individual: Losses of the samples ``[N]``, normalised so that their mean is ``mean``; None
            if only the mean is known.
        samples: N, or None if it is not known.
        gamma: Factor between the mini-batch loss and what was sent backward ``[]``, or None.
        explicit: Whether the user handed the losses over; then loss_fn's own calls are ignored.
        order: When it was called; of several terms the first sets the scale.
    """

    mean: Tensor
    individual: Tensor | None
    samples: int | None
    gamma: Tensor | None = None
    explicit: bool = False
    order: int = 0


@dataclass(eq=False)
class BackwardPass:
    """What is known about one backward pass."""

    samples: int | None = None
    calls: list[LossCall] = field(default_factory=list)
    reached: bool = False
    mixed: bool = False  # several losses with different numbers of samples
    creates_graph: bool = False  # to be differentiated again

    def add(self, call: LossCall) -> None:
        """Add a term of the loss; a term that the user handed over replaces those seen."""
        if call.explicit and (call.individual is not None or not self.calls):
            self.calls = [call]
        elif not call.explicit and not any(
            seen.explicit and seen.individual is not None for seen in self.calls
        ):
            self.calls = [seen for seen in self.calls if not seen.explicit]
            self.calls = sorted([*self.calls, call], key=lambda seen: seen.order)
        if self.samples is None:
            self.samples = call.samples
        elif call.samples is not None and call.samples != self.samples:
            self.mixed = True

    @property
    def gamma(self) -> Tensor | None:
        """Factor between the mean loss and what was sent backward, None if not seen."""
        return self.calls[0].gamma if self.calls else None

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """Mean loss ``[]`` and individual losses ``[N]``, terms added up; only for a pass with calls."""
        first = self.calls[0]
        mean, individual = first.mean, first.individual
        for other in self.calls[1:]:
            if first.gamma is None or other.gamma is None:
                continue
            weight = (other.gamma / first.gamma).to(mean.device)
            mean = mean + weight * other.mean
            same_samples = individual is not None and other.individual is not None
            if same_samples and other.samples == first.samples:
                individual = individual + weight * other.individual  # type: ignore[operator] # - both checked
            else:
                individual = None
        return mean, individual


class PassLog:
    """Collects the backward passes of the current iteration."""

    def __init__(
        self,
        gradients_cleared: Callable[[], bool],
        on_discard: Callable[[], bool],
        on_open: Callable[[], None],
    ) -> None:
        """Start with no pass.

        Args:
            gradients_cleared: Says whether the gradients of earlier passes are gone.
            on_discard: Told that the passes so far do not count; says whether a step was skipped for them.
            on_open: Told that a pass begins.
        """
        self._gradients_cleared = gradients_cleared
        self._on_discard = on_discard
        self._on_open = on_open
        self.clear()

    def clear(self) -> None:
        """Forget everything; called between iterations."""
        self._passes: list[BackwardPass] = []
        self._by_task: dict[int, BackwardPass] = {}
        self._anchored: BackwardPass | None = None
        self.recorded: list[LossCall] = []
        self.forwards: list[int] = []
        self.inputs: set[int] = set()  # storages of what the model was called with
        self.skipped = False

    @property
    def reached(self) -> list[BackwardPass]:
        """Passes that reached a parameter, in order."""
        return [entry for entry in self._passes if entry.reached]

    @property
    def differentiated_twice(self) -> bool:
        """Whether the loss contains derivatives of the model (a gradient penalty)."""
        return any(entry.creates_graph and not entry.reached for entry in self._passes)

    def forward_started(self, samples: int | None = None) -> None:
        """A forward pass ends the reach of the last anchor (not: a recomputation in backward)."""
        if torch._C._current_graph_task_id() == -1:
            self._anchored = None
            if samples is not None:
                self.forwards.append(samples)

    def anchor(self, call: LossCall | None = None, samples: int | None = None) -> None:
        """Open the running backward pass, or add a term of the loss to it.

        Args:
            call: The loss whose backward pass starts.
            samples: Number of samples, if the anchor is the model's output.
        """
        task = torch._C._current_graph_task_id()
        entry = self._by_task.get(task)
        if entry is None and call is None and self._anchored is not None and self._anchored.calls:
            entry = self._by_task[task] = self._anchored  # a recomputed output, inside its loss's pass
        if entry is None:
            entry = self._open(task)
        self._anchored = entry
        if call is not None:
            entry.add(call)
        elif entry.samples is None:
            entry.samples = samples

    def current(self) -> BackwardPass:
        """Return the running backward pass; a nested one (checkpointing) belongs to its anchor."""
        task = torch._C._current_graph_task_id()
        entry = self._by_task.get(task)
        if entry is None and self._anchored is not None:
            entry = self._by_task[task] = self._anchored
        return entry if entry is not None else self._open(task)

    def discard(self) -> None:
        """The gradients of the passes so far were thrown away without a step.

        That is a skipped step if they were not finite (a gradient scaler); else it was another network's
        backward pass that came through here.
        """
        if self.reached:
            self.skipped = self._on_discard() or self.skipped
            self._passes, self._by_task, self._anchored, self.recorded = [], {}, None, []

    def _open(self, task: int) -> BackwardPass:
        if self.reached and self._gradients_cleared():
            self.discard()
        self._on_open()
        entry = BackwardPass()
        self._passes.append(entry)
        self._by_task[task] = entry
        return entry
