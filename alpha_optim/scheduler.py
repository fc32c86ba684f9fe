"""`AlphaScheduler`: the only code that writes learning rates.

Effective rate = scheduled rate x scale x envelope. The scheduled rate is the user's own, or what a torch
scheduler makes of it; the scale is the product of a policy's factors; the envelope is a policy's
annealing or warm-up. The schedule is stepped on the scheduled rates, so its curve is kept. While a policy
searches for the rate, the schedule's peak stands in for what it says at that moment: a search during a
warm-up would otherwise find a multiple of whatever the warm-up had reached.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Rprop
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from alpha_optim.alpha.records import GuardEvent, GuardReason
from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.distributed import as_text, from_text, initialised
from alpha_optim.observe.interrupts import uninterrupted
from alpha_optim.optimizer import AlphaGuided
from alpha_optim.policies import CalibrateThenAnneal, TargetAlpha, base
from alpha_optim.steer.checks import check_scheduler_state, check_scheduling, load_whole, sealed
from alpha_optim.steer.explosions import ExplosionCuts
from alpha_optim.steer.news import News
from alpha_optim.steer.point import inner_optimizers
from alpha_optim.steer.rates import GroupRates, clamped, rates_in
from alpha_optim.steer.step_cycle import Session
from alpha_optim.user_warning import Once

LOG = logging.getLogger(__name__)
VERSION = 2
LAG = 1
"""On an accelerator policies see a measurement so many steps later, when it no longer has to be waited for."""
OWNER = 3
"""After so many calls in a row in which somebody else wrote a rate the rates are theirs."""
SPARSE = 3
"""A search needs a call per step: with so many steps or more between two calls it waits, ..."""
PATIENT = 3
"""... and after so many such calls the rate given is kept."""
RECOVERY = 1.3
"""Where the loop owns the rates, what the guard cut grows back by this factor per step."""

SMALLEST = 1e-200
"""A factor that stands for 0 where the bound ``min_lr`` makes rates of it, whose ratios are kept."""


class Cooling(NamedTuple):
    """The way down that `AlphaScheduler.cool_down` has begun.

    Attributes:
        begin: Progress at which it began.
        steps: Its length.
        highest: The highest envelope of the policy since: a warm-up is finished, and no other decay is heard of.
    """

    begin: int
    steps: int
    highest: float = 0.0

    def left(self, progress: int) -> float:
        """What it multiplies the rates by."""
        return max(0.0, 1.0 - (progress - self.begin) / self.steps)


class AlphaScheduler(LRScheduler):
    """Sets learning rates from measured alphas; stepped once per optimizer step.

    Args:
        optimizer: The wrapped optimizer.
        policy: Callable, measurement -> factor of the scale. Default: `CalibrateThenAnneal` if
            ``total_steps`` is given (without annealing if ``schedule`` is), else `TargetAlpha`, which searches no
            rate. For a run whose length is not known: ``CalibrateThenAnneal(1000, anneal=False)`` and `cool_down`.
        total_steps: Number of optimizer steps of the whole run.
        schedule: A torch scheduler; AlphaScheduler steps it, do not step it yourself. Until the rate is
            found the highest rate of its param groups stands in for it.
        min_lr: No rate falls below it; groups keep their ratios.
        max_lr: No rate rises above it; wins over ``min_lr``.
        guard: Skip batches that are not finite, and take back steps after which the loss is not finite
            or rose far beyond what losses of this run differ by; ``"cpu"``: and keep the copies that this
            needs in the memory of the CPU.

    Examples:
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
        guard: bool | str = True,
    ) -> None:
        """Take over the learning rates of ``optimizer``.

        Raises:
            TypeError: If optimizer, policy or schedule is something else.
            ValueError: If arguments contradict each other, or one is none of what is possible.
        """
        if not isinstance(optimizer, AlphaGuided):
            raise TypeError(
                f"AlphaScheduler needs an AlphaGuided optimizer, got {type(optimizer).__name__}; "
                "wrap it first: AlphaGuided(optimizer, model, loss_fn)"
            )
        check_scheduling(optimizer, policy, total_steps, schedule, (min_lr, max_lr), guard)
        optimizer._session.check_unsteered()
        if policy is None and total_steps is None:
            LOG.warning(
                "AlphaScheduler was given neither total_steps nor a policy: TargetAlpha keeps steps near the minimum "
                "along their direction, which over a whole run is a learning rate too low. It is searched with "
                "total_steps=...; where the length is not known with CalibrateThenAnneal(1000, anneal=False), and "
                "cool_down() in the end."
            )
        if policy is None:
            policy = TargetAlpha() if total_steps is None else CalibrateThenAnneal(
                total_steps, anneal=schedule is None
            )  # fmt: skip
        self.policy, self.schedule = policy, schedule
        self.min_lr, self.max_lr = float(min_lr), float(max_lr)
        self.scale = 1.0
        self._cuts = ExplosionCuts()
        self._once = Once()
        self._cut: float | None = None  # of the rates of a loop that owns them; None: they are ours
        self._sparse = 0  # calls after several steps, during a search
        self._cooling: Cooling | None = None
        self._rates = GroupRates(optimizer.param_groups, schedule, getattr(policy, "total_steps", None))
        self._inside_step = False  # whether the rates are cut for a step
        self._news = News(optimizer._session.progress, optimizer.iteration)
        self._guarded = guard
        self._decision = base.Decision(searching=base.decides(policy))  # until it is asked: peaks are to be scaled
        super().__init__(optimizer)
        self._steer()
        if self._decision.searching and any(group.get("maximize") for group in optimizer.param_groups):
            LOG.warning(
                "maximize=True: the search looks for rates at which the loss falls, and here it is to rise. Train the "
                "negated loss without maximize."
            )
        if self._decision.searching and any(isinstance(part, Rprop) for part in inner_optimizers(optimizer)):
            LOG.warning(
                "Rprop takes its learning rate as the first size of its steps and then ignores it, so none is searched."
            )
            self._interrupt_search(base.give_up)

    @property
    def _session(self) -> Session:
        session: Session = self.optimizer._session  # type: ignore[attr-defined] # - an AlphaGuided
        return session

    def _steer(self) -> None:
        """Tell the optimizer who decides what is measured, and who hears of the guard."""
        self._session.steered(_Listener(self), self._guarded)
        self._tell_session()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the copied or unpickled optimizer over."""
        self.__dict__.update(state)
        self._steer()

    def __repr__(self) -> str:
        """Say what the rates are and what the policy is doing."""
        rates = ", ".join(f"{rate:.3g}" for rate in self._rates.written)
        if self._cut is not None:  # what the policy says of itself is no longer so
            name = base.name_of(self.policy)
            return f"AlphaScheduler(learning rate {rates}, written by the training loop; {name} rests)"
        said = [f"learning rate {rates}", base.shown(self.policy)]
        if self._decision.scale is None and self.scale != 1.0:
            said.append(f"{self.scale:.3g} times the rates given, by policy and guard")
        if self._cooling is not None:
            said.append(f"cools down over {self._cooling.steps} steps from step {self._cooling.begin} on")
        return f"AlphaScheduler({', '.join(said)})"

    def _initial_step(self) -> None:
        """Write the first effective rates; torch's constructor calls this."""
        self._step_count = 1
        self.last_epoch = self._session.progress
        if base.decides(self.policy):
            self._decide(self._session.iteration)
        self._write()

    # ---------------------------------------------------------------- stepping

    @uninterrupted()
    def step(self, metrics: Any = None) -> None:
        """Tell the policy what was measured and done, advance the schedule and write the rates.

        Args:
            metrics: What `ReduceLROnPlateau` wants to see, if that is the schedule.

        Raises:
            TypeError: If the schedule is a `ReduceLROnPlateau` and there is no metric.
        """
        if isinstance(self.schedule, ReduceLROnPlateau) and metrics is None:
            raise TypeError("schedule=ReduceLROnPlateau needs its metric at every call: scheduler.step(metric)")
        optimizer, session = self.optimizer, self._session
        assert isinstance(optimizer, AlphaGuided)
        self._step_count += 1
        session.scheduler_stepped()
        self._news.resumed_at(session.resumed_at)
        if self._news.is_ahead_of(optimizer.iteration):
            if self._cut is None:
                self._rates.went_back(optimizer.param_groups)
            self._once.say(
                "AlphaScheduler has seen more steps than the optimizer has made: of a checkpoint load both states, "
                "optimizer.load_state_dict(...) and scheduler.load_state_dict(...), else moments, measurements and "
                "what is known of the rate do not belong together."
            )
        self._take_over_foreign_rates()
        if self._cut is not None:
            self._cut = min(1.0, self._cut * RECOVERY)
            self._news.skip_to(optimizer.iteration)
        elif self._too_sparse(optimizer):
            self._news.skip_to(optimizer.iteration)
            if self._sparse >= PATIENT:
                self._interrupt_search(base.give_up)
        else:
            lag = 2 + LAG if waits(optimizer) else 0
            guard = session.supervision.guard
            factor = self._news.tell(self.policy, optimizer.alpha_history, optimizer.iteration, guard, lag)
            if self._cooling is None:  # else the way down is given
                self.scale = min(1e30, max(1e-30, self.scale * factor))
            self._decide(optimizer.iteration)
            self.scale *= self._cuts.give_back(optimizer.iteration)
        self._tell_session()
        moved, self._news.progress = session.progress != self._news.progress, session.progress
        # What a metric does in trials that are put back tells nothing of progress.
        paused = isinstance(self.schedule, ReduceLROnPlateau) and self._decision.searching
        if moved and self.schedule is not None and self._cut is None and not paused:
            self._advance_schedule(self.schedule, metrics)
        self._news.iteration = optimizer.iteration
        self.last_epoch = session.progress
        self._write()

    def finish(self, loss: float | Tensor | None = None) -> None:
        """Judge the point that the last step reached, which no batch follows; call it once, after the last step.

        A run that was stopped while its learning rate was still searched ends where the best trial did, or where they
        all began. Of several processes every one has to call it.

        Args:
            loss: A loss at that point, of a batch as those of training; None: only whether everything is
                finite is looked at.
        """
        self._session.finish(None if loss is None else float(loss))
        self._interrupt_search(base.cut_short)

    def cool_down(self, steps: int) -> None:
        """Anneal the rates linearly to 0 over the coming steps, whatever the policy says; for runs without a horizon.

        A search that is still under way ends, with the best trial so far or where they all began. A guard still lowers
        the rates, ``min_lr`` bounds them, and a warm-up that is under way is finished. Called again, it anneals what
        is left over so many steps.

        Args:
            steps: Number of optimizer steps until 0, at least 1.

        Raises:
            ValueError: If that is no whole number of at least 1.
        """
        steps = base.whole("steps of cool_down", steps, 1)
        self._take_over_foreign_rates()
        if self._cut is not None:
            self._once.say("cool_down() changes nothing: the rates are the training loop's, which writes them itself.")
        self._interrupt_search(base.cut_short)
        left = 1.0 if self._cooling is None else self._cooling.left(self._session.progress)
        if left > 0.0:
            self.scale *= left
            self._cooling = Cooling(self._session.progress, steps)
        self._write()

    def _decide(self, iteration: int) -> None:
        """Ask a policy that searches for the scale, and for what is to be done with the points it keeps."""
        session, rates = self._session, self._peaks()
        given = rates[0] or max(rates)
        if max(rates) > 0.0:
            base.tell_limit(self.policy, self.max_lr / max(rates))
        decision = base.decision_of(self.policy, iteration, given)
        kept = decision.keep is None or session.search.keep(decision.keep, session.iteration)
        if not kept and decision.keep == "start":
            base.give_up(self.policy, iteration)  # there is nothing to go back to
            decision = base.decision_of(self.policy, iteration, given)
        if decision.restore is not None and not session.restore_point(decision.restore):
            self._once.say(
                "a point of the search for the learning rate is gone (parameters were added, replaced or resized, or a "
                "state was loaded without the scheduler's): the search ends here."
            )
            base.give_up(self.policy, iteration)
            decision = base.decision_of(self.policy, iteration, given)
        if decision.scale is not None and self._cooling is None:
            self.scale = decision.scale
        self._decision = decision

    def _tell_session(self) -> None:
        """Tell the session whether a search goes on."""
        searching = self._decision.searching and self._cut is None and not self._sparse
        trial = searching and self._decision.trial
        self._session.search.goes_on(searching, trial, over=not self._decision.searching or self._cut is not None)

    def _too_sparse(self, optimizer: AlphaGuided) -> bool:
        """Whether a search goes on, but the scheduler is stepped after several steps only."""
        if not self._decision.searching:
            self._sparse = 0
        elif optimizer.iteration - self._news.iteration >= SPARSE:
            self._sparse += 1
            self._once.say(
                "AlphaScheduler is stepped once per several optimizer steps. The search for the learning rate needs "
                "a call of scheduler.step() after every optimizer.step(); it waits, and the rate given is used."
            )
        else:
            self._sparse = 0
        return self._sparse > 0

    def _advance_schedule(self, schedule: LRScheduler | ReduceLROnPlateau, metrics: Any) -> None:
        """Step the schedule on its own rates."""
        self._set_rates(self._rates.scheduled)
        try:
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(metrics)
            else:
                schedule.step()
            self._rates.scheduled = rates_in(self.optimizer.param_groups)
        finally:
            self._set_rates(self._rates.written)

    def _take_over_foreign_rates(self) -> None:
        """A rate changed by someone else since is taken over as a ratio; one changed at every call is theirs."""
        if self._inside_step:
            return  # the rates are cut for the step
        searching = self._decision.searching and self._cut is None
        if not self._rates.take_over(self.optimizer.param_groups, searching):
            return
        if self._cut is None and self._rates.foreign >= OWNER:
            self._cut, self.scale = 1.0, 1.0
            self._once.say(
                f"a learning rate was changed outside AlphaScheduler {OWNER} times in a row: the rates are the "
                "training loop's from here on, and the policy rests. To combine the curve with it, pass it as "
                "AlphaScheduler(..., schedule=...) and do not write the rate yourself."
            )
        elif searching:
            kept = (
                "it is the rate given" if self.schedule is None else "the peak of the schedule is still the rate given"
            )
            self._once.say(
                f"a learning rate was changed outside AlphaScheduler while one is searched: {kept}, which counts where "
                "none is found, and the search goes on. If it came with optimizer.load_state_dict(), load "
                "scheduler.state_dict() as well, else the search begins anew in the middle of the run."
            )
        elif self._cut is None:
            self._once.say(
                "a learning rate was changed outside AlphaScheduler; the change is taken over as a ratio. "
                "A scheduler that should work together with it belongs into AlphaScheduler(schedule=...)."
            )
        if self._cut is not None:
            self._rates.belong_to_others()

    def _guard_acted(self, event: GuardEvent) -> GuardEvent:
        """Lower the rates after a step that was taken back, or give back what was taken; returns the whole event."""
        self._take_over_foreign_rates()
        factor = 1.0
        if event.reason is GuardReason.NO_EFFECT:  # of the last cut, which is what the guard asks to be undone
            factor = self._cuts.without_effect()
        elif event.restored and not self._session.search.trial:
            factor = self._cuts.taken_back(event, base.decides(self.policy), self._session.supervision.guard)
        event = replace(event, scale_factor=factor)
        if factor != 1.0:
            if self._cut is not None:
                self._cut = min(1.0, self._cut * factor)
            else:
                self.scale *= factor
                self._write()
        LOG.info("%s", event)
        base.tell_event(self.policy, event)
        return event

    def _not_stepped(self) -> None:
        """Several steps were made since the last call: a search waits, at the rate given."""
        if self._decision.searching and self._cut is None:
            self._take_over_foreign_rates()
            self._sparse = max(1, self._sparse)
            self._write()

    def _interrupt_search(self, tell: Callable[[base.Policy, int], None]) -> None:
        """Tell a policy whose search is under way that it cannot go on as it did, and do what it decides.

        Args:
            tell: Tells the policy: `base.give_up`, to go back to the rates given; `base.cut_short`, to use what was
                found so far; `base.start_over`, to begin anew from other parameters.
        """
        if self._decision.searching and self._cut is None:
            self._take_over_foreign_rates()
            tell(self.policy, self._session.iteration)
            self._decide(self._session.iteration)
            self._tell_session()
            self._write()

    def _meets_another_network(self) -> None:
        """Two networks that play against each other have no rate at which the loss falls fastest."""
        self._interrupt_search(base.give_up)
        self._once.say(
            f"the network of {type(self._session.optimizer).__name__} and another one are trained apart, and backward "
            "passes of one go through the other (a GAN?). A loss that another network pushes up tells nothing about "
            "the learning rate, so no rate is searched: the one given is used. Watching works as ever; consider "
            "guard=False."
        )

    def _parameters_edited(self) -> None:
        """The points of a search are none to go back to once somebody has changed the parameters."""
        if self._decision.searching and self._cut is None:
            self._session.search.forget()
            self._interrupt_search(base.start_over)
            self._once.say(
                "the parameters were changed while the learning rate is searched (weights were loaded?), so the search "
                "begins anew from there, or ends if much was spent on it already. Load weights before training begins."
            )

    def _group_comes(self) -> None:
        """A search ends before a param group is added: no point without its parameters can be gone back to."""
        if self._decision.searching and self._cut is None and self._session.iteration:
            self._interrupt_search(base.cut_short)
            self._once.say(
                "a param group is added while the learning rate is searched, so the search ends: with the best trial "
                "so far or, if there is none, where it began, at half of what its climb found or at the rates given. "
                "Add groups before training, or once the search is over (print(scheduler) says so)."
            )

    @contextmanager
    def _around_step(self) -> Iterator[None]:
        """Apply the guard's cut to rates that the training loop owns, inside the step only."""
        if self._cut is None or self._cut == 1.0:
            yield
            return
        rates = rates_in(self.optimizer.param_groups)
        self._set_rates([rate * self._cut for rate in rates])
        self._inside_step = True
        try:
            yield
        finally:
            self._inside_step = False
            self._set_rates(rates)

    # ---------------------------------------------------------------- writing

    def _peaks(self) -> list[float]:
        """The rates that the scale is a multiple of: those of a schedule at its peak."""
        return self._rates.scheduled if self.schedule is None else self._rates.peaks

    def _base_rates(self) -> list[float]:
        """What scale and envelope multiply: the scheduled rates, or their peaks while those are searched."""
        return self._peaks() if self._decision.searching else self._rates.scheduled

    def _write(self) -> None:
        if self._cut is None:
            self._set_rates(self._wanted())
        self._rates.written = rates_in(self.optimizer.param_groups)
        self._last_lr = [
            group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            for group in self.optimizer.param_groups
        ]

    def _wanted(self) -> list[float]:
        """Scheduled rate x scale x envelope, within the bounds.

        Raises:
            ValueError: If the policy's envelope is not a number >= 0.
        """
        self._rates.factor = 1.0
        if self._sparse:  # the search waits
            return clamped(self._rates.scheduled, self.min_lr, self.max_lr)
        envelope = self._envelope()
        scheduled = self._base_rates()
        if self._decision.scale is None:
            self.scale = self._within_bounds(self.scale)
        largest, scale = max(scheduled) * self.scale, self.scale
        if largest > self.max_lr and self._decision.scale is not None:
            scale *= self.max_lr / largest  # cut before the envelope, which still anneals it
        if envelope == 0.0 < self.min_lr:
            envelope = SMALLEST  # their ratios are known at no rate but 0
        wanted = [rate * scale * envelope for rate in scheduled]
        rates = clamped(wanted, self.min_lr, self.max_lr)
        factors = [rate / base for rate, base in zip(rates, scheduled, strict=True) if rate > 0.0 and base > 0.0]
        self._rates.factor = (scale * envelope if rates == wanted else max(factors, default=1.0)) or 1.0
        return rates

    def _within_bounds(self, scale: float) -> float:
        """The scale, which must not wind up against the bounds; those of a schedule's own curve cut only that."""
        peak = max(self._peaks())
        if peak <= 0.0:
            return scale
        lowest, highest = min(1.0, self.min_lr / peak), self.max_lr / peak
        return min(max(scale, lowest), highest if self.schedule is None else max(1.0, highest))

    def _envelope(self) -> float:
        """The policy's envelope, or what `cool_down` makes of it.

        Raises:
            ValueError: If the policy's is not a number >= 0.
        """
        progress = self._session.progress
        envelope = base.envelope_of(self.policy, progress)
        if not 0.0 <= envelope < math.inf:
            raise ValueError(
                f"policy {type(self.policy).__name__} returned envelope({progress}) = {envelope!r}; "
                "expected a finite number >= 0"
            )
        if self._cooling is None:
            return envelope
        self._cooling = self._cooling._replace(highest=max(self._cooling.highest, envelope))
        return self._cooling.highest * self._cooling.left(progress)

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # in place: compiled and capturable steps hold on to it
            else:
                group["lr"] = rate

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return everything the rest of the run depends on, as plain values."""
        policy, covered = base.state_of(self.policy), True
        try:
            policy = copy.deepcopy(policy)  # it may be what the policy goes on with
        except Exception:  # a lock, a tensor of a graph: then its checksum would not fit later
            covered = False
        state = {
            "version": VERSION,
            "scale": self.scale,
            **self._rates.state_dict(),
            **self._cuts.state_dict(),
            "decision": to_plain(self._decision),
            **self._news.state_dict(),
            "step_count": self._step_count,
            "cut": self._cut,
            "sparse": self._sparse,
            "cooling": None if self._cooling is None else list(self._cooling),
            "said": sorted(self._once.said),
            # A distributed checkpoint finds its way by keys, and those of a policy's state change as it goes on.
            "policy": as_text(policy) if initialised() else policy,
            "policy_name": base.name_of(self.policy),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }
        return sealed(state) if covered else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; call it after the optimizer's `load_state_dict` or before.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If it was written by a newer version, with another number of groups or another policy, or is no
                such state; nothing is changed then.
        """
        groups, name = len(self.optimizer.param_groups), base.name_of(self.policy)
        check_scheduler_state(state_dict, VERSION, groups, name)
        load_whole(self._load, state_dict, copy.deepcopy(self.state_dict()), "scheduler's")

    def _load(self, state_dict: dict[str, Any]) -> None:
        self.scale = float(state_dict["scale"])
        self._rates.load_state_dict(state_dict)
        self._rates.belong_to(self.optimizer.param_groups)
        self._cuts.load_state_dict(state_dict)
        self._news.load_state_dict(state_dict)
        self._step_count = int(state_dict["step_count"])
        self._cut, self._sparse = state_dict.get("cut"), int(state_dict.get("sparse", 0))
        cooling = state_dict.get("cooling")
        self._cooling = None if cooling is None else Cooling(*cooling)  # of two numbers in earlier versions
        self._once.said = set(state_dict.get("said", ()))
        self.last_epoch = self._news.progress
        self._decision = from_plain(base.Decision, state_dict.get("decision", {}), "decision")
        policy = state_dict["policy"]
        base.restore(self.policy, from_text(policy) if isinstance(policy, str) else policy)
        if self.schedule is not None and state_dict["schedule"] is not None:
            self.schedule.load_state_dict(state_dict["schedule"])
        self._set_rates(self._rates.written)
        self._last_lr = list(self._rates.written)
        self._tell_session()


def waits(optimizer: AlphaGuided) -> bool:
    """Whether reading a number means waiting for a device."""
    return not next(param for group in optimizer.param_groups for param in group["params"]).is_cpu


class _Listener:
    """What the optimizer asks and tells a scheduler, which it does not keep alive."""

    def __init__(self, scheduler: AlphaScheduler) -> None:
        self._scheduler = weakref.ref(scheduler)
        self._wants = base.wants_of(scheduler.policy)

    @property
    def policy(self) -> Any:
        """The scheduler's policy."""
        scheduler = self._scheduler()
        return None if scheduler is None else scheduler.policy

    def wants(self, iteration: int) -> bool:
        """Ask the policy."""
        return True if self._wants is None else self._wants(iteration)

    def guard_acted(self, event: GuardEvent) -> GuardEvent:
        """Tell the scheduler."""
        scheduler = self._scheduler()
        return event if scheduler is None else scheduler._guard_acted(event)

    def not_stepped(self) -> None:
        """Tell the scheduler."""
        scheduler = self._scheduler()
        if scheduler is not None:
            scheduler._not_stepped()

    def nothing_seen(self) -> None:
        """Tell the scheduler, whose search is over."""
        scheduler = self._scheduler()
        if scheduler is not None:
            scheduler._interrupt_search(base.cut_short)

    def meets_another_network(self) -> None:
        """Tell the scheduler."""
        scheduler = self._scheduler()
        if scheduler is not None:
            scheduler._meets_another_network()

    def parameters_edited(self) -> None:
        """Tell the scheduler."""
        scheduler = self._scheduler()
        if scheduler is not None:
            scheduler._parameters_edited()

    def group_comes(self) -> None:
        """Tell the scheduler."""
        scheduler = self._scheduler()
        if scheduler is not None:
            scheduler._group_comes()

    def around_step(self) -> AbstractContextManager[None]:
        """Ask the scheduler."""
        scheduler = self._scheduler()
        return nullcontext() if scheduler is None else scheduler._around_step()
