"""Bad input, refused with what was wrong, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.observe.step_direction import parameters_of

FEW = 3
"""So many parameters that do not belong there are listed."""


def check_arguments(optimizer: Any, model: Any, loss_fn: Any, every: Any, variance: Any, sample_dim: Any) -> None:
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
    if not (every is None or callable(every)) and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"every must be a whole number of at least 1, a function n -> bool, or None; got {every!r}")
    if variance not in ("exact", "sampled"):
        raise ValueError(f"variance must be 'exact' or 'sampled', got {variance!r}")
    if sample_dim not in (0, 1) or isinstance(sample_dim, bool):
        raise ValueError(f"sample_dim must be 0, or 1 for models that are fed time first; got {sample_dim!r}")
    check_membership(parameters_of(optimizer), model, loss_fn, "the optimizer", names_told(optimizer))


def check_membership(
    params: list[Tensor],
    model: nn.Module | None,
    loss_fn: nn.Module | None,
    holder: str,
    told: Mapping[int, str] | None = None,
) -> None:
    """Refuse parameters that are not the model's.

    Args:
        params: The parameters.
        model: The model; None refuses nothing.
        loss_fn: The loss function, whose parameters may be among them.
        holder: Whose parameters they are.
        told: Names that the optimizer was told, by ``id``.

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
        f"{(told or {}).get(id(param), f'parameter {index}')} of shape {list(param.shape)}"
        for index, param in enumerate(params)
        if id(param) not in names
    ]
    if foreign:
        more = f" and {len(foreign) - FEW} more" if len(foreign) > FEW else ""
        raise ValueError(
            f"{holder} has parameters that belong neither to model ({type(model).__name__}) nor to loss_fn: "
            f"{', '.join(foreign[:FEW])}{more}. Pass the model whose parameters the optimizer trains."
        )


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def names_told(optimizer: Optimizer) -> dict[int, str]:
    """Names of the parameters by ``id``, where the optimizer was built from named ones."""
    groups = [(group["params"], group.get("param_names", ())) for group in optimizer.param_groups]
    return {id(param): name for params, names in groups for param, name in zip(params, names, strict=False)}


def named_parameters(*modules: nn.Module | None) -> dict[int, str]:
    """Names of all parameters of some modules by ``id``."""
    return {id(param): name for module in modules if module is not None for name, param in module.named_parameters()}


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
    if losses.numel() == 0 and (not forwards or forwards[-1] != 0):  # a rank may have run out of data
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
            f"samples; expected shape [{expected}] or [{expected}, ...]. Where a loss belongs to several of them "
            "(pairs, triplets) run its mean backward yourself, after optimizer.record_losses(mean)"
        )
