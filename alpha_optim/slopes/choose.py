"""Backends by name, and the choice that ``"auto"`` makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from alpha_optim.distributed import is_sharded, several
from alpha_optim.observe.model_calls import innermost
from alpha_optim.observe.step_direction import is_plain_sgd, parameters_of
from alpha_optim.slopes.backpack import BackpackBackend
from alpha_optim.slopes.base import Backend, Names
from alpha_optim.slopes.cached import CachedBackend
from alpha_optim.slopes.contractions import has_rule
from alpha_optim.slopes.gradients import GradientsBackend
from alpha_optim.slopes.individual import backpack_covers
from alpha_optim.slopes.layers import layers_of
from alpha_optim.slopes.layerwise import LayerwiseBackend

BACKENDS: dict[str, Callable[[nn.Module, Names, int, bool], Backend]] = {
    "backpack": BackpackBackend,
    "layerwise": LayerwiseBackend,
    "cached": CachedBackend,
    "gradients": lambda model, names, sample_dim, sampled: GradientsBackend(),
}
"""From a backend's name to what builds it from model, names of parameters by id, ``sample_dim`` and whether variances
are sampled. One of your own is a further entry."""


class Choice(NamedTuple):
    """A backend's name, and why it was taken."""

    name: str
    reason: str


def choose_backend(wanted: str, optimizer: Optimizer, model: nn.Module | None, sample_dim: int) -> Choice:
    """Check a backend against optimizer and model, or choose the cheapest that delivers all.

    Args:
        wanted: A name of `BACKENDS` or ``"auto"``.
        optimizer: The wrapped optimizer.
        model: The model, if it was given.
        sample_dim: Dimension along which samples lie in its inputs.

    Returns:
        Name and reason.

    Raises:
        ValueError: If the name is unknown or the backend impossible here; the message names those
            that work.
    """
    obstacles = {name: obstacle(name, optimizer, model, sample_dim) for name in BACKENDS}
    working = [name for name, problem in obstacles.items() if problem is None]
    if wanted == "auto":
        return _automatic(obstacles)
    if wanted in BACKENDS:
        problem = obstacles[wanted]
        if problem is not None:
            raise ValueError(
                f"backend={wanted!r} is impossible here: {problem}. "
                f"These work: {', '.join(map(repr, working))}, or 'auto'."
            )
        return Choice(wanted, "asked for")
    known = ", ".join(map(repr, [*BACKENDS, "auto"]))
    raise ValueError(
        f"unknown backend {wanted!r}. Known backends: {known}; these work here: {', '.join(map(repr, working))}."
    )


def obstacle(name: str, optimizer: Optimizer, model: nn.Module | None, sample_dim: int) -> str | None:
    """Say what stands against a backend here, or None."""
    if name == "gradients":
        return None
    if any(map(is_sharded, parameters_of(optimizer))):
        return "parameters are spread over processes (DTensor), and slopes of single samples need all of them"
    if model is None:
        return "it needs the model: AlphaGuided(optimizer, model, loss_fn)"
    if several() and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return "SyncBatchNorm talks to other processes in its forward pass, which a repetition must not"
    if isinstance(model, torch.jit.ScriptModule):
        return "a scripted model takes no hooks"
    if name not in ("backpack", "cached"):  # those two look into layers
        return None
    if model._compiled_call_impl is not None or hasattr(model, "_orig_mod"):
        return "a compiled model makes no calls of layers"
    if sample_dim != 0:
        return "its rules of layers want samples along dimension 0"
    if name == "cached":
        return None
    if not is_plain_sgd(optimizer):
        return "it needs plain torch.optim.SGD (no momentum, dampening, nesterov or weight decay)"
    uncovered = uncovered_layers(optimizer, model)
    if uncovered:
        return f"BackPACK does not cover these layers: {summarised(uncovered)}"
    return None


def summarised(names: Sequence[str], most: int = 3) -> str:
    """A list of names for a message: the first few, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def uncovered_layers(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Names and types of layers with parameters of the optimizer that BackPACK does not cover."""
    names = {id(module): name for name, module in model.named_modules()}
    wanted = {id(param) for param in parameters_of(optimizer)}
    return [
        f"{names[id(layer.module)] or 'the model itself'} ({type(layer.module).__name__})"
        for layer in layers_of(innermost(model), wanted)
        if not (backpack_covers(layer.module) and has_rule(layer.module))
    ]


def _automatic(obstacles: dict[str, str | None]) -> Choice:
    if obstacles["layerwise"] is not None:
        return Choice("gradients", obstacles["layerwise"])
    if obstacles["backpack"] is None:
        return Choice("backpack", "plain SGD, and BackPACK covers the model")
    return Choice("layerwise", f"any optimizer and model; not backpack: {obstacles['backpack']}")
