"""What a sample is: one entry along dimension ``sample_dim`` of the first tensor a model is called with.

Rows of losses or outputs are folded to samples: of R = k N rows row r belongs to sample r // k, as
``flatten(0, 1)`` and ``view(-1, V)`` leave them (to r mod N where the samples lie along dimension 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from alpha_optim.observe.hooks import map_tensors, tensors_in


class CannotCutError(Exception):
    """The inputs of a model cannot be cut to some of their samples; the text says why."""


def samples_of(args: Any, kwargs: Mapping[str, Any], sample_dim: int) -> int | None:
    """Number of samples N a model is called with; None if no tensor tells.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        sample_dim: Dimension along which samples lie.
    """
    first = args[0] if args else None
    if type(first) is Tensor and first.layout == torch.strided and not first.is_nested and first.dim() > sample_dim:
        return first.shape[sample_dim]
    return _samples_in([*args, *kwargs.values()], sample_dim, nested=True)


def _samples_in(value: Any, dim: int, nested: bool = False) -> int | None:
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, Tensor):
        if value.is_nested:
            return int(value.size(0)) if dim == 0 else None
        return value.shape[dim] if value.dim() > dim else None
    if isinstance(value, Mapping):
        value = list(value.values())
    elif isinstance(value, list) and not nested and value and all(isinstance(entry, Tensor) for entry in value):
        return len(value)
    if isinstance(value, (tuple, list)):
        for entry in value:
            found = _samples_in(entry, dim)
            if found is not None:
                return found
    return None


def folded(rows: Tensor, samples: int, sample_dim: int) -> Tensor | None:
    """Sum what belongs to each sample.

    Args:
        rows: Numbers ``[R, ...]``.
        samples: Number of samples N.
        sample_dim: Dimension along which samples lie in what the model is called with.

    Returns:
        Sums ``[N]``; None if rows and samples do not fit.
    """
    if rows.dim() == 0 or samples == 0:
        return None
    count = rows.shape[0]
    if sample_dim == 1 and rows.dim() > 1 and rows.shape[1] == samples:
        return rows.transpose(0, 1).flatten(1).sum(1) if _first_is_time(rows.shape, samples) else None
    if count == samples:
        return rows.flatten(1).sum(1) if rows.dim() > 1 else rows
    if count % samples:
        return None
    if sample_dim == 0:
        return rows.reshape(samples, -1).sum(1)
    return rows.reshape(count // samples, samples, -1).sum((0, 2))


def fits(shape: torch.Size, samples: int, sample_dim: int) -> bool:
    """Whether rows of a shape can be folded to samples, see `folded`."""
    if not shape or samples == 0:
        return False
    if sample_dim == 1 and len(shape) > 1 and shape[1] == samples:
        return _first_is_time(shape, samples)
    return shape[0] % samples == 0


def _first_is_time(shape: torch.Size, samples: int) -> bool:
    """Whether ``[T, N, ...]`` has steps in time first; not known of ``[N, N]``, which may be N numbers a sample."""
    return shape[0] != samples or len(shape) > 2


def cut(value: Any, samples: int, chosen: Tensor, sample_dim: int) -> Any:
    """Cut the inputs of a model to some samples.

    Args:
        value: Arguments of the call.
        samples: Number of samples N in them.
        chosen: Indices of those wanted ``[n]``.
        sample_dim: Dimension along which samples lie.

    Returns:
        The same with tensors that have the samples along ``sample_dim``, or else along exactly one
        dimension, cut; other tensors as they are.

    Raises:
        CannotCutError: If there are tensors without plain rows, or objects that may hold tensors.
    """

    def of_tensor(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or tensor.is_nested:
            raise CannotCutError("its inputs are sparse or nested")
        fitting = [dim for dim, size in enumerate(tensor.shape) if size == samples]
        if sample_dim not in fitting and len(fitting) != 1:
            return tensor
        dim = sample_dim if sample_dim in fitting else fitting[0]
        return tensor.index_select(dim, chosen.to(tensor.device))

    def walk(entry: Any) -> Any:
        if isinstance(entry, PackedSequence):
            raise CannotCutError("its inputs are packed sequences")
        if type(entry) is list and len(entry) == samples and all(isinstance(one, Tensor) for one in entry):
            return [entry[index] for index in chosen.tolist()]
        if type(entry) in (tuple, list):
            return type(entry)(walk(one) for one in entry)
        if type(entry) is dict:
            return {name: walk(one) for name, one in entry.items()}
        if isinstance(entry, Tensor):
            return of_tensor(entry)
        if any(True for _ in tensors_in(entry)):
            raise CannotCutError(f"its inputs are of type {type(entry).__name__}")
        return entry

    return walk(value)


def detached(value: Any) -> Any:
    """The same inputs without graph."""
    return map_tensors(Tensor.detach, value)


def cut_rows(rows: Tensor, samples: int, chosen: Tensor, sample_dim: int) -> Tensor | None:
    """Take the rows of some samples out of those of all; the counterpart of `folded`.

    Args:
        rows: Numbers ``[R, ...]``.
        samples: Number of samples N.
        chosen: Indices of those wanted ``[n]``.
        sample_dim: Dimension along which samples lie in what the model is called with.

    Returns:
        Their rows, in the layout that a batch of n samples has; None if rows and samples do not fit.
    """
    chosen = chosen.to(rows.device)
    if rows.dim() == 0 or samples == 0:
        return None
    count = rows.shape[0]
    if sample_dim == 1 and rows.dim() > 1 and rows.shape[1] == samples:
        return rows.index_select(1, chosen) if _first_is_time(rows.shape, samples) else None
    if count == samples:
        return rows.index_select(0, chosen)
    if count % samples:
        return None
    if sample_dim == 0:
        parts = rows.reshape(samples, count // samples, *rows.shape[1:]).index_select(0, chosen)
    else:
        parts = rows.reshape(count // samples, samples, *rows.shape[1:]).index_select(1, chosen)
    return parts.flatten(0, 1)
