"""What is called instead of functions of torch while a model runs once more along a step.

Dropout may be switched off; rows of padding rest, whatever moves them; bags of embeddings are sums of their rows, since
they have neither a forward derivative nor a second backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812 - the field writes it so

_RANDOM_DROPOUT = {
    F.dropout: "training",
    F.dropout1d: "training",
    F.dropout2d: "training",
    F.dropout3d: "training",
    F.alpha_dropout: "training",
    F.feature_alpha_dropout: "training",
    torch.dropout: "train",
    torch.feature_dropout: "train",
    torch.alpha_dropout: "train",
    torch.feature_alpha_dropout: "train",
}


def without_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments with which a call of torch drops nothing."""
    if func is F.scaled_dot_product_attention:
        if len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        elif "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
    elif func in _RANDOM_DROPOUT:
        name = _RANDOM_DROPOUT[func]
        if len(args) > 2:
            args = (*args[:2], False, *args[3:])
        else:
            kwargs = {**kwargs, name: False}
    return args, kwargs


def _embedding(tokens: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """An embedding whose row of padding gets no gradient."""
    output = F.embedding(tokens, weight, padding_idx, *args, **kwargs)
    if padding_idx is None:
        return output
    at_rest = forward_ad.unpack_dual(weight).primal.detach()
    row = padding_idx % len(at_rest)
    return torch.where(torch.eq(tokens, row).unsqueeze(-1), at_rest[row], output)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums or means of rows; others as they are."""
    if mode not in ("sum", "mean") or max_norm is not None or scale_grad_by_freq:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    if offsets is None:
        bags = len(input)
        bag = torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    else:
        bags = len(offsets) - include_last_offset
        places = torch.arange(input.numel(), device=input.device)
        bag = torch.bucketize(places, offsets[:bags].to(places.dtype), right=True) - 1
    tokens = input.reshape(-1)
    counts = torch.ones_like(tokens) if padding_idx is None else (tokens != padding_idx % len(weight)).to(tokens.dtype)
    rows = F.embedding(tokens, weight) * counts.unsqueeze(1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    sums = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return sums
    return sums / torch.zeros_like(bag[:1]).expand(bags).index_add(0, bag, counts.to(bag.dtype)).clamp_min(1).unsqueeze(
        1
    )


STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {F.embedding: _embedding, F.embedding_bag: _embedding_bag}
"""By the function of torch."""
