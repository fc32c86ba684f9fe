"""Runs a model once more along a step, and tells its samples apart in what comes out.

Contracts the gradients that reached its outputs with the derivatives of the outputs; of a model that returns its loss
it differentiates the losses of the samples inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alpha_optim.alpha.states import Remembers
from alpha_optim.observe.backward_passes import BackwardPass
from alpha_optim.observe.hooks import map_tensors, tensors_in
from alpha_optim.observe.inner_products import TOGETHER, as_real, at_least_float32
from alpha_optim.observe.model_calls import ModelCall, innermost
from alpha_optim.observe.model_inputs import CannotCutError, cut, cut_rows, folded
from alpha_optim.observe.numbers import read
from alpha_optim.observe.random_state import RandomState, untouched
from alpha_optim.slopes.base import AGAIN, INTERACT, OTHER_TERMS, SUBSET
from alpha_optim.slopes.derivative import Line, Values, forward, twice_backward
from alpha_optim.slopes.inner_losses import SeesLosses
from alpha_optim.slopes.isolation import as_in_its_call

TOLERANCE, TOLERANCE_TF32, TOLERANCE_HALF = 1e-4, 3e-3, 3e-2
"""Deviation of a mean over samples from what is known, relative to it or to its standard error; in TF32; in 16 bits."""
_FAILURES = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AssertionError)


class CannotDifferentiateError(Exception):
    """Slopes of single samples cannot be had; the text says why, ``passing`` whether only this time."""

    def __init__(self, reason: str, passing: bool = False) -> None:
        """Take the reason."""
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True)
class Part:
    """What one call of the model gave.

    Attributes:
        along: What its samples contribute to <d, gradient of what was sent backward> ``[n]``.
        losses: Their losses ``[n]`` if the model returns its loss, normalised so that their mean is that loss.
        ratio: That loss as a multiple of the mean over the samples that were run ``[]``.
    """

    along: Tensor
    losses: Tensor | None = None
    ratio: Tensor | None = None


@dataclass(frozen=True)
class Calls:
    """The calls of the model in one pass, each with the gradients that reached its outputs, by place."""

    items: list[tuple[ModelCall, dict[int, Tensor]]]

    def of_different_samples(self, samples: int | None) -> bool:
        """Whether the calls have samples of their own, which belong to one loss of ``samples``."""
        counts = [call.samples or 0 for call, _ in self.items]
        return len(counts) > 1 and sum(counts) == samples

    def without_autocast(self) -> Calls:
        """The same calls as if there had been no autocast."""
        off = [
            (replace(call, autocast=replace(call.autocast, enabled=False)), gradients) for call, gradients in self.items
        ]
        return Calls(off)

    @property
    def half(self) -> bool:
        """Whether any of it ran in 16 bits."""
        return any(
            call.autocast.enabled or any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients.values())
            for call, gradients in self.items
        )


def calls_of(entry: BackwardPass) -> Calls:
    """Group the gradients that reached outputs by call.

    Raises:
        CannotDifferentiateError: If samples cannot be told apart in this pass.
    """
    found: dict[int, tuple[ModelCall, dict[int, Tensor]]] = {}
    for call, place, gradient in entry.outputs:
        _, gradients = found.setdefault(id(call), (call, {}))
        gradients[place] = gradients[place] + gradient if place in gradients else gradient
    if entry.mixed:
        raise CannotDifferentiateError("several losses with different numbers of samples in one backward pass")
    if entry.again:
        raise CannotDifferentiateError(AGAIN)
    if any(call.subset for call in entry.calls):
        raise CannotDifferentiateError(SUBSET)
    if not found:
        raise CannotDifferentiateError("no gradient came through a tensor that the model returned", passing=True)
    items = list(found.values())
    for call, _ in items:
        if call.samples is None and entry.samples is None:
            raise CannotDifferentiateError("the number of samples is not known")
    calls = Calls(items)
    if len({call.samples for call, _ in items}) > 1 and not calls.of_different_samples(entry.samples):
        raise CannotDifferentiateError("several calls of the model with different numbers of samples")
    return calls


class Repetition(Remembers):
    """Runs the calls of one model again, and remembers what it has found out about it."""

    sums: bool = False  # whether a loss that the model returns is a sum, of which some samples have a share
    half: bool  # whether the model computes in 16 bits, as far as was seen
    _way: int  # which of `_WAYS` works
    _seed: int

    def __init__(self, model: nn.Module, sample_dim: int) -> None:
        """Prepare.

        Args:
            model: The model that the loop calls.
            sample_dim: Dimension along which samples lie in its inputs.
        """
        self.model, self.sample_dim = model, sample_dim
        self.half, self._way, self._seed = False, 0, 0
        self.ran_in_half = False  # whether it did so in the last `all_and_some`
        self._drew = False  # whether its last call drew random numbers

    @property
    def with_plain_kernels(self) -> bool:
        """Whether fused kernels have to be replaced by plain ones, which use random numbers in another order."""
        _, plain_kernels, _ = _WAYS[self._way]
        return plain_kernels

    def part(
        self,
        entry: BackwardPass,
        calls: Calls,
        line: Line,
        chosen: Tensor | None,
        replay: bool,
        without_dropout: bool = False,
    ) -> Part:
        """Differentiate the calls of the model in one pass, and add them up.

        Raises:
            CannotDifferentiateError: If that cannot be done.
        """
        apart = calls.of_different_samples(entry.samples)
        if apart and chosen is not None:
            raise CannotDifferentiateError("several calls of the model with samples of their own")
        parts = [
            self._of_call(entry, call, gradients, line, chosen, replay, without_dropout)
            for call, gradients in calls.items
        ]
        put = torch.cat if apart else _added
        losses = [part.losses for part in parts if part.losses is not None]
        known = put(losses) if len(losses) == len(parts) else None
        return Part(put([part.along for part in parts]), known, parts[0].ratio)

    def all_and_some(self, entry: BackwardPass, calls: Calls, line: Line, chosen: Tensor) -> tuple[Part, Part]:
        """All samples, and some by themselves; without autocast if the model runs so: rounding hides what interacts.

        Raises:
            CannotCutError: If some cannot be run by themselves.
            CannotDifferentiateError: If all cannot be run.
        """
        if calls.half:
            way = self._way
            try:
                return self._without_dropout(entry, calls.without_autocast(), line, chosen)
            except Exception:  # no memory for it, code of the model that asks for a type: as the loop runs it, then
                self._way = way
        return self._without_dropout(entry, calls, line, chosen)

    def _without_dropout(self, entry: BackwardPass, calls: Calls, line: Line, chosen: Tensor) -> tuple[Part, Part]:
        self.ran_in_half = False
        every = self.part(entry, calls, line, None, replay=False, without_dropout=True)
        try:
            some = self.part(entry, calls, line, chosen, replay=False, without_dropout=True)
        except CannotDifferentiateError as error:
            if str(error) == INTERACT:
                raise
            raise CannotCutError(str(error)) from None  # cut wrongly, it seems
        if self._drew:  # other random numbers than those of dropout: some samples by themselves get others
            raise CannotCutError("it draws random numbers")
        return every, some

    def _of_call(
        self,
        entry: BackwardPass,
        call: ModelCall,
        gradients: dict[int, Tensor],
        line: Line,
        chosen: Tensor | None,
        replay: bool,
        without_dropout: bool,
    ) -> Part:
        if not call.unaltered():
            raise CannotDifferentiateError(
                "the input of the model is written to between its call and the step", passing=True
            )
        if call.writes:
            raise CannotDifferentiateError("the model writes to its parameters in its forward pass")
        whole = call.samples or entry.samples or 0
        samples = whole if chosen is None else len(chosen)
        args, kwargs = call.args, call.kwargs
        if chosen is not None:
            args = cut(args, whole, chosen, self.sample_dim)
            kwargs = {name: cut(value, whole, chosen, self.sample_dim) for name, value in kwargs.items()}
        # The gradient of a loss that the model returns passes through its other outputs, too.
        inner = call.loss_place is not None and call.loss_place in gradients
        places = [] if inner else sorted(gradients)

        def run(values: Values, wide: bool) -> list[Tensor]:
            with _random_numbers(call, replay, seed):
                before = RandomState.now(call.random.own)
                outputs = self._outputs(call, args, kwargs, values, places, inner, samples, without_dropout, wide)
                self._drew = before.has_moved()
            return outputs

        self._seed += 1
        seed = None if without_dropout else self._seed
        values, tangents = self._derivative(run, line, call)
        if inner:
            return self._of_inner_losses(values, tangents, gradients, call, samples, whole)
        return self._of_outputs(entry, call, gradients, tangents, places, whole, chosen)

    def _of_outputs(
        self,
        entry: BackwardPass,
        call: ModelCall,
        gradients: dict[int, Tensor],
        tangents: list[Tensor],
        places: list[int],
        whole: int,
        chosen: Tensor | None,
    ) -> Part:
        """Contract the gradients that reached the outputs with the derivatives of the outputs.

        Raises:
            CannotDifferentiateError: If samples cannot be told apart in an output.
        """
        samples = whole if chosen is None else len(chosen)
        if chosen is None and entry.samples is not None and entry.samples < whole:
            samples = entry.samples  # rows pooled inside the model
        total: Tensor | None = None
        for place, tangent in zip(places, tangents, strict=True):
            gradient: Tensor | None = gradients[place]
            if chosen is not None:
                assert gradient is not None
                gradient = cut_rows(gradient, whole, chosen, self.sample_dim)
            if gradient is None or gradient.shape != tangent.shape:
                raise CannotDifferentiateError(
                    INTERACT if chosen is not None else "the model gives another output when it is called again"
                )
            rows = _contracted(gradient, tangent, samples, self.sample_dim)
            if rows is None:
                raise CannotDifferentiateError(
                    f"an output of shape {list(call.shapes[place])} that the loss depends on has no rows of samples"
                )
            total = rows if total is None else total + rows
        assert total is not None
        return Part(total)

    def _of_inner_losses(
        self,
        values: list[Tensor],
        tangents: list[Tensor],
        gradients: dict[int, Tensor],
        call: ModelCall,
        samples: int,
        whole: int,
    ) -> Part:
        """Losses of samples inside the model: values and derivatives of the returned loss, of means, of samples.

        Raises:
            CannotDifferentiateError: If the loss functions seen inside are not all of the loss.
        """
        (loss, mean, single), (loss_along, mean_along, single_along) = values, tangents
        ratio = loss.double() / mean.double()
        apart = (loss_along.double() - ratio * mean_along.double()).abs()
        scatter = single_along.double().std() / max(1, samples) ** 0.5 if samples > 1 else loss_along.abs()
        limit = 10 * TOLERANCE * torch.maximum(loss_along.double().abs(), (ratio * scatter).abs())
        if loss.dtype in (torch.float16, torch.bfloat16) or self.half:
            limit = limit * (TOLERANCE_HALF / TOLERANCE)
        if true(apart > limit):
            raise CannotDifferentiateError(OTHER_TERMS)
        assert call.loss_place is not None
        gamma = gradients[call.loss_place].double()
        factor = ratio * (whole / samples) if self.sums else ratio
        factor = torch.where((single != 0).any(), factor, 0.0)  # no target counts, and 0 was divided by 0
        return Part(single_along.double() * factor * gamma / whole, single.double() * factor, ratio)

    def _outputs(
        self,
        call: ModelCall,
        args: Any,
        kwargs: Any,
        values: Values,
        places: list[int],
        inner: bool,
        samples: int,
        without_dropout: bool,
        wide: bool,
    ) -> list[Tensor]:
        """Call the model once more: the outputs wanted, or its loss, the mean and the losses of samples inside.

        Raises:
            CannotCutError: If some of the samples by themselves have another loss.
            CannotDifferentiateError: If there are none.
        """
        model = innermost(self.model)
        held = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        params = dict(model.named_parameters())
        if wide and any(param.dtype != at_least_float32(param).dtype for param in params.values()):
            # Parameters of 16 bits: a step along which they move is lost in their rounding.
            held = {**{name: param.detach() for name, param in params.items()}, **held}
            held = {name: at_least_float32(value) for name, value in held.items()}
            args, kwargs = map_tensors(at_least_float32, args), map_tensors(at_least_float32, kwargs)
        else:
            values = {name: value.to(params[name].dtype) for name, value in values.items()}
            # Not the parameters themselves, to which something else could be assigned.
            held = {**{name: param.detach() for name, param in params.items()}, **held}
        with SeesLosses(without_dropout) as seen:
            output: Any = torch.func.functional_call(model, {**held, **values}, args, kwargs)
        self.half, self.ran_in_half = self.half or seen.half, self.ran_in_half or seen.half
        tensors = list(tensors_in(output))
        if not inner:
            if places and places[-1] >= len(tensors):
                raise CannotDifferentiateError("the model gives another output when it is called again")
            return [tensors[place] for place in places]
        if not seen.calls:
            raise CannotDifferentiateError(
                "the loss that the model returns comes from none of torch's loss functions; hand the losses of the "
                "samples over with optimizer.record_losses(losses)"
            )
        assert call.loss_place is not None
        loss = tensors[call.loss_place]
        terms = seen.terms(loss, samples, self.sample_dim)
        if terms is None:
            raise CannotDifferentiateError("the rows of its loss are neither the samples nor a multiple of them")
        if seen.uneven and samples < (call.samples or 0):
            raise CannotCutError("its loss has several terms, of which some rows count for more than others")
        return [loss, *terms]

    def _derivative(
        self, run: Callable[..., list[Tensor]], line: Line, call: ModelCall
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Values of a function of the parameters and its derivatives along a line, in the first way that works.

        Raises:
            CannotDifferentiateError: If none does.
        """
        failure = ""  # not the error itself: with its frames, this one among them, it would keep every activation
        for number, (wide, plain_kernels, derive) in list(enumerate(_WAYS))[self._way :]:
            try:
                with as_in_its_call(innermost(self.model), call, plain_kernels):
                    result = derive(partial(run, wide=wide), line)
            except _FAILURES as error:  # noqa: PERF203 - a handful of ways
                failure = failure or short(error)
            else:
                self._way = number
                return result
        raise CannotDifferentiateError(f"it cannot be differentiated along a step ({failure})")


def _random_numbers(call: ModelCall, replay: bool, seed: int | None) -> AbstractContextManager[None]:
    """The random numbers of a repetition: none, those of the call, or others that are nobody else's."""
    if not call.drew:  # the generators are those of all threads
        return nullcontext()
    return call.random.replayed() if replay else untouched(call.random.own, seed)


def _contracted(gradient: Tensor, tangent: Tensor, samples: int, sample_dim: int) -> Tensor | None:
    """Inner products of two tensors over what belongs to each sample ``[N]``; None if samples do not fit.

    Products are formed in the precision of the model, and added up in float64.
    """
    gradient, tangent = at_least_float32(as_real(gradient)), at_least_float32(as_real(tangent))
    if sample_dim != 0 or gradient.dim() == 0 or samples == 0 or gradient.shape[0] % samples:
        return folded((gradient * tangent).double(), samples, sample_dim)
    ones, others = gradient.reshape(samples, -1), tangent.reshape(samples, -1)
    if gradient.numel() <= TOGETHER:
        return (ones * others).sum(1, dtype=torch.float64)
    # Logits of a language model: all at once they would take as much memory as some of training's own.
    return torch.stack([(one * other).sum(dtype=torch.float64) for one, other in zip(ones, others, strict=True)])


def _added(values: Sequence[Tensor]) -> Tensor:
    """Sum of vectors of one length."""
    return sum(values[1:], values[0])


def true(value: Tensor) -> bool:
    """Read a truth; waits for the device, and is asked for at checks only."""
    return bool(read([value])[0])


def short(error: BaseException) -> str:
    """First line of an error, cut."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:160]


_WAYS = tuple(
    (wide, plain_kernels, derive)
    for wide in (True, False)
    for plain_kernels, derive in ((False, forward), (True, forward), (True, twice_backward))
)
"""Ways to take a derivative, tried in this order: with parameters of 16 bits widened or not, with the kernels as they
are set or plain ones, in forward mode or by two reverse passes."""
