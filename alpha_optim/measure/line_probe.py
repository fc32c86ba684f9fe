"""Pairs the start and the end of one step, from the user's own passes.

One iteration may be the end of the pair (n-1, n) and the start of the pair (n, n+1). The end is
complete when `step` is called, the start only after it, when the direction is known. Between the two
iterations only the direction and a few numbers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.measure.end_point import reduced
from alpha_optim.measure.refresh import Refresh, Role
from alpha_optim.measure.step_ends import BatchLoss, EndPoint, PendingPair, PendingStart
from alpha_optim.observe.backward_passes import PassLog
from alpha_optim.observe.gradients import GradientWatch, LossGradients
from alpha_optim.observe.losses import LossTap
from alpha_optim.observe.model_inputs import ModelTap
from alpha_optim.observe.scalars import Truth, as_tensor, either, negated, readable
from alpha_optim.observe.some_elements import Spots, differ
from alpha_optim.observe.step_direction import (
    Direction,
    change_since,
    copied,
    direction_left_behind,
    is_plain_sgd,
    leaves_its_direction,
    parameters_of,
    same_tensors,
    well_resolved,
)
from alpha_optim.slopes.base import Backend, SampleSlopes


class LineProbe:
    """Watches iterations and turns pairs of them into measurements."""

    def __init__(self, model: nn.Module | None, loss_fn: nn.Module | None, sampled: bool) -> None:
        """Prepare; nothing is hooked before `begin`.

        Args:
            model: The model, if it was given.
            loss_fn: Loss function of the user, if it was given.
            sampled: Whether variances of slopes are measured now and then, on few samples.
        """
        self._params: list[Tensor] = []
        self.log = PassLog(self._gradients_gone, self._discarded, self._pass_opened)
        self.losses = LossTap(loss_fn, self.log.forward_started, self.log.anchor)
        self.watch = GradientWatch(self._accumulated)
        self.refresh = Refresh(sampled)
        self.pending: PendingStart | None = None
        self.newest: PendingPair | None = None
        self._model = ModelTap(model, self.log)
        self._backend: Backend | None = None
        self._due: set[Role] = set()
        self._edited: Truth | None = None
        self._spots = Spots()
        self._elements: Tensor | None = None  # of the parameters, as the running backward pass found them
        self._copies: list[Tensor] = []  # of the parameters before a step, reused
        self._keep_direction = False  # the gradients of a step are written to before the next
        self._resolved = False  # steps are long against the rounding of the parameters

    # ---------------------------------------------------------------- hooks

    def begin(
        self, optimizer: Optimizer, backend: Backend | None, iteration: int, start: bool, loss: bool
    ) -> None:
        """Hook what the coming iteration needs.

        Args:
            optimizer: The wrapped optimizer.
            backend: Backend of the iteration; None if it is in no pair.
            iteration: The coming iteration.
            start: Whether it is the start of a pair.
            loss: Whether its loss is wanted even if it is in no pair.
        """
        self._forget()
        params = parameters_of(optimizer)
        if not same_tensors(params, self._params):
            self.refresh.forget()
        self._params, self._backend = params, backend
        if backend is not None:
            self._model.attach()
            self._hook_samples(backend, iteration, start)
        else:
            self._model.detach()
        if backend is not None or loss:
            self.watch.attach(params, look=backend is not None)
            self.losses.attach()
        else:
            self.watch.detach()
            self.losses.detach()

    def _forget(self) -> None:
        """Forget the iteration; hooks that the next one may need stay."""
        if self._backend is not None and self._due:
            self._backend.close()
        self._backend, self._due = None, set()
        self._edited = self._elements = None
        self.log.clear()

    def _hook_samples(self, backend: Backend, iteration: int, start: bool) -> None:
        """Hook what the variances need, at those ends of steps for which they are due."""
        end_of = None if self.pending is None else self.pending.direction
        roles: list[tuple[Role, bool]] = [("start", start), ("end", end_of is not None)]
        self._due = {role for role, wanted in roles if wanted and self.refresh.due(role, iteration)}
        if self._due:
            backend.begin(end_of if "end" in self._due else None, "start" in self._due, self._params)

    def close(self) -> None:
        """Remove every hook and forget the iteration."""
        self._forget()
        self._model.detach()
        self.watch.detach()
        self.losses.detach()

    def mute(self) -> None:
        """Remove every hook; what was seen stays."""
        if self._backend is not None and self._due:
            self._backend.mute()
        self._model.detach()
        self.watch.mute()
        self.losses.detach()

    def _gradients_gone(self) -> bool:
        return self.watch.gradients_gone(self._params)

    def _discarded(self) -> bool:
        """The passes so far do not count; whether a step was skipped for them."""
        skipped = self.watch.not_finite()
        self.watch.forget()
        if self._backend is not None and self._due:
            self._backend.discard()
        return skipped

    def _pass_opened(self) -> None:
        """Compare the parameters that this backward pass belongs to with what the step left."""
        if self.pending is not None:
            direction = self.pending.direction
            uncleared = zip(direction.bases, self._params, strict=False)
            if direction.of_gradient and any(base is not None and base is p.grad for base, p in uncleared):
                direction.keep()  # the coming gradients are going to be added to those of the step
            self._elements = self._spots.of(self._params)
            edited = differ(self._elements, self.pending.spots)
            self._edited = edited if self._edited is None else self._edited | edited

    def _accumulated(self, param: Tensor) -> None:
        self.log.current().reached = True
        if self._backend is not None and self._due:
            self._backend.accumulated(param)

    def gradients_overwritten(self) -> None:
        """The gradients are about to be zeroed in place: keep those that are the pending direction."""
        if self.pending is not None and self.pending.direction.of_gradient:
            self.pending.direction.keep()

    # ---------------------------------------------------------------- observing

    def _observe(
        self,
        role: Role,
        iteration: int,
        direction: Direction,
        gradients: LossGradients,
        slopes: SampleSlopes | None,
        loss: BatchLoss,
        lost: Truth = False,
    ) -> EndPoint:
        """One end of a step in four numbers; variances as they were the last time if not measured now.

        Where the gradient of either end is ``lost``, samples need not add up to it.
        """
        passes = self.log.reached
        alone = loss.samples == 1 or any(entry.mixed for entry in passes)
        carried = None if alone or role in self._due else self.refresh.variance(role)
        point, variance, of_parameters = reduced(direction, gradients, passes, loss, slopes, carried)
        if role in self._due and loss.samples != 1:
            assert self._backend is not None
            verified = None
            if slopes is not None and variance is not None:
                numbers = as_tensor(of_parameters, slopes.values.device)
                known = as_tensor(negated(gradients.lost | lost), slopes.values.device, torch.bool)
                verified = self._backend.verified(numbers, known)
            if variance is not None and verified is not None:
                variance = either(readable(verified), variance, math.nan)
                point = replace(point, numbers=(*point.numbers[:3], variance))
            if isinstance(direction.length, Tensor) or direction.length != 0.0:  # else nothing was learned
                self.refresh.measured(role, iteration, variance, loss.samples)
        return point

    def finish(
        self, iteration: int, gradients: LossGradients | None, loss: BatchLoss
    ) -> PendingPair | str | None:
        """Complete the pair that ends in this iteration; called before the optimizer steps.

        Args:
            iteration: This iteration.
            gradients: Gradients of the loss.
            loss: Loss of the iteration.

        Returns:
            The pair, the reason why it is dropped, or None if there is none.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        reason = self._obstacle()
        if reason is not None or gradients is None:
            return reason
        if not len(pending.direction.bases) == len(self._params) == len(gradients.tensors):
            return "parameters_changed"
        if not pending.direction.intact():
            self._keep_direction = True
            return "direction_overwritten"
        assert self._backend is not None
        slopes = self._backend.end_slopes(pending.direction) if "end" in self._due else None
        lost = pending.point.lost
        point = self._observe("end", iteration, pending.direction, gradients, slopes, loss, lost)
        edited = differ(self._spots.of(self._params), pending.spots) if self._edited is None else self._edited
        self.newest = PendingPair.of(pending, point, edited, self._backend.read_check)
        return self.newest

    def start_obstacle(self, params: Sequence[Tensor]) -> str | None:
        """Say why this iteration cannot start a pair of ``params``; None if it can."""
        reason = self._obstacle()
        if reason is not None:
            return reason
        as_hooked = same_tensors(params, self._params) and not self.watch.params_edited(self._params)
        return None if as_hooked else "parameters_changed"

    def _obstacle(self) -> str | None:
        """Say why nothing was observed in this iteration, or None."""
        if self.log.skipped:
            return "step_skipped"
        return None if self.watch.saw_backward(self._params) else "no_backward"

    def before_step(self, optimizer: Optimizer) -> Tensor | list[Tensor]:
        """Return what tells the direction after the step: some elements of the parameters, or all."""
        if is_plain_sgd(optimizer) or (self._resolved and leaves_its_direction(optimizer)):
            return self._spots.of(self._params) if self._elements is None else self._elements
        self._copies = copied(self._copies, self._params)
        return self._copies

    def after_step(
        self,
        iteration: int,
        optimizer: Optimizer,
        before: Tensor | list[Tensor],
        gradients: LossGradients,
        loss: BatchLoss,
        lr: tuple[float | Tensor, ...],
    ) -> str | None:
        """Reduce the start along the step just made and wait for its end; or the reason why it is dropped."""
        if not gradients.intact():  # used as scratch memory by the optimizer: copied from now on
            self.watch.keep_copies = True
            return "gradients_modified"
        elements = self._spots.of(self._params)
        if isinstance(before, Tensor):
            direction = direction_left_behind(optimizer, differ(elements, before))
        else:
            direction = change_since(before, self._params)
        assert self._backend is not None
        slopes = self._backend.start_slopes(direction, gradients) if "start" in self._due else None
        point = self._observe("start", iteration, direction, gradients, slopes, loss)
        if direction.of_gradient and (self._keep_direction or self.watch.reuses_gradients(self._params)):
            direction.keep()
        if not direction.of_gradient:
            # On another device reading would mean waiting, and a copy costs less.
            known = elements.is_cpu and leaves_its_direction(optimizer)
            self._resolved = known and well_resolved(direction, elements)
        self.pending = PendingStart(iteration, direction, point, elements, lr)
        return None

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the pending step, variances, what was learned about the loop."""
        return {
            "watch": self.watch.state_dict(),
            "keep_direction": self._keep_direction,
            "resolved": self._resolved,
            "refresh": self.refresh.state_dict(),
            "pending": None if self.pending is None else self.pending.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Take over a state; its tensors move to the devices of ``params``."""
        self.watch.load_state_dict(state["watch"])
        self.refresh.load_state_dict(state["refresh"])
        self._keep_direction, self._resolved = bool(state["keep_direction"]), bool(state["resolved"])
        self._params = list(params)
        saved = state["pending"]
        self.pending = None if saved is None else PendingStart.from_state(saved, params)
