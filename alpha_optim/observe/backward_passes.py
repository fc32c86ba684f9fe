"""The backward passes of one iteration: which there were, with how many samples and which losses.

An iteration may have several backward passes (gradient accumulation). Each is opened by an anchor,
a hook on the loss value or on the model's output, which fires before any layer's. Passes that never
reach a parameter of the optimizer (another network, a gradient of the input) do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from alpha_optim.observe.memory import Trouble
from alpha_optim.observe.model_calls import ModelCall, Run


@dataclass(frozen=True)
class LossCall:
    """One evaluation of the loss whose backward pass is running.

    Attributes:
        mean: The mini-batch loss, detached ``[]``.
        individual: Losses of the samples ``[N]``, normalised so that their mean is ``mean``; None
            if only the mean is known or the others are not wanted now.
        samples: N, or None if it is not known.
        gamma: Factor between the mini-batch loss and what was sent backward ``[]``, or None.
        explicit: Whether the user handed the losses over; then loss_fn's own calls are ignored.
        order: When it was called.
        complete: Whether losses of single samples can be had at all.
        subset: Whether the loss is one of some samples only, picked by a mask.
        worth_a_word: Whether the user should know that losses of samples cannot be had from it.
        returned: Whether the model returned it.
        share: Whether it is a share of one mean over all passes of the iteration, which they add up to.
        seen_at_output: Gradients of ``mean`` at the outputs of the model, by place; None if not looked at.
        model_calls: How many calls of the model there had been by then: nothing of the loss comes from later ones.
        prediction: The ``id`` of what made the prediction that it judges, in the graph; None if not known.
    """

    mean: Tensor
    individual: Tensor | None
    samples: int | None
    gamma: Tensor | None = None
    explicit: bool = False
    order: int = 0
    complete: bool = True
    subset: bool = False
    worth_a_word: bool = False
    returned: bool = False
    share: bool = False
    seen_at_output: dict[tuple[int, int], Tensor] | None = None
    model_calls: int = 0
    prediction: int | None = None

    def judging(self, maker: Any) -> LossCall:
        """The same, as a loss of a prediction that was made by a node of the graph, if it is known by which."""
        return self if maker is None else replace(self, prediction=id(maker))


@dataclass(eq=False)
class BackwardPass:
    """What is known about one backward pass."""

    samples: int | None = None
    calls: list[LossCall] = field(default_factory=list)
    outputs: list[tuple[ModelCall, int, Tensor]] = field(default_factory=list)
    """Gradients that reached outputs of the model: the call, which tensor of its output, and the gradient."""
    reached: bool = False
    mixed: bool = False  # several losses with different numbers of samples
    task: int = -1  # of autograd
    runs: set[int] = field(default_factory=set)  # calls of the model that it went back through, by their number
    goes_on: bool = False  # to another network, which has made the input of such a call
    frozen: bool = False  # and nothing of the model is trained in it
    again: bool = False  # one of those was gone back through by an earlier pass, whose samples are the same
    creates_graph: bool = False  # to be differentiated again

    def add(self, call: LossCall) -> None:
        """Add a term of the loss; a term that the user handed over replaces those seen."""
        if call.returned and any(not seen.returned for seen in self.calls):
            return  # what the loss was made from
        if call.explicit and (call.complete or not self.calls):
            self.calls = [call]
        elif not call.explicit and not any(seen.explicit and seen.complete for seen in self.calls):
            self.calls = [seen for seen in self.calls if not seen.explicit]
            self.calls = sorted([*self.calls, call], key=lambda seen: seen.order)
        if self.samples is None:
            self.samples = call.samples
        elif call.samples is not None and call.samples != self.samples:
            self.mixed = True

    @property
    def gamma(self) -> Tensor | None:
        """Factor between the mean loss and what was sent backward, None if not seen.

        Of several terms that with the largest weight sets the scale: another one's may be 0, or begin there. Terms that
        judge the same prediction (two targets that are mixed, a matrix of similarities and its transpose) are one loss,
        their mean by weight: none of them need have a weight that stays from step to step.
        """
        known = [call.gamma for call in self.calls if call.gamma is not None]
        if len(self.calls) < 2 or len(known) < len(self.calls):
            return self.calls[0].gamma if self.calls else None
        predictions = {call.prediction for call in self.calls}
        alike = len(predictions) == 1 and None not in predictions
        together = torch.stack([gamma.to(known[0]) for gamma in known])
        largest = together.abs().max()
        largest = torch.where(largest > 0.0, largest, torch.ones_like(largest))  # none of them counts
        mixed = alike & (together >= 0.0).all() & (together.sum() > 0.0)
        return torch.where(mixed, together.sum(), largest)

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """Mean loss ``[]`` and individual losses ``[N]``, terms added up; only for a pass with calls."""
        first, gamma = self.calls[0], self.gamma
        if len(self.calls) == 1 or gamma is None or first.gamma is None:
            return first.mean, first.individual
        terms = [((call.gamma / gamma).to(first.mean.device), call) for call in self.calls if call.gamma is not None]
        mean = torch.stack([weight * call.mean for weight, call in terms]).sum()
        single = [weight * call.individual for weight, call in terms if call.individual is not None]
        whole = len(single) == len(terms) and all(call.samples == first.samples for _, call in terms)
        return mean, torch.stack(single).sum(0) if whole else None


@dataclass(eq=False)
class Recorded:
    """Losses that were handed over.

    Attributes:
        call: The losses.
        passes: Passes that had reached a parameter by then.
        stale: Whether gradients were cleared before another pass had come.
    """

    call: LossCall
    passes: int
    stale: bool = False


class BackwardPasses:
    """Collects the backward passes of one iteration."""

    def __init__(
        self,
        gradients_cleared: Callable[[], bool],
        on_discard: Callable[[], bool],
        on_open: Callable[[], None],
        all_reach: bool = False,
    ) -> None:
        """Start with no pass.

        Args:
            gradients_cleared: Says whether the gradients of earlier passes are gone.
            on_discard: Told that the passes so far do not count; says whether a step was skipped for them.
            on_open: Told that a pass begins.
            all_reach: Whether every pass counts, since that it reaches parameters is not seen: sharded ones tell only
                when their gradients are spread over ranks, in the last pass of several.
        """
        self._all_reach = all_reach
        self._gradients_cleared = gradients_cleared
        self._on_discard = on_discard
        self._on_open = on_open
        self._passes: list[BackwardPass] = []
        self._by_task: dict[int, BackwardPass] = {}
        self._anchored: BackwardPass | None = None
        self._recorded: list[Recorded] = []
        self.forwards: list[int] = []  # samples of the model's calls
        self.inputs: set[int] = set()  # storages of what the model was called with
        self.skipped = False
        self.discarded: set[int] = set()
        """Tasks of another network's passes, whose finite gradients were thrown away."""
        self.muted = False  # while we walk a graph ourselves
        self.trouble: Trouble | None = None
        """What was raised first while something was seen: then none of it is used."""

    @property
    def reached(self) -> list[BackwardPass]:
        """Passes that reached a parameter, in order."""
        return [entry for entry in self._passes if entry.reached]

    @property
    def of_others(self) -> set[int]:
        """Tasks of passes that were another network's, a generator's through a critic.

        Their gradients are finite and were thrown away, or go on to that network while this one is frozen.
        """
        return self.discarded | {entry.task for entry in self._passes if entry.goes_on and entry.frozen}

    @property
    def losses_inside(self) -> bool:
        """Whether losses of samples can only be seen inside the model, which returns their mean."""
        calls = [call for entry in self.reached for call in entry.calls]
        return bool(calls) and all(call.returned and call.individual is None for call in calls)

    @property
    def recorded(self) -> list[LossCall]:
        """Losses that were handed over, in order; of more than there are passes not those whose pass never came."""
        surplus = max(0, len(self._recorded) - len(self.reached))
        out = [entry for entry in self._recorded if entry.stale][:surplus]
        return [entry.call for entry in self._recorded if entry not in out]

    @property
    def differentiated_twice(self) -> bool:
        """Whether the loss contains derivatives of the model (a gradient penalty)."""
        return any(entry.creates_graph and not entry.reached for entry in self._passes)

    def failed(self, error: BaseException) -> None:
        """Something was raised while these were looked at."""
        self.trouble = self.trouble or Trouble.of(error)

    def forward_started(self, samples: int | None = None) -> None:
        """A forward pass ends the reach of the last anchor (not: a recomputation in backward)."""
        if torch._C._current_graph_task_id() == -1:
            self._anchored = None
            if samples is not None:
                self.forwards.append(samples)

    def samples_for(self, rows: int) -> int:
        """Samples of the model's call that ``rows`` losses belong to: N, or the rows if they are fewer."""
        latest = self.forwards[::-1]
        together = [sum(self.forwards[-k:]) for k in range(2, len(self.forwards) + 1)]
        for candidate in latest:
            if candidate == rows:
                return candidate
        if rows in together and len(set(self.forwards)) > 1:  # of equal calls they may be steps in time
            return rows
        for candidate in latest:
            if candidate and rows % candidate == 0:
                return candidate
        return latest[0] if latest else rows

    def anchor(self, call: LossCall | None = None, samples: int | None = None) -> BackwardPass:
        """Open the running backward pass, or add a term of the loss to it.

        Args:
            call: The loss whose backward pass starts.
            samples: Number of samples, if the anchor is the model's output.

        Returns:
            The pass.
        """
        task = torch._C._current_graph_task_id()
        entry = self._by_task.get(task)
        if entry is None and call is None and self._anchored is not None and self._anchored.calls:
            entry = self._by_task[task] = self._anchored  # a recomputed output, inside its loss's pass
        if entry is None:
            entry = self._open(task)
        self._anchored = entry
        entry.creates_graph = entry.creates_graph or torch.is_grad_enabled()
        if call is not None:
            entry.add(call)
        elif entry.samples is None:
            entry.samples = samples
        return entry

    def went_through(self, entry: BackwardPass, run: Run) -> None:
        """Note which call of the model a pass went back through."""
        entry.runs.add(run.number)
        entry.goes_on, entry.frozen = entry.goes_on or run.made_by_others, run.frozen
        entry.again = entry.again or any(run.number in other.runs for other in self.reached if other is not entry)

    def current(self) -> BackwardPass:
        """Return the running backward pass; a nested one (checkpointing) belongs to its anchor."""
        task = torch._C._current_graph_task_id()
        entry = self._by_task.get(task)
        if entry is None and self._anchored is not None:
            entry = self._by_task[task] = self._anchored
        return entry if entry is not None else self._open(task)

    def record(self, call: LossCall) -> None:
        """Take losses that were handed over, in place of those whose backward pass never came before a `zero_grad`."""
        reached = len(self.reached)
        self._recorded = [entry for entry in self._recorded if not entry.stale or entry.passes < reached]
        self._recorded.append(Recorded(call, reached))

    def cleared(self) -> None:
        """Take note that ``zero_grad`` was called."""
        if self._recorded:
            reached = len(self.reached)
            for entry in self._recorded:
                entry.stale = entry.passes >= reached

    def discard(self) -> None:
        """The gradients of the passes so far were thrown away without a step.

        That is a skipped step if they were not finite (a gradient scaler); else it was another network's
        backward pass that came through here.
        """
        if self.reached:
            # Not of our loss function, or on through what another network has made.
            others = {entry.task for entry in self.reached if not entry.calls or entry.goes_on}
            skipped = self._on_discard()
            self.skipped, self.discarded = skipped or self.skipped, self.of_others | (set() if skipped else others)
            self._passes, self._by_task, self._anchored, self._recorded = [], {}, None, []

    def _open(self, task: int) -> BackwardPass:
        if self.reached and self._gradients_cleared():
            self.discard()
        self._on_open()
        entry = BackwardPass(reached=self._all_reach, task=task)
        self._passes.append(entry)
        self._by_task[task] = entry
        return entry


def partly_seen(passes: Sequence[BackwardPass]) -> bool:
    """Whether losses were seen of some passes and not of others, so that they are not all of the loss."""
    return len({bool(entry.calls) for entry in passes}) > 1


def inseparable(passes: Sequence[BackwardPass]) -> bool:
    """Whether what was sent backward cannot be told sample by sample."""
    return partly_seen(passes) or any(entry.mixed or entry.again for entry in passes)


def total_samples(passes: Sequence[BackwardPass]) -> int:
    """Samples of several passes together, 0 if not known; those of one call of the model count once."""
    return sum(entry.samples or 0 for entry in passes if not entry.again)


def scale_of(passes: Sequence[BackwardPass]) -> Tensor | float:
    """Factor from what was sent backward to the mean loss: 1 / Gamma, see `gamma_of`."""
    gamma = gamma_of(passes)
    return 1.0 if gamma is None else 1.0 / gamma


def gamma_of(passes: Sequence[BackwardPass]) -> Tensor | None:
    """Gamma: the weights with which the mean losses of the passes were sent backward, added up; None if not seen.

    Where every pass sends a share of one mean (``num_items_in_batch``), the shares have one weight.
    """
    gammas = [entry.gamma.double() for entry in passes if entry.gamma is not None]
    if not gammas:
        return None
    total = sum(gammas[1:], gammas[0])
    return total / len(gammas) if shares_of_one_mean(passes) else total


def shares_of_one_mean(passes: Sequence[BackwardPass]) -> bool:
    """Whether the losses of the passes are shares of one mean, which they add up to."""
    return any(call.share for entry in passes for call in entry.calls)


def loss_weight(entry: BackwardPass, passes: Sequence[BackwardPass]) -> Tensor | float:
    """Weight of the losses of a pass's samples, so that the mean over all samples is the mean loss."""
    gamma, total = gamma_of(passes), total_samples(passes)
    if len(passes) == 1 or gamma is None or entry.gamma is None or not entry.samples:
        return 1.0
    return entry.gamma.double() * total / (entry.samples * gamma)
