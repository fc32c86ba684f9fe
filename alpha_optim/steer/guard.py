"""When to take a step back, and how.

A step is judged by the loss that follows it. It is taken back when that loss is not finite, or has
risen by more than its own noise explains:

    f1 - f0 > k sqrt(var_f0 / N0 + var_f1 / N1),

with k the Student-t quantile of one in a million at N0 + N1 - 2 degrees of freedom (4.9 for batches
of 128, 7.4 for 8), or by more than `SCATTER` times the usual difference between consecutive batches:
losses of an exploding batch scatter as widely as they rise, and a single number has no variance. What
is taken back counts among the usual differences too, so that a heavy-tailed loss cannot stop a run. A run
that diverges over many steps goes back further, see `good_point`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alpha_optim.alpha.records import GuardEvent
from alpha_optim.measure.step_ends import BatchLoss
from alpha_optim.observe.step_direction import copied
from alpha_optim.steer.best_point import GoodPoint

FALSE_ALARM = 1e-6
SCATTER = 10.0
WARM = 10
"""Number of differences after which their mean counts."""
MEMORY = 0.98
"""Weight of the past in that mean."""
KEPT = 1000
"""So many losses wait to be told to a policy, if its scheduler is stepped now and then only."""


@lru_cache(maxsize=4096)
def rise_limit(samples_start: int, samples_end: int) -> float:
    """The k of the module docstring, a pure number; infinite below two samples at either end."""
    if samples_start < 2 or samples_end < 2:
        return math.inf
    from scipy.special import stdtrit

    return float(stdtrit(samples_start + samples_end - 2, 1.0 - FALSE_ALARM))


class Reading(NamedTuple):
    """What is judged, read from the device.

    Attributes:
        loss: Mean loss, None if not observed.
        variance: Variance of one sample's loss, None if not observed.
        samples: N, 0 if not known.
        state: Sum of the squares of parameters and buffers, in float32.
        gradients: Sum of the squares of the gradients. Neither is finite where numbers are finite but their
            squares are not: second moments and running variances would hold an inf for ever.
    """

    loss: float | None
    variance: float | None
    samples: int
    state: float = 0.0
    gradients: float = 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean loss, nan if not known."""
        if self.variance is None or self.samples == 0:
            return math.nan
        return math.sqrt(self.variance / self.samples)


UNSEEN = Reading(None, None, 0)


class Guard:
    """Keeps the point before the last step and the last good point, and goes back to them."""

    def __init__(self, model: nn.Module | None) -> None:
        """Start with nothing kept.

        Args:
            model: Model whose floating point buffers are kept together with the parameters.
        """
        self._model = model
        self._last: list[Tensor] = []
        self._good = GoodPoint()
        self._before = UNSEEN  # the last step
        self._scatter = 0.0  # mean squared difference of consecutive losses
        self._differences = 0
        self._losses: deque[tuple[int, float]] = deque(maxlen=KEPT)  # for the policy
        self.stepped = False
        self.return_wanted = False  # to the good point, by a policy
        self.point_trusted = True  # by a policy: whether the point reached may become the good point

    def kept_parameters(self, count: int) -> list[Tensor]:
        """The copy of the parameters from before the coming step, the first ``count`` of what is kept."""
        return self._last[:count]

    def losses_read(self) -> dict[int, float]:
        """Mini-batch losses of the steps let through since this was asked last, by iteration."""
        losses = dict(self._losses)
        self._losses.clear()
        return losses

    @torch.no_grad()
    def judge(
        self,
        iteration: int,
        loss: BatchLoss,
        params: Sequence[Tensor],
        look_closer: Callable[[], BatchLoss] | None = None,
    ) -> GuardEvent | None:
        """Judge the point reached, with one small transfer from the device, and put right what is wrong.

        Args:
            iteration: The iteration whose step is about to be made.
            loss: Its loss.
            params: The parameters, with the gradients the optimizer is about to use.
            look_closer: Returns the loss again with the variance of this batch's own samples; asked for where
                the loss rose, since the variance of an earlier batch may stand in for it.

        Returns:
            None if the step may be made; else what was wrong and whether a point was restored.
        """
        state = self._state(params)
        now = read(loss, state, [param.grad for param in params if param.grad is not None])
        reason = self._objection(now)
        if reason == "loss_rose" and look_closer is not None:
            closer = look_closer()
            now = now._replace(variance=None if closer.variance is None else float(closer.variance))
            reason = self._objection(now)
        if reason == "loss_drifted" and self._good.accept(state):
            reason = None  # the window is closed
        if self.return_wanted and self._good.tensors:
            reason = "policy_returned"
        self.return_wanted = False
        if reason is not None:
            return self._put_right(iteration, reason, now, state)
        self._good.close_window(state, self.point_trusted)
        self._keep(now, state)
        if now.loss is not None:
            self._losses.append((iteration, now.loss))
        return None

    def _objection(self, now: Reading) -> str | None:
        """What is wrong, if anything is."""
        if now.loss is not None and not math.isfinite(now.loss):
            return "loss_not_finite"
        if not math.isfinite(now.state):
            return "state_not_finite"
        if self._rose(now):
            return "loss_rose"
        if self._good.drifted():
            return "loss_drifted"
        return None if math.isfinite(now.gradients) else "gradient_not_finite"

    def _put_right(self, iteration: int, reason: str, now: Reading, state: Sequence[Tensor]) -> GuardEvent:
        """Restore what the reason asks for."""
        before, after = (math.nan if loss is None else loss for loss in (self._before.loss, now.loss))
        restored = True
        if reason in ("loss_drifted", "policy_returned"):
            before, after = self._good.levels()
            self._good.go_back(state, counts=reason == "loss_drifted")
        elif self.stepped and reason != "gradient_not_finite":
            if reason == "loss_rose":
                self._note_difference(now)
            for tensor, kept in zip(state, self._last, strict=True):
                tensor.copy_(kept)
        else:
            restored, before = False, math.nan
        self.stepped = False
        return GuardEvent(iteration, reason, before, after, restored)

    def _keep(self, now: Reading, state: Sequence[Tensor]) -> None:
        """Keep the point from which a step is about to be made."""
        self._last = copied(self._last, state)
        self._note_difference(now)
        self._before = now
        if now.loss is not None:
            self._good.note(now.loss, now.error, state)

    def _note_difference(self, now: Reading) -> None:
        """Update the usual squared difference of consecutive losses."""
        if self._before.loss is None or now.loss is None:
            return
        difference = now.loss - self._before.loss
        weight = MEMORY if self._differences >= WARM else self._differences / (self._differences + 1.0)
        self._scatter = weight * self._scatter + (1.0 - weight) * difference * difference
        self._differences += 1

    def _rose(self, now: Reading) -> bool:
        """Whether the loss rose beyond its noise."""
        before = self._before
        if now.loss is None or before.loss is None or not self.stepped:
            return False
        rise, limit = now.loss - before.loss, rise_limit(before.samples, now.samples)
        if math.isfinite(limit) and rise > limit * math.hypot(before.error, now.error):
            return True  # never where a variance is nan
        if self._differences >= WARM:
            return rise > SCATTER * math.sqrt(self._scatter)
        return now.variance is None and rise > 2.0 * abs(before.loss)

    def _state(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Parameters and the model's floating point buffers."""
        buffers = [] if self._model is None else list(self._model.buffers())
        return [*params, *(buffer for buffer in buffers if buffer.is_floating_point())]

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next judgement needs; tensors are copies."""
        return {
            "last": [kept.clone() for kept in self._last] if self.stepped else [],
            "good": self._good.state_dict(),
            "before": list(self._before[:3]),
            "scatter": self._scatter,
            "differences": self._differences,
            "losses": [list(entry) for entry in self._losses],
            "stepped": self.stepped,
            "return_wanted": self.return_wanted,
            "point_trusted": self.point_trusted,
        }

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Take over a state; tensors move to where the parameters are."""
        now = self._state(params)
        fits = len(state["last"]) == len(now)
        self.stepped = bool(state["stepped"]) and fits
        self._last = [k.to(n.device) for k, n in zip(state["last"], now, strict=True)] if fits else []
        self._good.load_state_dict(state["good"], now)
        self.return_wanted, self.point_trusted = bool(state["return_wanted"]), bool(state["point_trusted"])
        self._before = Reading(*state["before"])
        self._scatter, self._differences = float(state["scatter"]), int(state["differences"])
        self._losses = deque(((int(n), float(loss)) for n, loss in state["losses"]), maxlen=KEPT)


def read(loss: BatchLoss, state: Sequence[Tensor], gradients: Sequence[Tensor]) -> Reading:
    """Read what is judged in one transfer."""
    device = state[0].device
    both = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in (*state, *gradients)]
    norms = torch.stack([norm.to(device, torch.float32) for norm in torch._foreach_norm(both)]).square()
    values = [norms[: len(state)].sum(), norms[len(state) :].sum()]
    values += [
        torch.as_tensor(value, device=device).detach() for value in (loss.mean, loss.variance) if value is not None
    ]
    numbers = torch.stack([value.to(device, torch.float64) for value in values]).tolist()
    mean = numbers[2] if loss.mean is not None else None
    variance = numbers[-1] if loss.variance is not None else None
    return Reading(mean, variance, loss.samples, numbers[0], numbers[1])
