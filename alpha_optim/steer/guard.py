"""When a batch is not used, when a step is taken back, and when neither helps.

**Not finite.** A batch whose loss or gradient is not finite is skipped, and the buffers are as before it. If the next
one is not finite either, the last step is taken back and the rate lowered. If that did not help, the data are at fault:
the rate is given back, batches are skipped until one can be used, and so many in a row are no surprise from then on.

**Explosion.** A step is judged by the loss that follows it. If that rose further than consecutive losses of this run
differ by (`alpha.loss_level`), the batch is not used, and the next one is looked at from the same point:

- it is as low as before: the batch was hard, not the step bad; rises of that size are not looked at for a while;
- it is as high: the step is taken back and the rate lowered, and the third batch, from the point before, tells whether
  that was right. If it is as high again, the task has changed and the step was not bad: the level is accepted and the
  rate given back.

What is done `PATIENCE` times in a row without effect is not done any more. A run that diverges over many steps is
not the guard's business: in a search trials are, which the policy ends, and after it the user knows why a loss rises.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.alpha.records import GuardEvent, GuardReason
from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.measure.across_ranks import Report, Together
from alpha_optim.measure.step_ends import BatchLoss
from alpha_optim.observe.numbers import read
from alpha_optim.observe.step_direction import versions_of
from alpha_optim.steer.broken_batches import BrokenBatches
from alpha_optim.steer.point import Point, inner_optimizers, keeps_own_weights
from alpha_optim.steer.readings import UNSEEN, Reading, Readings
from alpha_optim.steer.risen_loss import PATIENCE, RisenLoss
from alpha_optim.user_warning import Once

KEPT = 1000
"""So many losses wait to be told to a policy, if its scheduler is stepped now and then only."""


class Judgement(NamedTuple):
    """What the guard says of a call: what it did, if anything, and whether the step is made."""

    event: GuardEvent | None
    step: bool


class Guard:
    """Judges the points reached, and goes back to the one before."""

    def __init__(self, model: nn.Module | None, optimizer: Optimizer | None = None, on_host: bool = False) -> None:
        """Start with nothing kept.

        Args:
            model: Model whose buffers are kept together with the parameters.
            optimizer: The optimizer, looked at for weights of its own.
            on_host: Whether points are kept in the memory of the CPU.
        """
        self._model = model
        own = optimizer is not None and any(map(keeps_own_weights, inner_optimizers(optimizer)))
        self._optimizer = optimizer if own else None
        self.on_host = on_host
        self._last = Point(on_host)
        self._before = UNSEEN  # the last step
        self._risen = RisenLoss()
        self._broken = BrokenBatches()
        self._once = Once()
        self._versions: list[int] | None = None  # of the parameters after the last step, if it was made here
        self._readings = Readings(model)
        self._losses: deque[tuple[int, float]] = deque(maxlen=KEPT)  # for the policy
        self.stepped = False  # whether a step was made from the last point
        self._accepted_at = -1  # iteration of the batch that was used last

    def kept_parameters(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """The copy of the parameters from before the coming step, if it is kept on their device."""
        return self._last.params if self._last.fits(params) and not self.on_host else None

    def losses_read(self) -> dict[int, float]:
        """Mini-batch losses of the steps let through since this was asked last, by iteration."""
        losses = dict(self._losses)
        self._losses.clear()
        return losses

    def rest(self, iteration: int, loss: BatchLoss | float | None) -> None:
        """Forget all points, since nobody steps the scheduler; losses are read for its policy all the same."""
        mean = read([loss.mean])[0] if isinstance(loss, BatchLoss) else loss
        if mean is not None:
            self._losses.append((iteration, mean))
        if self._last:
            self.forget()

    def forget(self) -> None:
        """Forget all points, and what the last loss was."""
        self._forget_points()
        self._last.forget()
        self._before, self._broken.in_a_row = UNSEEN, 0

    def _forget_points(self) -> None:
        """Forget the weights that could be gone back to; the buffers are still those from before the forward pass."""
        self._last.forget_weights()
        self._risen.forget()
        self.stepped = False

    def step_made(self, params: Sequence[Tensor]) -> None:
        """A step was made from the point kept last."""
        self.stepped, self._versions = bool(self._last), versions_of(params)

    def notice_edits(self, params: Sequence[Tensor]) -> None:
        """Forget points that are not of these tensors, or that the user has moved away from since the last step."""
        if self._last and not self._last.fits(params):  # tensors were added, replaced or resized
            self._forget_points()
        elif self.stepped and self._versions is not None and self._versions != versions_of(params):
            self._forget_for_an_edit()

    def moved(self, params: Sequence[Tensor]) -> None:
        """A search has put another point back: it is the one to go on from."""
        self.stepped, self._before = False, UNSEEN
        self._risen.moved()
        self._last.keep(params, self._model, self._optimizer)

    def _forget_for_an_edit(self) -> None:
        """The parameters are others than the last step left."""
        self._forget_points()
        self._before = UNSEEN
        self._risen.level_unknown()

    def _edited_elsewhere(self, together: Together) -> bool:
        """Whether some ranks have forgotten their point, and some have not: then all do."""
        return bool(together.sums.no_return) and self.stepped

    def came_from_data(self, rise: float) -> None:
        """A rise that was confirmed as an explosion turned out to be the data's: do not look at the next such."""
        self._risen.came_from_data(rise)

    @torch.no_grad()
    def model_is_about_to_be_called(self, params: Sequence[Tensor]) -> None:
        """Without a point to go back to, keep the buffers, which the forward pass may change."""
        if self._last and not self._last.buffers:
            return  # the model has none
        self.notice_edits(params)
        if not self._last:
            self._last.keep_buffers(self._model)

    # ---------------------------------------------------------------- judging

    @torch.no_grad()
    def judge(
        self, iteration: int, loss: BatchLoss, params: Sequence[Tensor], together: Together | None = None
    ) -> Judgement:
        """Judge the point reached, with one small transfer from the device, and put right what is wrong.

        Args:
            iteration: The iteration whose step is about to be made.
            loss: Its loss.
            params: The parameters, with the gradients the optimizer is about to use.
            together: What all ranks have seen, if there are several, this one's `report` among them.
        """
        if together is not None and self._edited_elsewhere(together):
            self._forget_for_an_edit()
        now = self._readings.read(loss, params) if together is None else Readings.heard(loss.variance, together)
        if now.params_broke and self.stepped and self._last and now.can_return:  # else somebody else wrote them
            return self._take_back(iteration, GuardReason.STATE_NOT_FINITE, now, params)
        if now.loss is not None and not math.isfinite(now.loss):
            return self._not_usable(iteration, GuardReason.LOSS_NOT_FINITE, now, params)
        if not now.gradient:
            return self._not_usable(iteration, GuardReason.GRADIENT_NOT_FINITE, now, params)
        if now.buffers_broke and self._broken.in_a_row < PATIENCE - 1:  # so many in a row seem to be meant
            self._broken.in_a_row += 1
            return self._skip(iteration, GuardReason.STATE_NOT_FINITE, now)
        if iteration == self._accepted_at:  # a run goes on from where a hook for accepted points has saved it
            self._last.keep(params, self._model, self._optimizer)
            self._readings.accepted()
            return Judgement(None, True)
        rose = self._risen.seen(now, self._before, self.stepped)
        if rose and self._risen.confirmed:
            judgement = self._take_back(iteration, GuardReason.LOSS_ROSE, now, params)
            self._broken.other_step_taken_back()
            self._risen.step_taken_back(judgement.event is not None and judgement.event.restored)
            return judgement
        if rose and self._risen.first_seen(_or_nan(now.loss) - _or_nan(self._before.loss)):
            return self._skip(iteration, GuardReason.LOSS_ROSE, now)
        event = self._settle(iteration, rose, now)
        if self._broken.over() and event is None:
            event = self._event(iteration, GuardReason.NO_EFFECT, now, skipped=False)
        self._accept(iteration, now, params)
        return Judgement(event, True)

    @torch.no_grad()
    def abandoned(
        self, iteration: int, loss: float, params: Sequence[Tensor], can_return: bool = True
    ) -> GuardEvent | None:
        """A backward pass whose loss is not finite came to no step, since a gradient scaler skipped it.

        Args:
            iteration: The iteration in progress.
            loss: The loss.
            params: The parameters.
            can_return: Whether the point before can be put back, on every rank.
        """
        if math.isfinite(loss) or not self._last.fits(params):
            return None
        now = Reading(loss, None, 0, can_return=can_return)
        event = self._not_usable(iteration, GuardReason.LOSS_NOT_FINITE, now, params).event
        return None if event is None else replace(event, skipped=False)  # it was the scaler that did

    @torch.no_grad()
    def finish(
        self, iteration: int, loss: float | None, params: Sequence[Tensor], together: Together | None = None
    ) -> GuardEvent | None:
        """Judge the point that the last step reached, which no batch follows.

        Args:
            iteration: The number of steps.
            loss: A loss at that point; None: only whether the point is finite is looked at.
            params: The parameters.
            together: What all ranks have seen, if there are several.
        """
        if together is not None:
            now = Readings.heard(None, together)
            loss = now.loss
            if not now.can_return:
                return None
        elif not self.stepped or not self._last.fits(params):
            return None
        else:
            mean = None if loss is None else torch.tensor(loss)
            now = self._readings.read(BatchLoss(mean, None, 0), params, gradients=False)
        broke = now.params_broke or (loss is not None and not math.isfinite(loss))
        if broke or self._risen.seen(now, self._before, self.stepped):
            reason = GuardReason.STATE_NOT_FINITE if broke else GuardReason.LOSS_ROSE
            event = self._take_back(iteration, reason, now, params).event
        elif now.buffers_broke:
            event = self._skip(iteration, GuardReason.STATE_NOT_FINITE, now).event
        else:
            event = None
        return None if event is None else replace(event, skipped=False)  # there is no batch

    def report(self, report: Report, params: Sequence[Tensor], pass_broke: bool, gradients: bool = True) -> Report:
        """Add to a report to other ranks what is judged on this one; nothing is read from the device.

        Args:
            report: The report.
            params: The parameters, with the gradients the optimizer is about to use.
            pass_broke: Whether a pass that came to no step had a loss that is not finite.
            gradients: Whether to look at gradients, too.
        """
        no_return = not (self.stepped and self._last.fits(params))
        return self._readings.report(replace(report, no_return=no_return, pass_broke=pass_broke), params, gradients)

    # ---------------------------------------------------------------- what is done

    def _accept(self, iteration: int, now: Reading, params: Sequence[Tensor]) -> None:
        """Keep the point from which a step is about to be made."""
        self._last.keep(params, self._model, self._optimizer)
        self._readings.accepted()
        self.stepped = False
        if now.loss is not None:
            self._risen.used(now.loss)
            self._losses.append((iteration, now.loss))
        self._before, self._accepted_at = now, iteration

    def _settle(self, iteration: int, rose: bool, now: Reading) -> GuardEvent | None:
        """Answer the question that an earlier batch has raised."""
        if not self._risen.settled(rose):
            return None
        if self._risen.gave_up:
            self._once.say(
                f"{PATIENCE} times in a row the loss rose and going back did not help: the loss grows by design (a new "
                "task, a growing term, other batches). From here on only losses that are not finite are judged; "
                "AlphaScheduler(..., guard=False) judges nothing from the start."
            )
        return self._event(iteration, GuardReason.NO_EFFECT, now, skipped=False)

    def _event(
        self, iteration: int, reason: GuardReason, now: Reading, restored: bool = False, skipped: bool = True
    ) -> GuardEvent:
        """What happened between the loss before and the one now."""
        before, after = _or_nan(self._before.loss), _or_nan(now.loss)
        return GuardEvent(iteration, reason, before, after, restored, skipped=skipped)

    def _skip(self, iteration: int, reason: GuardReason, now: Reading) -> Judgement:
        """Do not use the batch; buffers as before it."""
        self._last.restore_buffers(self._model)
        return Judgement(self._event(iteration, reason, now), False)

    def _not_usable(self, iteration: int, reason: GuardReason, now: Reading, params: Sequence[Tensor]) -> Judgement:
        """A batch that is not finite."""
        if self._broken.another() and self.stepped and now.can_return:
            judgement = self._take_back(iteration, reason, now, params)
            self._broken.step_taken_back(judgement.event is not None and judgement.event.restored)
            return judgement
        judgement = self._skip(iteration, reason, now)
        vain = self._broken.taking_back_was_vain()
        if vain or self._broken.worth_telling:
            self._once.say(
                "three batches or more have a loss or gradients that are not finite, and no step is to blame: the data "
                "seem to be at fault, or the loss itself, or the parameters given. Such batches are skipped. Look for "
                "nan and inf in inputs and targets, for batches without targets, for a logarithm or a division by 0 in "
                "the loss; optimizer.guard_events lists them."
            )
        return Judgement(self._event(iteration, GuardReason.NO_EFFECT, now), False) if vain else judgement

    def _take_back(self, iteration: int, reason: GuardReason, now: Reading, params: Sequence[Tensor]) -> Judgement:
        """Put the point before the last step back."""
        restored = self.stepped and now.can_return and self._last.restore(params, self._model)
        if not restored:
            self._last.restore_buffers(self._model)
        self.stepped = False
        return Judgement(self._event(iteration, reason, now, restored), False)

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next judgement needs; tensors are copies."""
        return {
            "last": self._last.state_dict() if self._last else None,
            "finite": self._readings.state_dict(),
            "before": list(self._before[:3]),
            **self._risen.state_dict(),
            **self._broken.state_dict(),
            "losses": to_plain(self._losses),
            "stepped": self.stepped,
            "accepted_at": self._accepted_at,
        }

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Take over a state; tensors move to where the parameters are."""
        if "stage" not in state:
            return  # of an older version: start anew
        fits = state["last"] is not None and self._last.load_state_dict(
            state["last"], params, self._model, self._optimizer
        )
        self.stepped = bool(state["stepped"]) and fits
        self._accepted_at = int(state.get("accepted_at", -1))
        self._versions = None  # the model may be loaded after the optimizer
        self._readings.load_state_dict(state["finite"])
        self._before = Reading(*state["before"])
        self._risen.load_state_dict(state)
        if not fits:  # the point that it may doubt
            self._risen.forget()
        self._broken.load_state_dict(state)
        self._losses = deque(from_plain(list[tuple[int, float]], state["losses"], "losses"), maxlen=KEPT)


def _or_nan(loss: float | None) -> float:
    return math.nan if loss is None else loss
