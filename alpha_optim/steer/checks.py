"""Bad arguments and states of a scheduler, refused with what was wrong, what was expected and what to do."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable
from operator import itemgetter
from typing import Any
from zlib import crc32

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from alpha_optim.policies.base import check_policy
from alpha_optim.steer.rates import peak_of


def check_scheduling(
    optimizer: Any, policy: Any, total_steps: Any, schedule: Any, bounds: tuple[Any, Any], guard: Any
) -> None:
    """Refuse arguments of `AlphaScheduler` that cannot work together.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If arguments contradict each other.
    """
    if policy is not None and total_steps is not None:
        raise ValueError(
            "give either a policy or total_steps (which chooses CalibrateThenAnneal), not both; "
            "a policy that needs the horizon takes it itself, e.g. CalibrateThenAnneal(total_steps)"
        )
    if policy is not None:
        check_policy(policy)
    if schedule is not None and not isinstance(schedule, (LRScheduler, ReduceLROnPlateau)):
        raise TypeError(f"schedule must be a torch learning rate scheduler, got {type(schedule).__name__}")
    if schedule is not None and schedule.optimizer not in (optimizer, optimizer.optimizer):
        raise ValueError(
            f"schedule belongs to another optimizer ({type(schedule.optimizer).__name__}); build it on this "
            f"one: {type(schedule).__name__}(optimizer, ...)"
        )
    if not (isinstance(guard, bool) or guard == "cpu"):
        raise ValueError(f'guard must be True, False or "cpu" (copies in the memory of the CPU), got {guard!r}')
    for name, bound in zip(("min_lr", "max_lr"), bounds, strict=True):
        if isinstance(bound, (bool, str)) or not hasattr(bound, "__float__"):
            raise TypeError(f"{name} must be a learning rate, got {bound!r}")
    if not (0.0 <= bounds[0] <= bounds[1] and bounds[1] > 0.0):
        raise ValueError(f"expected 0 <= min_lr <= max_lr and max_lr > 0, got min_lr={bounds[0]}, max_lr={bounds[1]}")
    own = [index for index, group in enumerate(optimizer.param_groups) if group.get("lr", 0.0) is None]
    if own:
        raise ValueError(
            f"param group {own[0]} has lr=None: {type(optimizer.optimizer).__name__} finds its own learning rate; "
            "AlphaScheduler sets rates, so give the optimizer one (for Adafactor: lr=1e-3, relative_step=False)"
        )
    missing = [index for index, group in enumerate(optimizer.param_groups) if "lr" not in group]
    if missing:
        raise ValueError(f"param group {missing[0]} has no 'lr'; AlphaScheduler sets learning rates")
    if not any(map(peak_of, optimizer.param_groups)):
        raise ValueError(
            "every learning rate is 0, and so is every multiple of it; give the optimizer any rate > 0, "
            "for example lr=1e-3"
        )


CHECKSUM, SCHEDULE = "checksum", "schedule"
"""Keys of a state: its checksum, and what a schedule of torch returned, which may change while the run goes on."""


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the checksum of its plain values, which tells when it is loaded whether a bit has flipped.

    Tensors are left out, like the parameters they go with: reading gigabytes takes seconds.
    """
    return {**state, CHECKSUM: _checksum_of(state)}


def _checksum_of(state: dict[str, Any]) -> int:
    return _checksum({name: value for name, value in state.items() if name not in (CHECKSUM, SCHEDULE)}, 0)


def _checksum(value: Any, start: int) -> int:
    """CRC-32 of plain values, going on from another; the same after a detour by way of JSON."""
    if isinstance(value, dict):
        for name, entry in sorted(((_key(name), entry) for name, entry in value.items()), key=itemgetter(0)):
            start = _checksum(entry, _of_text(name, start))
        return start
    if isinstance(value, (list, tuple)):
        kinds = set(map(type, value))
        start = crc32(struct.pack("<q", len(value)), start)
        if kinds == {float} and not math.isnan(sum(value)):  # columns of histories are long
            return crc32(array("d", value).tobytes(), start)
        if kinds and all(issubclass(kind, str) for kind in kinds):
            return _of_text("\0".join(value), start)
        for entry in value:
            start = _checksum(entry, start)
        return start
    if isinstance(value, float):  # there is more than one nan
        return crc32(struct.pack("=d", math.nan if math.isnan(value) else value), start)
    if value is None or isinstance(value, bool):
        return _of_text(_key(value), start)
    if isinstance(value, int):
        return _of_text(int.__repr__(value), start)
    return _of_text(value, start) if isinstance(value, str) else start


def _of_text(text: str, start: int) -> int:
    return crc32(str.encode(text, errors="surrogatepass"), start)


def _key(name: Any) -> str:
    """A key as JSON writes it."""
    plain = {None: "null", True: "true", False: "false"}
    return plain[name] if name is None or isinstance(name, bool) else str(name)


def check_state(state: Any, version: int, what: str, advice: str) -> None:
    """Refuse what is no state of ours, or one that a newer version wrote.

    Args:
        state: What is to be taken over.
        version: Newest version that can be read.
        what: Whose state it ought to be.
        advice: What else can be done about one that cannot be read.

    Raises:
        ValueError: If it is one of these.
    """
    written = state.get("version") if isinstance(state, dict) else None
    if isinstance(written, bool) or not isinstance(written, int):
        raise ValueError(
            f"this is no state of {what}: it should be a dictionary with a 'version', as state_dict() returns, got "
            f"{type(state).__name__}{' without one' if isinstance(state, dict) else ''}; nothing was changed"
        )
    if written > version:
        raise ValueError(
            f"this state of {what} has version {written}, this package reads up to {version}: "
            f"update alpha_optim{advice}"
        )


def check_intact(state: dict[str, Any], what: str) -> None:
    """Refuse a state that was changed since it was returned; those of older versions do not tell.

    Raises:
        ValueError: If it was.
    """
    if CHECKSUM in state and state[CHECKSUM] != _checksum_of(state):
        raise ValueError(
            f"this state of {what} cannot be taken over, and nothing was changed: it was changed since state_dict() "
            f"returned it, its {CHECKSUM!r} does not fit. Load another checkpoint, or delete the key {CHECKSUM!r} if "
            "it was you who changed it"
        )


def check_scheduler_state(state: dict[str, Any], version: int, groups: int, policy: str) -> None:
    """Refuse the state of an `AlphaScheduler` that this one cannot continue.

    Args:
        state: What its ``state_dict`` returned.
        version: Newest version that can be read.
        groups: Number of param groups here.
        policy: Name of the policy here.

    Raises:
        ValueError: Saying what does not fit.
    """
    check_state(state, version, "an AlphaScheduler", "")
    missing = {"scheduled", "policy_name"} - set(state)
    if missing:
        raise ValueError(f"this state of an AlphaScheduler lacks {sorted(missing)}; nothing was changed")
    if len(state["scheduled"]) != groups:
        raise ValueError(
            f"this scheduler state is for {len(state['scheduled'])} param groups, the optimizer has {groups}"
        )
    if state["policy_name"] != policy:
        raise ValueError(
            f"this scheduler state is of the policy {state['policy_name']}, this scheduler has {policy}; build "
            "it with the policy that the run had"
        )
    check_intact(state, "an AlphaScheduler")


def load_whole(load: Callable[[Any], None], state: Any, before: Any, what: str) -> None:
    """Take over a state, or refuse it and leave everything as it was.

    Args:
        load: Takes over a state; may raise half way.
        state: The new one.
        before: The present one, to go back to.
        what: Whose state it is, for the message.

    Raises:
        ValueError: If the state cannot be taken over.
    """
    try:
        load(state)
    except Exception as error:
        load(before)
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"this {what} state cannot be taken over, and nothing was changed: {reason[:300]}. Is it another object's, "
            "or was it changed since state_dict() returned it?"
        ) from error
