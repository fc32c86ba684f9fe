"""Slopes of single samples by differentiating the model as a whole along the step.

With output o_i of sample i and the gradient b_i that reached it in the user's own backward pass, sample i's slope is
N <b_i, J_i d> / gamma, J_i d being the derivative of o_i when all parameters move along the step d. A model
that returns its loss has no such outputs; there the losses of the samples inside it are differentiated themselves.
Either way no layer has to be known, and it does not matter how a loss is written.

Derivatives are taken in forward mode (dual numbers); where an operation has no rule for that, by two reverse
passes: the derivative of <J^T u, d> with respect to u. Few samples tell a variance. They are run by themselves where
a sample does not depend on the others, else the whole batch is run, more rarely. Which of the two, and whether
samples can be told apart at all, is found out by two checks:

1. Over all samples, with the random numbers of the user's pass, the mean slope is that of the gradients and the
   mean loss that of the training loop. It is not where a term of the loss comes from elsewhere. Dropout in compiled
   code or in fused attention drops units that no repetition drops: there both are so but for chance, and the slope
   at the end of the step, since the step was made from what was dropped at its start.
2. Some samples by themselves give what they give in the whole batch. They do not where samples interact
   (contrastive losses), or do not lie along ``sample_dim``.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from alpha_optim.observe.backward_passes import BackwardPass, loss_weight, scale_of, total_samples
from alpha_optim.observe.hooks import inside_functorch, map_tensors, tensors_in
from alpha_optim.observe.inner_products import TOGETHER, at_least_float32
from alpha_optim.observe.model_calls import ModelCall, innermost
from alpha_optim.observe.model_inputs import CannotCutError, cut, cut_rows, folded
from alpha_optim.observe.numbers import read
from alpha_optim.observe.random_state import RandomState, untouched
from alpha_optim.slopes.base import SAMPLES, Expected, Names, SampleSlopes, by_chance
from alpha_optim.slopes.inner_losses import SeesLosses
from alpha_optim.slopes.isolation import PROCESS_WIDE, as_in_its_call

TOLERANCE, TOLERANCE_TF32, TOLERANCE_HALF = 1e-4, 3e-3, 3e-2
"""Deviation of a mean over samples from what is known, relative to it or to its standard error; in TF32; in 16 bits."""
APART, APART_TF32, APART_HALF = 1e-3, 1e-2, 5e-2
"""Deviation of a sample by itself from the same sample in its batch, relative to the largest sample."""
CHECK_AGAIN = 16
"""So many refreshes lie between two checks; a check costs about four of them."""
_FAILURES = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AssertionError)

Values = dict[str, Tensor]

OTHER_TERMS = (
    "the loss that was seen is not all of the loss that is sent backward (a penalty, a balance loss, a second loss), "
    "or another run of the model does not repeat it, as where it keeps state"
)
INTERACT = (
    "samples interact (a contrastive loss?) or do not lie along sample_dim; models that are fed time first take "
    "sample_dim=1"
)


class CannotDifferentiateError(Exception):
    """Slopes of single samples cannot be had; the text says why, ``passing`` whether only this time."""

    def __init__(self, reason: str, passing: bool = False) -> None:
        """Take the reason."""
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True)
class _Part:
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
class Line:
    """Where the model is differentiated, and along what.

    Attributes:
        point: Values of the parameters that move, by name.
        tangents: Their changes, divided by ``unit``.
        unit: A power of two.
    """

    point: Values
    tangents: Values
    unit: float = 1.0

    @classmethod
    def along(cls, names: Names, params: Sequence[Tensor], point: Sequence[Tensor], changes: Any) -> Line:
        """Put parameters, values and changes together; parameters that did not move are left out."""
        moving: dict[str, tuple[Tensor, Tensor]] = {}
        for param, value, change in zip(params, point, changes, strict=True):
            name = names.get(id(param))
            if name is not None and change is not None:
                wide = at_least_float32(value.detach())
                moving[name] = (wide, change.detach().to(wide.dtype))
        return cls(
            {name: value for name, (value, _) in moving.items()},
            {name: change.to_dense() if change.is_sparse else change for name, (_, change) in moving.items()},
        )

    def as_long_as_the_point(self) -> Line:
        """The same with a change as long as the parameters: in float16 1e-8 is zero and 1e5 infinite."""
        lengths = read(torch._foreach_norm([*self.tangents.values(), *self.point.values()]))
        change, size = math.hypot(*lengths[: len(self.tangents)]), math.hypot(*lengths[len(self.tangents) :])
        if not (0.0 < change < math.inf and 0.0 < size < math.inf):
            return self
        unit = 2.0 ** round(math.log2(change / size))  # so that nothing is rounded
        return Line(self.point, {name: value / unit for name, value in self.tangents.items()}, unit)


class ForwardMode:
    """Differentiates one model, and remembers what its checks have found."""

    def __init__(self, model: nn.Module, sample_dim: int, exact: bool) -> None:
        """Prepare.

        Args:
            model: The model that the loop calls.
            sample_dim: Dimension along which samples lie in its inputs.
            exact: Whether all samples are wanted every time.
        """
        self.model, self._sample_dim, self._exact = model, sample_dim, exact
        self.reason: str | None = None  # why nothing can be had, as the last check found
        self._whole = exact
        self._sums = False  # whether a loss that the model returns is a sum, of which some samples have a share
        self._way = 0  # which of `_WAYS` works
        self.half = False  # whether the model computes in 16 bits, as far as was seen
        self._drew = False  # whether its last call drew random numbers
        self._ran_in_half = False  # whether it computed in 16 bits
        self._signature: str | None = None
        self._refreshes = 0
        self._draws_others = False  # whether its random numbers are not those of the loop, as the last check found
        self._unproved = False  # whether the slopes of all samples are to be compared at the end of the step
        self._seed = 0

    @property
    def names(self) -> Names:
        """Names of the parameters, which may have been added or replaced since."""
        return {id(param): name for name, param in innermost(self.model).named_parameters()}

    @property
    def takes_whole_batch(self) -> bool:
        """Whether all samples are run, since some by themselves would be others."""
        return self._whole

    def check_due(self) -> bool:
        """Whether the next start of a step is checked, as far as is known before its forward pass."""
        return self._signature is None or self._refreshes % CHECK_AGAIN == 0

    def slopes(
        self, passes: Sequence[BackwardPass], line: Line, expected: Expected | None, anew: bool = False
    ) -> tuple[SampleSlopes | None, str | None]:
        """Slopes of samples along a line; never raises.

        Args:
            passes: Backward passes of the iteration.
            line: Where, and along what.
            expected: What the mean over all samples has to be, to be checked at the start of a step; None at
                the end of one, which takes over what was found.
            anew: Whether to check in any case.

        Returns:
            Slopes or None, and the reason for None (None if it concerns this iteration only).
        """
        try:
            with PROCESS_WIDE:
                return self._slopes(passes, line, expected, anew), None
        except CannotDifferentiateError as error:
            if error.passing:
                return None, None
            self.reason = str(error)
            return None, self.reason
        except Exception as error:  # watching never raises into the user's loop
            self.reason = f"its repetition failed ({type(error).__name__}: {_short(error)})"
            return None, self.reason

    def _slopes(
        self, passes: Sequence[BackwardPass], line: Line, expected: Expected | None, anew: bool
    ) -> SampleSlopes | None:
        if inside_functorch() or forward_ad._current_level >= 0:
            raise CannotDifferentiateError("inside a transform of torch.func", passing=True)
        if not passes:
            raise CannotDifferentiateError("no backward pass", passing=True)
        groups = [_calls_of(entry) for entry in passes]
        if self.half or any(calls.half for calls in groups):
            line = line.as_long_as_the_point()
        signature = self._signature_of(groups)
        changed = signature != self._signature
        if expected is not None:
            if changed or anew or self._refreshes % CHECK_AGAIN == 0:
                self._signature = signature
                self._refreshes = 1
                try:
                    return self._checked(passes, groups, line, expected)
                except CannotDifferentiateError:
                    if not self.half or line.unit != 1.0:
                        raise
                # It computes in 16 bits inside, which was not known before.
                return self._checked(passes, groups, line.as_long_as_the_point(), expected)
            self._refreshes += 1
        elif changed and self._signature is not None:
            raise CannotDifferentiateError("the model was called otherwise", passing=True)
        if self.reason is not None:
            raise CannotDifferentiateError(self.reason)
        at_end = expected is None
        every = self._whole or (at_end and self._unproved)
        self._unproved = self._unproved and not at_end
        return self._put_together(passes, groups, line, every)

    def _put_together(
        self, passes: Sequence[BackwardPass], groups: Sequence[_Calls], line: Line, whole: bool
    ) -> SampleSlopes:
        """Slopes of the samples of all passes; not ``whole``: of a bounded number of them, run by themselves."""
        total = total_samples(passes)
        left = total if whole else SAMPLES
        parts: list[Tensor] = []
        losses: list[Tensor | None] = []
        scale = scale_of(passes)
        for entry, calls in zip(passes, groups, strict=True):
            count = min(left, entry.samples or 0)
            if count == 0:
                continue
            left -= count
            every = whole or count == entry.samples or calls.of_different_samples(entry.samples)
            chosen = None if every else torch.arange(count)
            part = self._part(entry, calls, line, chosen, replay=whole or chosen is None)
            parts.append(part.along * (total * scale * line.unit))
            weight = loss_weight(entry, passes)
            losses.append(None if part.losses is None else part.losses.double() * weight)
        together = torch.cat([part.to(parts[0].device) for part in parts])
        single = [loss for loss in losses if loss is not None]
        known = torch.cat(single) if single and len(single) == len(losses) else None
        others = self._draws_others if self._signature is not None else self._may_draw_others(groups)
        return SampleSlopes(together, len(together) == total, known, not others)

    def _checked(
        self, passes: Sequence[BackwardPass], groups: Sequence[_Calls], line: Line, expected: Expected
    ) -> SampleSlopes | None:
        """Check everything anew, see the module docstring.

        Raises:
            CannotDifferentiateError: If a check fails.
        """
        self.reason, self._whole, self._draws_others, self._unproved = None, True, False, False
        if expected.interacting:
            raise CannotDifferentiateError(INTERACT)
        if not expected.all_of_loss:
            raise CannotDifferentiateError(OTHER_TERMS)
        every = self._put_together(passes, groups, line, whole=True)
        half = self.half or any(calls.half for calls in groups)
        if self._others_moved(groups, line) or not _true(torch.isfinite(every.values).all()):
            self._signature = None  # nothing can be compared: check the next time
            return every
        tf32 = in_tf32(innermost(self.model))
        tolerance = TOLERANCE_HALF if half else TOLERANCE_TF32 if tf32 else TOLERANCE
        mean, deviation = every.values.mean(), every.values.std()
        error = deviation / max(1, len(every.values)) ** 0.5
        may_draw_others = self._may_draw_others(groups)
        if tolerance != TOLERANCE:  # rounding of the user's own pass, which is the same for all samples
            error = every.values.abs().mean()
        if expected.slope is None:  # that of all ranks, who cannot tell whether one has drawn others
            self._draws_others = may_draw_others
        else:
            slope = expected.slope.to(mean.device)
            self._draws_others = _true((mean - slope).abs() > tolerance * torch.maximum(slope.abs(), error))
            if self._draws_others and not may_draw_others:
                raise CannotDifferentiateError(OTHER_TERMS)
        self._unproved = self._draws_others
        if every.losses is not None and expected.loss is not None:
            loss = every.losses.mean()
            limit = tolerance * loss.abs().clamp_min(1e-30)
            if self._draws_others:
                limit = limit + by_chance(every.losses)
            if _true((loss - expected.loss.to(loss.device)).abs() > limit):
                raise CannotDifferentiateError(OTHER_TERMS)
        if not mixes_samples(innermost(self.model)):
            self._compare_some(passes, groups, line, APART_TF32 if tf32 else APART)
        return replace(every, repeated=not self._draws_others)

    def _may_draw_others(self, groups: Sequence[_Calls]) -> bool:
        """Whether a repetition may drop other units than the pass did.

        Plain kernels use a GPU's random numbers in another order than fused ones, compiled code in an order of its own.
        """
        _, plain_kernels, _ = _WAYS[self._way]
        calls = [call for each in groups for call, _ in each.items]
        compiled = is_compiled(self.model)
        return any(call.drew and (compiled or (plain_kernels and call.random.own)) for call in calls)

    def _others_moved(self, groups: Sequence[_Calls], line: Line) -> bool:
        """Whether parameters that this step does not move were changed since the calls, by another optimizer."""
        named = list(innermost(self.model).named_parameters())
        for call, _ in (item for calls in groups for item in calls.items):
            for (name, param), version in zip(named, call.parameters, strict=False):
                if name not in line.point and param._version != version:
                    return True
        return False

    def _compare_some(
        self, passes: Sequence[BackwardPass], groups: Sequence[_Calls], line: Line, tolerance: float
    ) -> None:
        """Run some samples by themselves, without dropout, and compare them with the whole batch.

        Raises:
            CannotDifferentiateError: If they differ.
        """
        entry, calls = passes[0], groups[0]
        samples = entry.samples or 0
        if samples < 2:
            return
        count = min(SAMPLES, samples // 2)
        chosen = (torch.arange(count) * samples) // count + (samples // count - 1)
        try:
            every, some = self._all_and_some(entry, calls, line, chosen)
        except CannotCutError:
            return  # always the whole batch
        tolerance = APART_HALF if self._ran_in_half else tolerance
        if every.ratio is not None and some.ratio is not None:
            share, of_ratio = count / samples, read([some.ratio / every.ratio])[0]
            if not math.isfinite(of_ratio):  # none of them counts: other samples tell, the next time
                self._signature = None
                return
            self._sums = abs(of_ratio - share) < abs(of_ratio - 1.0)
        expected = every.along[chosen.to(every.along.device)]
        factor: Tensor | float = 1.0
        apart = False
        if some.losses is not None and every.losses is not None:
            reference = every.losses[chosen.to(every.losses.device)]
            # Losses are normalised by the targets that count in a batch, which are others in a part of it.
            factor = reference.sum() / some.losses.sum() if _true(some.losses.sum() != 0) else 1.0
            apart = _apart(some.losses * factor, reference, reference, tolerance)
        if apart or _apart(some.along * factor, expected, every.along, tolerance):
            raise CannotDifferentiateError(INTERACT)
        self._whole = self._exact

    def _all_and_some(self, entry: BackwardPass, calls: _Calls, line: Line, chosen: Tensor) -> tuple[_Part, _Part]:
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

    def _without_dropout(self, entry: BackwardPass, calls: _Calls, line: Line, chosen: Tensor) -> tuple[_Part, _Part]:
        self._ran_in_half = False
        every = self._part(entry, calls, line, None, replay=False, without_dropout=True)
        try:
            some = self._part(entry, calls, line, chosen, replay=False, without_dropout=True)
        except CannotDifferentiateError as error:
            if str(error) == INTERACT:
                raise
            raise CannotCutError(str(error)) from None  # cut wrongly, it seems
        if self._drew:  # other random numbers than those of dropout: some samples by themselves get others
            raise CannotCutError("it draws random numbers")
        return every, some

    def _part(
        self,
        entry: BackwardPass,
        calls: _Calls,
        line: Line,
        chosen: Tensor | None,
        replay: bool,
        without_dropout: bool = False,
    ) -> _Part:
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
        return _Part(put([part.along for part in parts]), known, parts[0].ratio)

    def _of_call(
        self,
        entry: BackwardPass,
        call: ModelCall,
        gradients: dict[int, Tensor],
        line: Line,
        chosen: Tensor | None,
        replay: bool,
        without_dropout: bool,
    ) -> _Part:
        if not call.unaltered():
            raise CannotDifferentiateError("its input was changed in place", passing=True)
        if call.writes:
            raise CannotDifferentiateError("the model writes to its parameters in its forward pass")
        whole = call.samples or entry.samples or 0
        samples = whole if chosen is None else len(chosen)
        args, kwargs = call.args, call.kwargs
        if chosen is not None:
            args = cut(args, whole, chosen, self._sample_dim)
            kwargs = {name: cut(value, whole, chosen, self._sample_dim) for name, value in kwargs.items()}
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
    ) -> _Part:
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
                gradient = cut_rows(gradient, whole, chosen, self._sample_dim)
            if gradient is None or gradient.shape != tangent.shape:
                raise CannotDifferentiateError(
                    INTERACT if chosen is not None else "the model gives another output when it is called again"
                )
            rows = _contracted(gradient, tangent, samples, self._sample_dim)
            if rows is None:
                raise CannotDifferentiateError(
                    f"an output of shape {list(call.shapes[place])} that the loss depends on has no rows of samples"
                )
            total = rows if total is None else total + rows
        assert total is not None
        return _Part(total)

    def _of_inner_losses(
        self,
        values: list[Tensor],
        tangents: list[Tensor],
        gradients: dict[int, Tensor],
        call: ModelCall,
        samples: int,
        whole: int,
    ) -> _Part:
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
        if _true(apart > limit):
            raise CannotDifferentiateError(OTHER_TERMS)
        assert call.loss_place is not None
        gamma = gradients[call.loss_place].double()
        factor = ratio * (whole / samples) if self._sums else ratio
        return _Part(single_along.double() * factor * gamma / whole, single.double() * factor, ratio)

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
        self.half, self._ran_in_half = self.half or seen.half, self._ran_in_half or seen.half
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
        single = [rows.of_samples(samples, self._sample_dim) for _, rows in seen.calls]
        if any(entry is None for entry in single):
            raise CannotDifferentiateError("the rows of its loss are neither the samples nor a multiple of them")
        assert call.loss_place is not None
        found = [entry for entry in single if entry is not None]
        means = [entry.mean() if m is None else m for (m, _), entry in zip(seen.calls, found, strict=True)]
        mean, together = sum(means[1:], means[0]), torch.stack(found).sum(0)
        return [tensors[call.loss_place], mean, together]

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
                failure = failure or _short(error)
            else:
                self._way = number
                return result
        raise CannotDifferentiateError(f"it cannot be differentiated along a step ({failure})")

    def _signature_of(self, groups: Sequence[_Calls]) -> str:
        """What has to be checked again if it changes: how the model is called, and what came back."""
        return str(
            [
                (
                    [
                        (tensor.dim(), tensor.dtype, self._cut_along(tensor, call.samples))
                        for tensor in tensors_in((call.args, call.kwargs))
                    ],
                    call.training,
                    sorted(gradients),
                )
                for call, gradients in groups[0].items
            ]
        )

    def _cut_along(self, tensor: Tensor, samples: int | None) -> list[int]:
        """Dimensions along which an input could be cut to some samples; none where the whole batch is run."""
        if self._exact or tensor.is_nested:
            return []
        return [dim for dim, size in enumerate(tensor.shape) if size == samples]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must not find out anew."""
        return {
            "whole": self._whole,
            "sums": self._sums,
            "way": self._way,
            "reason": self.reason,
            "refreshes": self._refreshes,
            "seed": self._seed,
            "half": self.half,
            "signature": self._signature,
            "draws_others": self._draws_others,
            "unproved": self._unproved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was found out."""
        self._whole, self._way = bool(state["whole"]), int(state["way"])
        self.reason, self._refreshes = state["reason"], int(state["refreshes"])
        self._seed, self.half = int(state["seed"]), bool(state["half"])
        self._sums, self._unproved = bool(state.get("sums", False)), bool(state.get("unproved", False))
        self._draws_others = bool(state.get("draws_others", False))
        self._signature = state["signature"] if "sums" in state else None  # of an older version: check anew


@dataclass(frozen=True)
class _Calls:
    """The calls of the model in one pass, each with the gradients that reached its outputs, by place."""

    items: list[tuple[ModelCall, dict[int, Tensor]]]

    def of_different_samples(self, samples: int | None) -> bool:
        """Whether the calls have samples of their own, which belong to one loss of ``samples``."""
        counts = [call.samples or 0 for call, _ in self.items]
        return len(counts) > 1 and sum(counts) == samples

    def without_autocast(self) -> _Calls:
        """The same calls as if there had been no autocast."""
        off = [
            (replace(call, autocast=replace(call.autocast, enabled=False)), gradients) for call, gradients in self.items
        ]
        return _Calls(off)

    @property
    def half(self) -> bool:
        """Whether any of it ran in 16 bits."""
        return any(
            call.autocast.enabled or any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients.values())
            for call, gradients in self.items
        )


def _calls_of(entry: BackwardPass) -> _Calls:
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
    if any(call.subset for call in entry.calls):
        raise CannotDifferentiateError("the loss is one of some samples only, picked by a mask")
    if not found:
        raise CannotDifferentiateError("no gradient came through a tensor that the model returned", passing=True)
    items = list(found.values())
    for call, _ in items:
        if call.samples is None and entry.samples is None:
            raise CannotDifferentiateError("the number of samples is not known")
    calls = _Calls(items)
    if len({call.samples for call, _ in items}) > 1 and not calls.of_different_samples(entry.samples):
        raise CannotDifferentiateError("several calls of the model with different numbers of samples")
    return calls


def _random_numbers(call: ModelCall, replay: bool, seed: int | None) -> AbstractContextManager[None]:
    """The random numbers of a repetition: none, those of the call, or others that are nobody else's."""
    if not call.drew:  # the generators are those of all threads
        return nullcontext()
    return call.random.replayed() if replay else untouched(call.random.own, seed)


def _contracted(gradient: Tensor, tangent: Tensor, samples: int, sample_dim: int) -> Tensor | None:
    """Inner products of two tensors over what belongs to each sample ``[N]``; None if samples do not fit."""
    if gradient.numel() <= TOGETHER or sample_dim != 0 or gradient.shape[0] % max(1, samples):
        return folded(gradient.double() * tangent.double(), samples, sample_dim)
    # Logits of a language model: in float64, and all at once, they would take more memory than training does.
    pairs = zip(gradient.reshape(samples, -1), tangent.reshape(samples, -1), strict=True)
    return torch.stack([(one.double() * other.double()).sum() for one, other in pairs])


def _added(values: Sequence[Tensor]) -> Tensor:
    """Sum of vectors of one length."""
    return sum(values[1:], values[0])


def _apart(some: Tensor, expected: Tensor, every: Tensor, tolerance: float) -> bool:
    """Whether some samples differ from what they should be, relative to the largest of all."""
    if some.shape != expected.shape:
        return True
    return not _true((some - expected).abs().max() <= tolerance * every.abs().max())


def _true(value: Tensor) -> bool:
    """Read a truth; waits for the device, and is asked for at checks only."""
    return bool(read([value])[0])


def in_tf32(module: nn.Module) -> bool:
    """Whether products of float32 are formed in TF32, which rounds to 10 bits: cuDNN's are, unless one says no.

    Parameters of 16 bits are widened to float32 where samples are compared.
    """
    if not any(param.is_cuda and param.dtype is not torch.float64 for param in module.parameters()):
        return False
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return True
        of_cudnn = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by a newer interface, which the older one cannot tell
        return True
    return of_cudnn and any(isinstance(child, (_ConvNd, nn.RNNBase)) for child in module.modules())


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, runs as `torch.compile` has made it."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())


def mixes_samples(module: nn.Module) -> bool:
    """Whether a sample's output depends on the others: BatchNorm on the batch's statistics."""
    return any(
        isinstance(child, _BatchNorm) and (child.training or child.running_mean is None) for child in module.modules()
    )


@lru_cache(maxsize=1)
def _load_forward_rules() -> None:
    """Import what torch imports at the first use of forward mode; it warns there of something of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _forward(run: Callable[[Values], list[Tensor]], line: Line) -> tuple[list[Tensor], list[Tensor]]:
    _load_forward_rules()
    with torch.no_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, line.tangents[name]) for name, value in line.point.items()}
        pairs = [forward_ad.unpack_dual(output) for output in run(duals)]
        values = [pair.primal.detach() for pair in pairs]
        tangents = [
            torch.zeros_like(value) if pair.tangent is None else pair.tangent.detach()
            for value, pair in zip(values, pairs, strict=True)
        ]
    return values, tangents


def _twice_backward(run: Callable[[Values], list[Tensor]], line: Line) -> tuple[list[Tensor], list[Tensor]]:
    """J d as the derivative of <J^T u, d>, which is linear in u."""
    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_() for name, value in line.point.items()}
        outputs = run(leaves)
        live = [output for output in outputs if output.requires_grad]
        seeds = [torch.zeros_like(output, requires_grad=True) for output in live]
        pulled = torch.autograd.grad(live, list(leaves.values()), seeds, create_graph=True, allow_unused=True)
        along = [
            (gradient * line.tangents[name]).sum()
            for name, gradient in zip(leaves, pulled, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not along:
            return [o.detach() for o in outputs], [torch.zeros_like(o) for o in outputs]
        found = iter(torch.autograd.grad(torch.stack(along).sum(), seeds, allow_unused=True))
    tangents = [
        gradient.detach() if output.requires_grad and (gradient := next(found)) is not None
        else torch.zeros_like(output) for output in outputs
    ]  # fmt: skip
    return [output.detach() for output in outputs], tangents


def _short(error: BaseException) -> str:
    """First line of an error, cut."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:160]


_WAYS = tuple(
    (wide, plain_kernels, derive)
    for wide in (True, False)
    for plain_kernels, derive in ((False, _forward), (True, _forward), (True, _twice_backward))
)
"""Ways to take a derivative, tried in this order: with parameters of 16 bits widened or not, with the kernels as they
are set or plain ones, in forward mode or by two reverse passes."""
