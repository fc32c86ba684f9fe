"""Losses of single rows from the calls of torch's loss functions inside a model that returns its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812 - the field writes it so
from torch.overrides import TorchFunctionMode

from alpha_optim.observe.inner_products import at_least_float32
from alpha_optim.observe.losses import Rows, total_weight

_CLASSES = (F.cross_entropy, F.nll_loss)
_NAMES: dict[Any, tuple[str, ...]] = {
    F.cross_entropy: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    F.nll_loss: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
}
_LOSSES: dict[Callable[..., Any], None] = dict.fromkeys(
    (
        *_CLASSES,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.kl_div,
        F.gaussian_nll_loss,
        F.poisson_nll_loss,
        F.multi_margin_loss,
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.soft_margin_loss,
        F.hinge_embedding_loss,
    )
)
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


class SeesLosses(TorchFunctionMode):
    """Notes the losses of the rows at every call of a loss function; may switch dropout off.

    Attributes:
        calls: For every call its mean, None if it is that of the samples' losses, and the losses of its rows.
        half: Whether anything ran in 16 bits.
    """

    def __init__(self, without_dropout: bool) -> None:
        """Start with no call.

        Args:
            without_dropout: Whether dropout keeps everything.
        """
        super().__init__()
        self._without_dropout = without_dropout
        self.calls: list[tuple[Tensor | None, Rows]] = []
        self.half = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Look at one call of torch."""
        kwargs = kwargs or {}
        if self._without_dropout:
            args, kwargs = _without_dropout(func, args, kwargs)
        output = func(*args, **kwargs)
        if func is F.embedding:
            output = _with_padding_at_rest(output, *args, **kwargs)
        if isinstance(output, Tensor) and output.dtype in (torch.float16, torch.bfloat16):
            self.half = True
        if func in _LOSSES and isinstance(output, Tensor) and output.dim() == 0:
            self._note(func, args, kwargs, output)
        return output

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        named = dict(zip(_NAMES.get(func, ()), args, strict=False)) | kwargs
        reduction = named.get("reduction", "mean")
        if reduction not in ("mean", "sum", "batchmean") or len(args) > len(_NAMES.get(func, args[:2])):
            return
        args, kwargs = (
            args[:2],
            {k: v for k, v in named.items() if k not in _NAMES.get(func, ())[: len(args[:2])]},
        )
        values = func(*args, **{**kwargs, "reduction": "none"})
        if values.dim() == 0:
            return
        values = at_least_float32(values)
        total: Tensor | float | None = float(values.numel())
        if func in _CLASSES:
            # Transformers sums and divides by the number of targets itself: the mean over targets is the loss.
            ignored = kwargs.get("ignore_index", -100)
            total = total_weight(args, kwargs, ignored, kwargs.get("weight"), values.numel())
        elif reduction == "sum":
            total = None
        elif reduction == "batchmean":
            total = float(values.shape[0])
        mean: Tensor | None = output
        if reduction == "sum":  # of elements, where the total is not known: then samples are what they are
            mean = None if total is None else output / total
        self.calls.append((mean, Rows(values, total)))


def _with_padding_at_rest(
    output: Tensor, tokens: Tensor, weight: Tensor, padding_idx: int | None = None, *_args: Any, **_kwargs: Any
) -> Tensor:
    """An embedding whose row of padding gets no gradient, whatever moves it."""
    if padding_idx is None:
        return output
    at_rest = forward_ad.unpack_dual(weight).primal.detach()
    row = padding_idx % len(at_rest)
    return torch.where(torch.eq(tokens, row).unsqueeze(-1), at_rest[row], output)


def _without_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
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
