"""Everything of one iteration, from its first forward pass to its step; thrown away as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alpha_optim.distributed import is_sharded
from alpha_optim.measure.across_ranks import Together
from alpha_optim.measure.refresh import Role
from alpha_optim.measure.step_ends import BatchLoss, PendingStart, batch_loss
from alpha_optim.observe.backward_passes import BackwardPasses, LossCall, partly_seen
from alpha_optim.observe.gradients import Gradients, LossGradients
from alpha_optim.observe.hooks import of_gradient, ours, tensors_in, weakly
from alpha_optim.observe.losses import matches_loss
from alpha_optim.observe.memory import sparing
from alpha_optim.observe.model_calls import ModelCall, Run
from alpha_optim.observe.numbers import Truth, read
from alpha_optim.observe.some_elements import SomeElements, differ
from alpha_optim.observe.step_direction import AlongGradient
from alpha_optim.slopes.base import Backend


@dataclass(frozen=True)
class Task:
    """What an iteration is to find out.

    Attributes:
        number: The iteration.
        starts: Whether it is the start of a pair.
        pending: The step whose end it is; None if it is the end of none.
        backend: How slopes of samples are found; None if it is in no pair.
        due: At which ends of a step variances are measured anew.
        sample_dim: Dimension along which samples lie.
        guarded: Whether a guard judges its loss.
        checks: Whether losses are followed back to the outputs of the model.
    """

    number: int
    starts: bool
    pending: PendingStart | None
    backend: Backend | None
    due: frozenset[Role]
    sample_dim: int
    guarded: bool
    checks: bool

    @property
    def in_pair(self) -> bool:
        """Whether anything is measured."""
        return self.backend is not None


@dataclass(frozen=True)
class Unused:
    """What passes that came to no step leave behind, until there is one.

    Attributes:
        skipped: Whether a gradient scaler skipped a step for them.
        of_others: Tasks of those that were another network's.
        losses: Their losses, if a guard is going to judge them.
    """

    skipped: bool = False
    of_others: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()


class Iteration:
    """What is seen of one iteration; the hooks on model, loss function and parameters report here."""

    def __init__(
        self,
        task: Task,
        params: list[Tensor],
        gradients: Gradients,
        some_elements: SomeElements,
        pass_begins: Callable[[Sequence[Tensor]], None],
    ) -> None:
        """Begin.

        Args:
            task: What is to be found out.
            params: Parameters of the optimizer.
            gradients: Takes note of the gradients.
            some_elements: Looks at elements of the parameters.
            pass_begins: Told of every backward pass, with the parameters.
        """
        self.task, self.params, self.gradients = task, params, gradients
        self._some_elements, self._pass_begins = some_elements, pass_begins
        sharded = any(map(is_sharded, params))
        # A cycle of references would keep gradients and outputs until Python's collector comes by.
        self.passes = BackwardPasses(gradients.gone, weakly(self._discarded), weakly(self._opened), sharded)
        self.calls: list[ModelCall] = []
        self.interacting = False
        self.losses_declined = False  # a call of the loss function was seen, but its losses are of no use
        self.edited: Truth | None = None
        self.elements: Tensor | None = None
        self.end_product: Tensor | None = None
        self.before_forward: Callable[[], None] | None = None  # called once, before the model is
        self.lost_losses: list[Tensor] = []  # of passes that came to no step
        self._output_rows: set[int] = set()
        # Of the step that is being made:
        self.in_step = False
        self.loss = BatchLoss(None, None, 0)
        self.together: Together | None = None  # what all ranks have seen, if there are several
        self.used_gradients: LossGradients | None = None
        self.before: Tensor | list[Tensor] | None = None
        self.start: list[Tensor] | None = None
        self.lr: tuple[float | Tensor, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether nothing is measured or judged, so that there are no hooks."""
        return not self.task.in_pair and not self.task.guarded

    # ---------------------------------------------------------------- what the hooks ask

    @property
    def records(self) -> bool:
        """Whether calls of the model are to be kept for a repetition."""
        backend = self.task.backend
        return bool(self.task.due) and backend is not None and backend.records

    @property
    def follows_losses(self) -> bool:
        """Whether losses are followed back to the outputs of the model."""
        return self.task.checks

    @property
    def wants_losses(self) -> bool:
        """Whether losses of single samples are wanted."""
        return bool(self.task.due)

    def watched_outputs(self) -> list[tuple[int, int, Tensor]]:
        """Outputs of the model's calls with their graph: number of the call, place, tensor."""
        return [
            (number, place, tensor)
            for number, call in enumerate(self.calls)
            for place, tensor in enumerate(call.outputs)
            if tensor.requires_grad
            and not tensor.retains_grad
            # Another hook than ours would run.
            and all(ours(hook) for hook in (tensor._backward_hooks or {}).values())
            and tensor._version == call.output_versions[place]
        ]

    def output_rows(self) -> set[int]:
        """How many rows, or samples along ``sample_dim``, the outputs of the model have; empty if not called."""
        return self._output_rows

    # ---------------------------------------------------------------- what the hooks report

    def forward_starts(self) -> None:
        """The model is about to be called."""
        if self.before_forward is not None:
            call, self.before_forward = self.before_forward, None
            call()

    def model_called(self, samples: int | None, inputs: Any, shapes: list[torch.Size], call: ModelCall | None) -> None:
        """The model was called under autograd."""
        self.passes.forward_started(samples)
        if self.task.due:  # rules of layers ask where indices come from
            self.passes.inputs |= {
                tensor.untyped_storage().data_ptr()
                for tensor in tensors_in(inputs)
                if tensor.layout == torch.strided and not tensor.is_nested
            }
        self._output_rows |= {size for shape in shapes for size in shape[: self.task.sample_dim + 1]}
        if call is not None:
            self.calls.append(call)

    def loss_returned(self, loss: Tensor, samples: int | None, share: bool) -> None:
        """The model returned a loss; it counts if a backward pass starts there."""
        # A copy: the loop may scale the loss in place.
        call = LossCall(loss.detach().clone(), None, samples, returned=True, share=share)
        passes = self.passes

        def start(gradient: Tensor) -> None:
            if not passes.muted:
                passes.anchor(replace(call, gamma=gradient.detach()))

        loss.register_hook(of_gradient(start, passes.failed))

    def output_reached(self, run: Run, call: ModelCall | None, place: int, gradient: Tensor) -> None:
        """A backward pass has reached an output of the model."""
        if self.passes.muted:
            return
        entry = self.passes.anchor(samples=run.samples)
        self.passes.went_through(entry, run)
        if call is not None:
            entry.outputs.append((call, place, gradient.detach()))
            call.outputs.clear()

    def samples_interact(self) -> None:
        """The loss of a sample was seen to depend on another sample's output."""
        self.interacting = True

    def backward_reached(self) -> None:
        """A backward pass has reached its first parameter."""
        self.passes.current().reached = True

    @torch.no_grad()
    def backward_ended(self) -> None:
        """A backward pass has ended; nobody has touched the gradients yet."""
        self.gradients.backward_ended(look=self.task.in_pair)
        pending = self.task.pending
        if pending is not None and pending.direction.belongs_to(self.params):
            with sparing(lambda: None):  # taken once more in the step
                self.end_product = pending.direction.products([param.grad for param in self.params])

    def _discarded(self) -> bool:
        """The passes so far do not count; whether a step was skipped for them."""
        loss = batch_loss(self.passes, None).mean if self.task.guarded else None
        if loss is not None:
            self.lost_losses.append(loss)
        skipped = self.gradients.not_finite()
        self.gradients.forget()
        self.end_product = None
        if self.task.due and self.task.backend is not None:
            self.task.backend.discard()
        return skipped

    def _opened(self) -> None:
        """Compare the parameters that a backward pass belongs to with what the step left."""
        if self.task.in_pair:
            self.gradients.pass_begins()
            self._pass_begins(self.params)
        pending = self.task.pending
        if pending is None:
            return
        direction = pending.direction
        if isinstance(direction, AlongGradient):
            uncleared = zip(direction.change_.bases, self.params, strict=False)
            if direction.intact() and any(base is not None and base is param.grad for base, param in uncleared):
                direction.keep()  # the coming gradients are going to be added to those of the step
        self.elements = self._some_elements.of(self.params)
        edited = differ(self.elements, pending.elements)
        self.edited = edited if self.edited is None else self.edited | edited

    # ---------------------------------------------------------------- what was seen

    def unused(self) -> Unused:
        """What has come to no step so far; gradients at hand that are not finite are not going to."""
        # Within the step those of the coming one are judged already.
        losses, skipped = list(self.lost_losses), not self.in_step and self.gradients.not_finite()
        if skipped and self.task.guarded and (loss := batch_loss(self.passes, None).mean) is not None:
            losses.append(loss)
        return Unused(skipped or self.passes.skipped, tuple(self.passes.of_others), tuple(map(float, read(losses))))

    def take_over(self, unused: Unused) -> None:
        """Begin with what passes before, of the same iteration, have left."""
        self.passes.skipped, self.passes.discarded = unused.skipped, set(unused.of_others)
        self.lost_losses = [torch.tensor(loss) for loss in unused.losses]

    def all_of_loss(self) -> bool:
        """Whether the losses seen are all that reached the outputs of the model; True if not looked at."""
        reached = self.passes.reached
        return not partly_seen(reached) and all(matches_loss(entry, self.calls) for entry in reached)

    def without_data(self) -> bool:
        """Whether there were no samples, and so no losses, as on a rank that has run out of data."""
        return self.loss.mean is None and all(entry.samples == 0 for entry in self.passes.reached)

    def was_edited(self) -> Truth:
        """Whether the parameters were changed between the last step and the pass of this iteration."""
        pending = self.task.pending
        if self.edited is not None or pending is None:
            return self.edited if self.edited is not None else False
        return differ(self._some_elements.of(self.params), pending.elements)

    def elements_now(self) -> Tensor:
        """Some elements of the parameters, as the running backward pass found them if there was one."""
        return self._some_elements.of(self.params) if self.elements is None else self.elements
