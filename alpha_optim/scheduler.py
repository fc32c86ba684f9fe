"""`AlphaScheduler`: the only code that writes learning rates.

Effective rate = scheduled rate x scale x envelope. The scheduled rate is the user's own, or what a torch
scheduler makes of it; the scale is the product of a policy's factors; the envelope is a policy's
annealing or warm-up. The schedule is stepped on the scheduled rates, so its curve is kept. While a policy
searches for the rate, the schedule's peak stands in for what it says at that moment: a search during a
warm-up would otherwise find a multiple of whatever the warm-up had reached.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.optimizer import AlphaGuided
from alpha_optim.policies import CalibrateThenAnneal, TargetAlpha, base
from alpha_optim.steer.checks import check_scheduler_state, check_scheduling
from alpha_optim.steer.guard import KEPT, Guard
from alpha_optim.steer.rates import clamped, peak_of, ratios, taken_over
from alpha_optim.user_warning import warn_user

LOG = logging.getLogger(__name__)
VERSION = 1
LOWER_ONCE = 0.5
LOWER_AGAIN = 0.1
SOON = 10
"""A step taken back lowers the scale by `LOWER_ONCE`; within `SOON` iterations of the last, or after a
return to the last good point, by `LOWER_AGAIN`."""
LAG = 1
"""On an accelerator policies see a measurement so many steps later, when it no longer has to be waited for."""


class AlphaScheduler(LRScheduler):
    """Sets learning rates from measured alphas; stepped once per optimizer step.

    Example:
        >>> import torch
        >>> from alpha_optim import AlphaGuided
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> scheduler = AlphaScheduler(optimizer, lambda m: 0.5 if m.alpha > 1.0 else 1.0)
        >>> scheduler.get_last_lr()
        [0.1]
    """

    def __init__(
        self,
        optimizer: AlphaGuided,
        policy: base.Policy | None = None,
        *,
        total_steps: int | None = None,
        schedule: LRScheduler | ReduceLROnPlateau | None = None,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        guard: bool = True,
    ) -> None:
        """Take over the learning rates of ``optimizer``.

        Args:
            optimizer: The wrapped optimizer.
            policy: Callable, measurement -> factor of the scale. Default: `CalibrateThenAnneal` if
                ``total_steps`` is given (without annealing if ``schedule`` is), else `TargetAlpha`.
            total_steps: Number of optimizer steps of the whole run.
            schedule: A torch scheduler; AlphaScheduler steps it, do not step it yourself. Until the rate is
                found the highest rate of its param groups stands in for it.
            min_lr: No rate falls below it; groups keep their ratios.
            max_lr: No rate rises above it; wins over ``min_lr``.
            guard: Take a step back when the loss after it is not finite or has risen beyond its noise,
                and skip steps with a gradient that is not finite.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If arguments contradict each other.
        """
        if not isinstance(optimizer, AlphaGuided):
            raise TypeError(
                f"AlphaScheduler needs an AlphaGuided optimizer, got {type(optimizer).__name__}; "
                "wrap it first: AlphaGuided(optimizer, model, loss_fn)"
            )
        check_scheduling(optimizer, policy, total_steps, schedule, (min_lr, max_lr))
        optimizer._session.check_unsteered()
        if policy is None:
            policy = TargetAlpha() if total_steps is None else CalibrateThenAnneal(
                total_steps, anneal=schedule is None
            )  # fmt: skip
        self.policy, self.schedule = policy, schedule
        self.min_lr, self.max_lr = float(min_lr), float(max_lr)
        self.scale = 1.0
        self._warned_foreign = False
        self._last_event = -SOON - 1
        self._scheduled = [float(group["lr"]) for group in optimizer.param_groups]
        self._written = list(self._scheduled)
        self._peaks = [peak_of(group) for group in optimizer.param_groups]
        self._seen_iteration = optimizer.iteration
        self._seen_measurement = optimizer.iteration - 1
        self._guarded = guard
        super().__init__(optimizer)
        self._steer()

    def _steer(self) -> None:
        """Tell the optimizer who decides what is measured, and who hears of the guard."""
        session = self.optimizer._session  # type: ignore[attr-defined] # - an AlphaGuided
        session.steered(base.wants_of(self.policy), self._guarded, self._guard_acted)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the copied or unpickled optimizer over."""
        self.__dict__.update(state)
        self._steer()

    def __repr__(self) -> str:
        """Say what the rates are and what the policy is doing."""
        return f"AlphaScheduler(learning rate {self._written}, scale {self.scale:.3g}, {self.policy!r})"

    def _initial_step(self) -> None:
        """Write the first effective rates; torch's constructor calls this."""
        self._step_count = 1
        self.last_epoch = self.optimizer.iteration  # type: ignore[attr-defined] # - an AlphaGuided
        self._write()

    # ---------------------------------------------------------------- stepping

    def step(self, metrics: Any = None) -> None:
        """Tell the policy what was measured and done, advance the schedule and write the rates.

        Args:
            metrics: What `ReduceLROnPlateau` wants to see, if that is the schedule.
        """
        optimizer = self.optimizer
        assert isinstance(optimizer, AlphaGuided)
        self._step_count += 1
        optimizer._session.reminders.scheduler_stepped(optimizer.iteration)
        self._take_over_foreign_rates()
        guard = optimizer._session.guard
        self.scale = min(1e30, max(1e-30, self.scale * self._factor(optimizer, guard)))
        return_wanted, trusted = base.return_wanted_by(self.policy), base.point_trusted_by(self.policy)
        if guard is not None:
            guard.return_wanted, guard.point_trusted = guard.return_wanted or return_wanted, trusted
        if optimizer.iteration != self._seen_iteration:  # a skipped step is not progress
            self._seen_iteration = optimizer.iteration
            if self.schedule is not None:
                self._advance_schedule(self.schedule, metrics)
        self.last_epoch = optimizer.iteration
        self._write()

    def _factor(self, optimizer: AlphaGuided, guard: Guard | None) -> float:
        """Product of the policy's answers to what is new: measurements, and steps made."""
        factor = 1.0
        for measurement in self._new_measurements(optimizer):
            factor *= base.factor_of(self.policy, measurement)
            self._seen_measurement = measurement.iteration
        losses = {} if guard is None else guard.losses_read()
        for iteration in range(max(self._seen_iteration, optimizer.iteration - KEPT), optimizer.iteration):
            factor *= base.step_factor_of(self.policy, iteration, losses.get(iteration, math.nan))
        return factor

    def _new_measurements(self, optimizer: AlphaGuided) -> list[AlphaMeasurement]:
        """Measurements that the policy has not seen, as old as they always are when it sees them."""
        newest = optimizer.iteration
        if waits(optimizer):
            newest -= 2 + LAG
        return optimizer.alpha_history.up_to(newest, after=self._seen_measurement)

    def _advance_schedule(self, schedule: LRScheduler | ReduceLROnPlateau, metrics: Any) -> None:
        """Step the schedule on its own rates."""
        self._set_rates(self._scheduled)
        try:
            if isinstance(schedule, ReduceLROnPlateau):
                if metrics is not None:
                    schedule.step(metrics)
            else:
                schedule.step()
            self._scheduled = self._rates()
        finally:
            self._set_rates(self._written)

    def _take_over_foreign_rates(self) -> None:
        """A rate changed by someone else since is taken over as a ratio."""
        now = self._rates()
        if len(self._written) != len(now):  # a group was added: its rate is a scheduled one
            added = now[len(self._written) :]
            for rates in (self._scheduled, self._peaks, self._written):
                rates += added
            return
        factors = ratios(now, self._written)
        if all(factor == 1.0 for factor in factors):
            return
        self._scheduled = taken_over(self._scheduled, factors, now)
        self._peaks = taken_over(self._peaks, factors, now)
        if not self._warned_foreign:
            self._warned_foreign = True
            warn_user(
                "a learning rate was changed outside AlphaScheduler; the change is taken over as a ratio. "
                "A scheduler that should work together with it belongs into AlphaScheduler(schedule=...)."
            )

    def _guard_acted(self, event: GuardEvent) -> GuardEvent:
        """Lower the scale after a step that was taken back; returns the event with what was done."""
        self._take_over_foreign_rates()
        if event.restored and event.reason != "policy_returned":
            again = event.iteration - self._last_event <= SOON or event.reason == "loss_drifted"
            self._last_event = event.iteration
            event = replace(event, scale_factor=LOWER_AGAIN if again else LOWER_ONCE)
            self.scale *= event.scale_factor
            self._write()
        LOG.info("%s", event)
        base.tell_event(self.policy, event)
        return event

    # ---------------------------------------------------------------- writing

    def _write(self) -> None:
        iteration = self.optimizer.iteration  # type: ignore[attr-defined] # - an AlphaGuided
        envelope = base.envelope_of(self.policy, iteration)
        if not 0.0 <= envelope < math.inf:
            raise ValueError(
                f"policy {type(self.policy).__name__} returned envelope({iteration}) = {envelope!r}; "
                "expected a finite number >= 0"
            )
        searching = self.schedule is not None and base.searches(self.policy, iteration)
        scheduled = self._peaks if searching else self._scheduled
        largest, scale = max(scheduled) * self.scale, self.scale
        if largest > self.max_lr and base.keeps_scale(self.policy):
            scale *= self.max_lr / largest  # cut before the envelope, which still anneals it
        elif self.schedule is None and largest > self.max_lr:
            self.scale = scale = scale * self.max_lr / largest  # it must not wind up against the bound
        wanted = [rate * scale * envelope for rate in scheduled]
        self._set_rates(clamped(wanted, self.min_lr, self.max_lr))
        self._written = self._rates()
        self._last_lr = [
            group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            for group in self.optimizer.param_groups
        ]

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # in place: compiled and capturable steps hold on to it
            else:
                group["lr"] = rate

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return everything the rest of the run depends on, as plain values."""
        return {
            "version": VERSION,
            "scale": self.scale,
            "scheduled": list(self._scheduled),
            "peaks": list(self._peaks),
            "written": list(self._written),
            "seen_iteration": self._seen_iteration,
            "seen_measurement": self._seen_measurement,
            "last_event": self._last_event,
            "step_count": self._step_count,
            "warned_foreign": self._warned_foreign,
            "policy": base.state_of(self.policy),
            "policy_name": base.name_of(self.policy),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; call it after the optimizer's `load_state_dict` or before.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If it was written by a newer version, with another number of groups or another policy.
        """
        groups, name = len(self.optimizer.param_groups), base.name_of(self.policy)
        check_scheduler_state(state_dict, VERSION, groups, name)
        self.scale = float(state_dict["scale"])
        self._scheduled, self._written = list(state_dict["scheduled"]), list(state_dict["written"])
        self._peaks = list(state_dict["peaks"])
        self._seen_iteration = int(state_dict["seen_iteration"])
        self._seen_measurement = int(state_dict["seen_measurement"])
        self._last_event, self._step_count = int(state_dict["last_event"]), int(state_dict["step_count"])
        self._warned_foreign = bool(state_dict["warned_foreign"])
        self.last_epoch = self._seen_iteration
        base.restore(self.policy, state_dict["policy"])
        if self.schedule is not None and state_dict["schedule"] is not None:
            self.schedule.load_state_dict(state_dict["schedule"])
        self._set_rates(self._written)
        self._last_lr = list(self._written)


def waits(optimizer: AlphaGuided) -> bool:
    """Whether reading a number means waiting for a device."""
    return not optimizer.param_groups[0]["params"][0].is_cpu
