"""`AlphaGuided`: any torch optimizer, and alpha of every step it makes."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from alpha_optim.alpha.diagnosis import Diagnosis, diagnose
from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.distributed import as_text, asked_by_checkpoint, from_text
from alpha_optim.measure.plan import Every, Plan
from alpha_optim.observe.checks import check_arguments, check_membership
from alpha_optim.steer.checks import check_intact, check_state, load_whole, sealed
from alpha_optim.steer.point import inner_optimizers
from alpha_optim.steer.several import HOOKS, Several, make_hooks
from alpha_optim.steer.step_cycle import VERSION, Session

KEY = "alpha_guided"
"""Key of everything of ours in a state dict."""


class AlphaGuided(Optimizer):
    """Wraps an optimizer and measures the normalized step length alpha while training runs.

    The training loop stays as it is. Without an `AlphaScheduler` nothing is changed: parameters,
    buffers and random numbers stay bit for bit what the bare optimizer gives.

    Alpha says where a step ended on a parabola fitted along it: below 0 short of the minimum, 0 in it,
    above 0 beyond it. What it is computed from depends on what is given: the optimizer alone gives the
    ratio of two slopes, the model adds their noise, the loss function makes the fit complete.

    Args:
        optimizer: Any `torch.optim.Optimizer`, or a list of several of one model (Muon for matrices and
            AdamW for the rest): a step is all their steps.
        model: The model it trains; gives slopes of single samples.
        loss_fn: The loss function as a module; its own calls give the losses of single samples.
            Functional losses go through `backward` or `record_losses`.
        every: Measure the steps n with ``n % every == 0``, or those for which ``every(n)`` is true;
            None: the scheduler's policy decides.
        backend: How slopes of single samples are computed: ``"auto"`` or a name from
            `alpha_optim.slopes.choose.BACKENDS`.
        variance: ``"sampled"``: variances of the slopes from a bounded number of samples;
            ``"exact"``: from all of them. Means always use all samples.
        sample_dim: Dimension along which samples lie in the first tensor the model is called with: 0, or 1
            for models that are fed time first.

    Attributes:
        optimizer: The wrapped optimizer; ``param_groups``, ``state`` and ``defaults`` are its own.

    Examples:
        >>> import torch
        >>> model, loss_fn = torch.nn.Linear(3, 1), torch.nn.MSELoss()
        >>> optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss_fn(model(torch.randn(8, 3)), torch.randn(8, 1)).backward()
        ...     optimizer.step()
        >>> len(optimizer.alpha_history), optimizer.alpha_history[-1].information
        (2, <Information.FULL: 'full'>)

    References:
        Schneider, Dangel and Hennig (2021), Cockpit, https://arxiv.org/abs/2102.06604
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: nn.Module | None = None,
        loss_fn: nn.Module | None = None,
        *,
        every: Every = 1,
        backend: str = "auto",
        variance: str = "sampled",
        sample_dim: int = 0,
    ) -> None:
        """Wrap ``optimizer``.

        Raises:
            TypeError: If optimizer, model or loss_fn is something else.
            ValueError: If it cannot work: already wrapped, parameters that are not the model's, an
                impossible backend, ``every`` below 1.
        """
        for part in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
            if any(isinstance(inner, AlphaGuided) for inner in inner_optimizers(part)):
                raise ValueError(
                    "this optimizer is already wrapped in AlphaGuided, or has one inside; wrap once, from outside: "
                    "AlphaGuided(Lookahead(SGD(...)), model, loss_fn), AlphaGuided([muon, adamw], model, loss_fn)"
                )
        if isinstance(optimizer, (list, tuple)):
            optimizer = Several(optimizer)
        assert not isinstance(optimizer, Sequence)  # - Optimizer is none
        check_arguments(optimizer, model, loss_fn, every, variance, sample_dim)
        self.optimizer = optimizer
        self._make_hooks()
        self._begin(Session(Plan(optimizer, model, loss_fn, every, backend, variance, sample_dim)))

    def _begin(self, session: Session) -> None:
        """Step with a session, whose hooks go with the wrapper: the loss function may serve the next run, too."""
        self._session = session
        weakref.finalize(self, session.close).atexit = False

    def _make_hooks(self) -> None:
        """What torch's own constructor makes, but for groups and state: those are the wrapped one's."""
        make_hooks(self)
        self._accepted_hooks: OrderedDict[int, Callable[[AlphaGuided], Any]] = OrderedDict()

    # ---------------------------------------------------------------- the wrapped optimizer's own

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups, always the same object."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """Find on the wrapped optimizer what the wrapper lacks (``train`` and ``eval``, say).

        Raises:
            AttributeError: If that lacks it too.
        """
        # By this flag GradScaler would hand its scale to the wrapper, where no fused kernel looks.
        hidden = name == "_step_supports_amp_scaling" or name in ("optimizer", "_session", "_accepted_hooks", *HOOKS)
        if hidden or not hasattr(self.optimizer, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: If its parameters do not belong to the model.
        """
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if params is not None and not isinstance(params, (Tensor, set)):
            params = list(params)  # it may be a generator
            param_group = {**param_group, "params": params}
        entries = [params] if isinstance(params, Tensor) else list(params or ())
        named = [entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry for entry in entries]
        # What torch refuses, it refuses below, in its own words.
        fit = [entry for entry in named if isinstance(entry, Tensor) and entry.is_leaf]
        check_membership(fit, self._session.plan.model, self._session.plan.loss_fn, "the new group")
        known = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        refused = isinstance(self.optimizer, Several) or any(id(param) in known for param in fit)
        if len(fit) == len(named) and not refused:
            self._session.supervision.group_comes()
        self.optimizer.add_param_group(param_group)
        self._session.begin()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clear the gradients as the wrapped optimizer does; see `torch.optim.Optimizer.zero_grad`."""
        self._session.gradients_cleared(in_place=set_to_none is False)
        self.optimizer.zero_grad(*(() if set_to_none is None else (set_to_none,)))

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Finish the measurement of the last step and make the next.

        Args:
            closure: As torch's. Its first evaluation is the end of the last step and the start of this.
            **kwargs: Passed on to the wrapped optimizer.

        Returns:
            What the wrapped optimizer returns.
        """
        for pre_hook in tuple(self._optimizer_step_pre_hooks.values()):
            changed = pre_hook(self, (self, closure), kwargs)
            if changed is not None:
                (_, closure), kwargs = changed
        accepted = self._tell_accepted if self._accepted_hooks else None
        result = self._session.step(closure, kwargs, accepted)
        for post_hook in tuple(self._optimizer_step_post_hooks.values()):
            post_hook(self, (self, closure), kwargs)
        return result

    def register_accepted_hook(self, hook: Callable[[AlphaGuided], Any]) -> RemovableHandle:
        """Call ``hook(optimizer)`` inside `step` when the point reached is accepted, before the next step is made.

        That is the place for averages of weights and for checkpoints: a point that is taken back is not seen. A
        checkpoint written there resumes with the batch at hand, fed again. Without a guard every point is accepted;
        while an `AlphaScheduler` searches the rate, hooks sleep.

        Args:
            hook: Called with this optimizer.

        Returns:
            A handle whose ``remove()`` removes it.

        Raises:
            TypeError: If ``hook`` is not callable.
        """
        if not callable(hook):
            raise TypeError(f"an accepted hook must be callable (it is called with the optimizer), got {hook!r}")
        handle = RemovableHandle(self._accepted_hooks)
        self._accepted_hooks[handle.id] = hook
        return handle

    def _tell_accepted(self) -> None:
        for hook in tuple(self._accepted_hooks.values()):
            hook(self)

    # torch wraps `step` of every class to run hooks; the wrapped one's runs the global ones.
    step.hooked = True  # type: ignore[attr-defined] # - the mark torch looks for

    def backward(self, losses: Tensor) -> Tensor:
        """Run the backward pass of the mean of ``losses`` (``[N]``, ``[N, ...]``); return that mean ``[]``."""
        return self._session.backward(losses)

    def record_losses(self, losses: Tensor) -> None:
        """Take note of losses in a loop in which something else runs the backward pass.

        Of several micro-batches each is recorded before or after its own backward pass; losses whose pass has not come
        when gradients are cleared and others are recorded are forgotten. Give them with their graph, before the
        backward pass: the factor by which they are sent backward is then seen. Of detached ones the mean is taken for
        what is sent backward.

        Args:
            losses: The mini-batch loss ``[]``, or losses of the samples ``[N]`` or ``[N, ...]``.
        """
        self._session.record_losses(losses)

    @property
    def alpha_history(self) -> AlphaHistory:
        """Measurements so far, oldest first."""
        return self._session.history

    @property
    def guard_events(self) -> tuple[GuardEvent, ...]:
        """Steps that the scheduler's guard took back or did not let happen: the newest 10,000, oldest first."""
        return tuple(self._session.supervision.events)

    @property
    def guard_counts(self) -> dict[str, int]:
        """How many ``events``, ``batches_skipped`` and ``steps_taken_back`` there were in all; an event may be both."""
        events = self._session.supervision.events
        return {"events": events.count, "batches_skipped": events.skipped, "steps_taken_back": events.restored}

    @property
    def iteration(self) -> int:
        """Number of executed steps; the iteration in progress."""
        return self._session.iteration

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._session.plan.choice.name

    def diagnose(self) -> Diagnosis:
        """Say what alpha says so far: a record whose ``str`` is advice in plain words."""
        return diagnose(self._session.history, self.guard_events)

    def __repr__(self) -> str:
        """Show backend, reason and the wrapped optimizer."""
        name, reason = self._session.plan.choice
        ranks = self._session.processes.ranks
        where = "" if ranks is None else f" on {ranks.size} ranks"
        return f"AlphaGuided(backend={name!r}: {reason}; iteration {self.iteration}{where})\n{self.optimizer!r}"

    # ---------------------------------------------------------------- leaving

    def detach(self) -> None:
        """Remove every hook; model and wrapped optimizer are as before, `step` passes through.

        A search for the learning rate that is under way ends first: at its best trial, or where all of them began.
        """
        self._session.detach()

    def __enter__(self) -> AlphaGuided:
        """Return the optimizer; leaving the block detaches it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict with everything of ours under one more key."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state: dict[str, Any] = {**self.optimizer.state_dict(), KEY: sealed(self._session.state_dict())}
        if state["param_groups"] and asked_by_checkpoint():  # which keeps nothing but state and groups
            first, *others = state["param_groups"]
            counts = _counts(state["state"])
            text = as_text(sealed({**self._session.state_dict(tensors=False), "counts": counts}))
            state["param_groups"] = [{**first, KEY: text}, *others]
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state dict of a wrapped or of a bare optimizer (that starts at iteration 0).

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If it was written by a newer version of the package, or is not such a state; nothing is changed
                then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if "param_groups" not in state_dict or "state" not in state_dict:
            raise ValueError(
                "this is no state of an optimizer, which has 'state' and 'param_groups'; nothing was changed. Is it "
                "the scheduler's, or a whole checkpoint?"
            )
        groups = [{name: value for name, value in group.items() if name != KEY} for group in state_dict["param_groups"]]
        ours = state_dict.get(KEY)
        if ours is None:
            texts = [group[KEY] for group in state_dict["param_groups"] if group.get(KEY)]
            ours = from_text(texts[0]) if texts else None
            if isinstance(ours, dict) and ours.get("counts") != _counts(state_dict["state"]):
                ours = None  # a bare optimizer has moved on since
        if ours is not None:
            check_state(ours, VERSION, "an AlphaGuided", f", or delete its key {KEY!r} to start measuring anew")
            check_intact(ours, "an AlphaGuided")
        bare = {key: value for key, value in state_dict.items() if key != KEY}
        # Ours first, to see whether it can be taken over: the wrapped optimizer's cannot always be put back (ZeRO's).
        before = self._session.state_dict()
        load_whole(self._session.load_state_dict, ours, before, "optimizer's")
        try:
            self.optimizer.load_state_dict({**bare, "param_groups": groups})
        except BaseException:
            self._session.load_state_dict(before)
            raise
        self._session.load_state_dict(ours)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything needed to build the wrapper anew; hooks are not part of it."""
        plan = self._session.plan
        return {
            "optimizer": self.optimizer,
            "plan": (plan.model, plan.loss_fn, plan.every, plan.wanted, plan.variance, plan.sample_dim),
            "ours": self._session.state_dict(),
            "active": self._session.active,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the wrapper anew around a copied or unpickled optimizer."""
        self.optimizer = state["optimizer"]
        self._make_hooks()
        self._begin(Session(Plan(self.optimizer, *state["plan"])))
        self._session.load_state_dict(state["ours"])
        if not state["active"]:
            self._session.detach()


def _counts(state: dict[Any, Any]) -> float:
    """The steps that an optimizer has counted in its state, over all parameters."""
    steps = [entry["step"] for entry in state.values() if isinstance(entry, dict) and "step" in entry]
    return sum(map(float, steps))
