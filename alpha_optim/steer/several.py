"""Several optimizers of one model as one: Muon for matrices and AdamW for the rest, say."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

from torch.optim import Optimizer

HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def make_hooks(optimizer: Optimizer) -> None:
    """Make what torch's own constructor makes, but for groups and state: those are the wrapped one's."""
    for name in HOOKS:
        setattr(optimizer, name, OrderedDict())


class _States(MutableMapping[Any, Any]):
    """The state of every parameter, with the optimizer that it belongs to."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, key: Any) -> Any:
        for optimizer in self._optimizers:
            if key in optimizer.state or any(key is p for g in optimizer.param_groups for p in g["params"]):
                return optimizer.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._of(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Any]:
        return (key for optimizer in self._optimizers for key in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


class Several(Optimizer):
    """A step of it is a step of each; its param groups are all of theirs, in order.

    Attributes:
        optimizers: The optimizers.
        state: All state of all of them, by parameter: a view.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Join optimizers of different parameters.

        Args:
            optimizers: At least one; none of them steps with a closure of its own (LBFGS).

        Raises:
            TypeError: If one of them is no optimizer.
            ValueError: If there is none, or a parameter belongs to two of them.
        """
        found = list(optimizers)
        for entry in found:
            if not isinstance(entry, Optimizer):
                raise TypeError(f"a list of optimizers must hold torch optimizers only, got {type(entry).__name__}")
        if not found:
            raise ValueError("the list of optimizers is empty; AlphaGuided([muon, adamw], model, loss_fn) wraps two")
        params = [id(param) for optimizer in found for group in optimizer.param_groups for param in group["params"]]
        if len(set(params)) < len(params):
            raise ValueError("a parameter belongs to more than one of the optimizers; every parameter has one rate")
        self._join(found)

    def _join(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        self.state = _States(optimizers)  # type: ignore[assignment] # - a view of theirs
        self._groups: list[dict[str, Any]] = []
        make_hooks(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups of all of them; the same list every time, as it is with one optimizer."""
        self._groups[:] = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        counts = [len(optimizer.param_groups) for optimizer in self.optimizers]
        if len(groups) != sum(counts):
            raise ValueError(f"expected {sum(counts)} param groups, one for each of the optimizers', got {len(groups)}")
        waiting = iter(groups)
        for optimizer, count in zip(self.optimizers, counts, strict=True):
            optimizer.param_groups = [next(waiting) for _ in range(count)]

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override] # - those of the first
        """The defaults of the first."""
        return self.optimizers[0].defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: it is not known whose group that is.

        Raises:
            ValueError: Always.
        """
        names = " or ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        raise ValueError(f"which of them gets the group? Call add_param_group of the optimizer itself ({names})")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure once, then make the step of each."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    step.hooked = True  # type: ignore[attr-defined] # - each of them runs the global hooks

    def train(self) -> None:
        """Switch those that have modes (Schedule-Free) to training."""
        self._switch("train")

    def eval(self) -> None:
        """Switch those that have modes to evaluation."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        for optimizer in self.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()

    def state_dict(self) -> dict[str, Any]:
        """Return one state dict, the parameters counted through."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            offset = sum(len(group["params"]) for group in groups)
            saved = optimizer.state_dict()
            state.update({place + offset: value for place, value in saved["state"].items()})
            groups += [{**g, "params": [place + offset for place in g["params"]]} for g in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of as many groups.

        Raises:
            ValueError: If it has another number of groups, or one of them another number of parameters; nothing is
                changed then.
        """
        groups, offset, begin = state_dict["param_groups"], 0, 0
        there, here = ([len(group["params"]) for group in entries] for entries in (groups, self.param_groups))
        if there != here:
            raise ValueError(
                f"this state dict has param groups of {there} parameters, the optimizers have groups of {here}; "
                "nothing was changed"
            )
        for optimizer in self.optimizers:
            mine = groups[begin : begin + len(optimizer.param_groups)]
            count = sum(len(group["params"]) for group in mine)
            state = {k - offset: v for k, v in state_dict["state"].items() if offset <= k < offset + count}
            renumbered = [{**g, "params": [place - offset for place in g["params"]]} for g in mine]
            optimizer.load_state_dict({"state": state, "param_groups": renumbered})
            begin, offset = begin + len(mine), offset + count

    def __repr__(self) -> str:
        """Show each."""
        return "\n".join(repr(optimizer) for optimizer in self.optimizers)

    def __getstate__(self) -> dict[str, Any]:
        """Return the optimizers."""
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the optimizers over."""
        self._join(state["optimizers"])
