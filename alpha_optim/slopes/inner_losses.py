"""What is seen, and done otherwise, while a model runs once more along a step.

Losses of single rows come from the calls of torch's loss functions inside a model that returns its loss; how much each
of several counts, and each of losses that were not reduced, from the derivative of that loss. In blocks of
`torch.no_grad` forward mode stops, and some calls have stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812 - the field writes it so
from torch.overrides import TorchFunctionMode

from alpha_optim.observe.inner_products import at_least_float32
from alpha_optim.observe.losses import Rows, total_weight
from alpha_optim.observe.numbers import Truth, read
from alpha_optim.slopes.stand_ins import STAND_INS, without_dropout

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


@dataclass(frozen=True)
class InnerLoss:
    """One call of a loss function inside the model.

    Attributes:
        output: What it returned: a mean or a sum ``[]``, or losses that were not reduced ``[R, ...]``.
        divided: What a sum has to be divided by to be a mean; None: by the number of samples.
        rows: The losses of its rows.
    """

    output: Tensor
    divided: Tensor | float | None
    rows: Rows

    @property
    def even(self) -> Truth:
        """Whether every row counts."""
        total = self.rows.total
        return total == self.rows.values.numel() if isinstance(total, Tensor) else True

    def weighted(self, weight: Tensor) -> InnerLoss:
        """The mean of losses that were not reduced and count for ``weight`` ``[R, ...]``."""
        values, total = self.rows.values * weight, weight.sum()
        return InnerLoss(values.sum() / total, 1.0, Rows(values, total))


class SeesLosses(TorchFunctionMode):
    """Notes the losses of the rows at every call of a loss function; may switch dropout off.

    Forward mode alone knows nothing of `torch.no_grad`, and would differentiate what no backward pass does.

    Attributes:
        calls: The calls through which a derivative goes; of metrics none does.
        half: Whether anything ran in 16 bits.
        uneven: Whether the loss has several terms, and rows of one count for more than others: then it is another
            mixture of them for some of the samples by themselves.
    """

    def __init__(self, without_dropout: bool) -> None:
        """Start with no call.

        Args:
            without_dropout: Whether dropout keeps everything.
        """
        super().__init__()
        self._without_dropout = without_dropout
        self.calls: list[InnerLoss] = []
        self.half = self.uneven = False
        self._differentiates = torch._C._is_fwd_grad_enabled()

    def __exit__(self, *error: Any) -> None:
        """Leave forward mode as it was found."""
        super().__exit__(*error)  # type: ignore[no-untyped-call] # - torch gives it no types
        torch._C._set_fwd_grad_enabled(self._differentiates)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Look at one call of torch."""
        kwargs = kwargs or {}
        if self._without_dropout:
            args, kwargs = without_dropout(func, args, kwargs)
        output = STAND_INS.get(func, func)(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(self._differentiates and torch.is_grad_enabled())
        if isinstance(output, Tensor) and output.dtype in (torch.float16, torch.bfloat16):
            self.half = True
        if func in _LOSSES and isinstance(output, Tensor) and _differentiable(output):
            seen = _seen(func, args, kwargs, output)
            if seen is not None:
                self.calls.append(seen)
                output.requires_grad_()
                return output.clone()  # which the model may change in place
        return output

    def terms(self, loss: Tensor, samples: int, sample_dim: int) -> tuple[Tensor, Tensor] | None:
        """The loss as far as it was seen, up to a factor: its mean ``[]`` and the losses of samples ``[N]``.

        Args:
            loss: The loss that the model returned.
            samples: Samples that it was called with.
            sample_dim: Dimension along which they lie.

        Returns:
            None if rows are neither samples nor a multiple of them, or if nothing that counts was seen.
        """
        calls, weights = self.calls, [1.0] * len(self.calls)
        if len(calls) > 1 or any(call.output.dim() > 0 for call in calls):
            calls, weights = self._that_count(loss, samples)
        mean = together = None
        for call, weight in zip(calls, weights, strict=True):
            single = call.rows.of_samples(samples, sample_dim)
            if single is None:
                return None
            own = single.mean() if call.divided is None else call.output / call.divided
            mean = own * weight if mean is None else mean + own * weight
            together = single * weight if together is None else together + single * weight
        return None if mean is None or together is None else (mean, together)

    def _that_count(self, loss: Tensor, samples: int) -> tuple[list[InnerLoss], list[float]]:
        """The calls of which the loss is made, as means, and what each counts for in units of the first."""
        outputs = [call.output for call in self.calls]
        given: tuple[Tensor | None, ...] = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
        calls: list[InnerLoss] = []
        shares: list[float] = []
        uneven = False
        for call, gradient in zip(self.calls, given, strict=True):
            if gradient is None:
                continue
            weight = at_least_float32(forward_ad.unpack_dual(gradient).primal.detach())
            even: Truth
            if weight.dim() > 0:
                term, share, even = call.weighted(weight), weight.sum(), (weight == weight.flatten()[0]).all()
            else:
                term, share, even = call, weight * (samples if call.divided is None else call.divided), call.even
            counts, even = read([share, even])
            if counts == 0.0:
                continue
            calls.append(term)
            shares.append(counts)
            uneven = uneven or not even
        self.uneven = uneven and len(calls) > 1
        return calls, [share / shares[0] for share in shares]


def _seen(func: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> InnerLoss | None:
    """What a call of a loss function gave; None if its rows cannot be told."""
    known = _NAMES.get(func, args[:2])
    named = dict(zip(_NAMES.get(func, ()), args, strict=False)) | kwargs
    reduction = named.get("reduction", "mean")
    if reduction not in ("mean", "sum", "batchmean", "none") or len(args) > len(known):
        return None
    if reduction == "none":
        return InnerLoss(output, 1.0, Rows(at_least_float32(output), None)) if output.dim() > 0 else None
    args, kwargs = (
        args[:2],
        {k: v for k, v in named.items() if k not in _NAMES.get(func, ())[: len(args[:2])]},
    )
    values = func(*args, **{**kwargs, "reduction": "none"})
    if values.dim() == 0 or output.dim() > 0:
        return None
    values = at_least_float32(values)
    total: Tensor | float | None = float(values.numel())
    if func in _CLASSES:
        # Transformers sums and divides by the number of targets itself: the mean over targets is the loss.
        ignored = kwargs.get("ignore_index", -100)
        total = total_weight(args, kwargs, ignored, kwargs.get("weight"), values.numel())
    elif reduction == "sum":
        total = None  # of elements, where the total is not known: then samples are what they are
    elif reduction == "batchmean":
        total = float(values.shape[0])
    return InnerLoss(output, total if reduction == "sum" else 1.0, Rows(values, total))


def _differentiable(output: Tensor) -> bool:
    """Whether a derivative goes through it, forward or backward."""
    return torch.is_grad_enabled() and (output.requires_grad or forward_ad.unpack_dual(output).tangent is not None)
