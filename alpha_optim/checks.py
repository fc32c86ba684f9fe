"""Bad input, refused with what was wrong, what was expected and what to do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from alpha_optim.direction import parameters_of
from alpha_optim.rates import peak_of


def check_arguments(optimizer: Any, model: Any, loss_fn: Any, every: Any, variance: Any) -> None:
    """Refuse what cannot work, before anything is touched.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it has a value that cannot work.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be an instance of torch.optim.Optimizer, got {_kind(optimizer)}; "
            "for example AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1))"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {_kind(model)}")
    if loss_fn is not None and not isinstance(loss_fn, nn.Module):
        raise TypeError(
            f"loss_fn must be a torch.nn.Module such as nn.CrossEntropyLoss(), got {_kind(loss_fn)}; "
            "for functional losses leave it out and call optimizer.backward(losses)"
        )
    if not (every is None or callable(every)) and (
        isinstance(every, bool) or not isinstance(every, int) or every < 1
    ):
        raise ValueError(
            f"every must be a whole number of at least 1, a function n -> bool, or None; got {every!r}"
        )
    if variance not in ("exact", "sampled"):
        raise ValueError(f"variance must be 'exact' or 'sampled', got {variance!r}")
    check_membership(parameters_of(optimizer), model, loss_fn, "the optimizer")


def check_membership(
    params: list[Tensor], model: nn.Module | None, loss_fn: nn.Module | None, holder: str
) -> None:
    """Refuse parameters that are not the model's.

    Raises:
        ValueError: Naming them.
    """
    if model is None:
        return
    names = named_parameters(model, loss_fn)
    if loss_fn is not None and params and not named_parameters(model):
        raise ValueError(
            f"model ({type(model).__name__}) has no parameters, loss_fn ({type(loss_fn).__name__}) has; the "
            "order is AlphaGuided(optimizer, model, loss_fn)"
        )
    foreign = [
        f"parameter {index} of shape {list(param.shape)}"
        for index, param in enumerate(params)
        if id(param) not in names
    ]
    if foreign:
        raise ValueError(
            f"{holder} has parameters that belong neither to model ({type(model).__name__}) nor to loss_fn: "
            f"{', '.join(foreign)}. Pass the model whose parameters the optimizer trains."
        )


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def named_parameters(*modules: nn.Module | None) -> dict[int, str]:
    """Names of all parameters of some modules by ``id``."""
    return {
        id(param): name for module in modules if module is not None for name, param in module.named_parameters()
    }


def check_losses(losses: Any, method: str, forwards: list[int], graph: bool) -> None:
    """Refuse losses that cannot be those of the samples.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If shape or graph are wrong.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"{method}(losses) takes a tensor of shape [N], got {type(losses).__name__}")
    if losses.dim() == 0 and graph:
        raise ValueError(
            f"{method}(losses) needs one loss per sample, shape [N] or [N, ...]; got a single number. "
            "Use reduction='none', or call .backward() on the mean yourself."
        )
    if losses.numel() == 0:
        raise ValueError(f"{method}(losses) got no losses (shape {list(losses.shape)}); expected [N]")
    if graph and not losses.requires_grad:
        raise ValueError(
            f"{method}(losses) needs losses with a graph; these were detached or computed under "
            "no_grad. Use record_losses(losses) if something else runs the backward pass."
        )
    # One loss per sample, or several (tokens), of the last forward pass or of the last few together.
    possible = [sum(forwards[k:]) for k in range(len(forwards))]
    if losses.dim() > 0 and possible and all(count and losses.shape[0] % count for count in possible):
        expected = forwards[-1]
        raise ValueError(
            f"{method}(losses) got {losses.shape[0]} losses, but the model's batch has {expected} "
            f"samples; expected shape [{expected}] or [{expected}, ...]"
        )


def check_scheduling(
    optimizer: Any, policy: Any, total_steps: Any, schedule: Any, bounds: tuple[float, float]
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
    if policy is not None and (not callable(policy) or isinstance(policy, type)):
        instance = f"; give an instance, {policy.__name__}(...)" if isinstance(policy, type) else ""
        raise TypeError(f"policy must be callable (measurement -> factor), got {policy!r}{instance}")
    if schedule is not None and not isinstance(schedule, (LRScheduler, ReduceLROnPlateau)):
        raise TypeError(f"schedule must be a torch learning rate scheduler, got {type(schedule).__name__}")
    if schedule is not None and schedule.optimizer not in (optimizer, optimizer.optimizer):
        raise ValueError(
            f"schedule belongs to another optimizer ({type(schedule.optimizer).__name__}); build it on this "
            f"one: {type(schedule).__name__}(optimizer, ...)"
        )
    if not 0.0 <= bounds[0] <= bounds[1]:
        raise ValueError(f"expected 0 <= min_lr <= max_lr, got min_lr={bounds[0]}, max_lr={bounds[1]}")
    missing = [index for index, group in enumerate(optimizer.param_groups) if "lr" not in group]
    if missing:
        raise ValueError(f"param group {missing[0]} has no 'lr'; AlphaScheduler sets learning rates")
    if not any(map(peak_of, optimizer.param_groups)):
        raise ValueError(
            "every learning rate is 0, and so is every multiple of it; give the optimizer any rate > 0, "
            "for example lr=1e-3"
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
    if state["version"] > version:
        raise ValueError(
            f"this scheduler state has version {state['version']}, this package reads up to {version}: "
            "update alpha_optim"
        )
    if len(state["scheduled"]) != groups:
        raise ValueError(
            f"this scheduler state is for {len(state['scheduled'])} param groups, the optimizer has {groups}"
        )
    if state["policy_name"] != policy:
        raise ValueError(
            f"this scheduler state is of the policy {state['policy_name']}, this scheduler has {policy}; build "
            "it with the policy that the run had"
        )
