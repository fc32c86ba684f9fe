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

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from alpha_optim.alpha.states import Remembers
from alpha_optim.observe.backward_passes import BackwardPass, loss_weight, scale_of, total_samples
from alpha_optim.observe.hooks import inside_functorch, tensors_in
from alpha_optim.observe.model_calls import innermost
from alpha_optim.observe.model_inputs import CannotCutError
from alpha_optim.observe.numbers import read
from alpha_optim.slopes.base import (
    INTERACT,
    OF_LOSS_FN,
    OTHER_TERMS,
    SAMPLES,
    Expected,
    Names,
    SampleSlopes,
    by_chance,
    scattered_as_all,
)
from alpha_optim.slopes.derivative import Line
from alpha_optim.slopes.isolation import PROCESS_WIDE
from alpha_optim.slopes.repetition import (
    TOLERANCE,
    TOLERANCE_HALF,
    TOLERANCE_TF32,
    Calls,
    CannotDifferentiateError,
    Repetition,
    calls_of,
    short,
    true,
)

APART, APART_TF32, APART_HALF = 1e-3, 1e-2, 5e-2
"""Deviation of a sample by itself from the same sample in its batch, relative to the largest sample."""
OTHERS_MOVED = 3e-3
"""Deviation of the mean slope, relative to the slopes of samples, after another optimizer has moved its parameters."""
OTHERS = (
    "another optimizer has moved parameters of the model before this one made its step; wrap both as one, "
    "AlphaGuided([one, other], model, loss_fn)"
)
MISSED = 5
"""After so many steps in a row whose start could not be repeated, each for a reason of its own, the reason is told."""
CHECK_AGAIN = 16
"""So many refreshes lie between two checks; a check costs about four of them."""


class ForwardMode(Remembers):
    """Differentiates one model, and remembers what its checks have found."""

    reason: str | None  # why nothing can be had, as the last check found
    _whole: bool
    _signature: str | None
    _refreshes: int
    _draws_others: bool = False  # whether its random numbers are not those of the loop, as the last check found
    _unproved: bool = False  # whether the slopes of all samples are to be compared at the end of the step

    def __init__(self, model: nn.Module, sample_dim: int, exact: bool) -> None:
        """Prepare.

        Args:
            model: The model that the loop calls.
            sample_dim: Dimension along which samples lie in its inputs.
            exact: Whether all samples are wanted every time.
        """
        self._exact = exact
        self._repetition = Repetition(model, sample_dim)
        self.reason, self._signature = None, None
        self._whole, self._refreshes = exact, 0
        self._missed = 0  # steps in a row whose start could not be repeated

    @property
    def model(self) -> nn.Module:
        """The model that the loop calls."""
        return self._repetition.model

    @property
    def half(self) -> bool:
        """Whether the model computes in 16 bits, as far as was seen."""
        return self._repetition.half

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

    def check_anew(self) -> None:
        """Check the next start of a step."""
        self._signature = None

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
                found = self._slopes(passes, line, expected, anew)
            self._missed = 0
            return found, None
        except CannotDifferentiateError as error:
            if error.passing:
                self._missed += expected is not None
                if self._missed < MISSED:
                    return None, None
            self.reason = str(error)
            return None, self.reason
        except Exception as error:  # watching never raises into the user's loop
            self.reason = f"its repetition failed ({type(error).__name__}: {short(error)})"
            return None, self.reason

    def _slopes(
        self, passes: Sequence[BackwardPass], line: Line, expected: Expected | None, anew: bool
    ) -> SampleSlopes | None:
        if inside_functorch() or forward_ad._current_level >= 0:
            raise CannotDifferentiateError("inside a transform of torch.func", passing=True)
        if not passes:
            raise CannotDifferentiateError("no backward pass", passing=True)
        groups = [calls_of(entry) for entry in passes]
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
        slopes = self._put_together(passes, groups, line, self._whole or (at_end and self._unproved))
        self._unproved = self._unproved and not at_end
        return slopes

    def _put_together(
        self, passes: Sequence[BackwardPass], groups: Sequence[Calls], line: Line, whole: bool
    ) -> SampleSlopes:
        """Slopes of the samples of all passes; not ``whole``: of a bounded number of them, run by themselves."""
        total = total_samples(passes)
        left = total if whole else SAMPLES
        parts: list[Tensor] = []
        losses: list[Tensor | None] = []
        taken: list[BackwardPass] = []
        scale = scale_of(passes)
        for entry, calls in zip(passes, groups, strict=True):
            count = min(left, entry.samples or 0)
            if count == 0:
                continue
            left -= count
            every = whole or count == entry.samples or calls.of_different_samples(entry.samples)
            chosen = None if every else torch.arange(count)
            part = self._repetition.part(entry, calls, line, chosen, replay=whole or chosen is None)
            parts.append(part.along * (total * scale * line.unit))
            weight = loss_weight(entry, passes)
            losses.append(None if part.losses is None else part.losses.double() * weight)
            taken.append(entry)
        single = [loss for loss in losses if loss is not None]
        known = scattered_as_all(single, taken, passes) if single and len(single) == len(losses) else None
        others = self._draws_others if self._signature is not None else self._may_draw_others(groups)
        return SampleSlopes(scattered_as_all(parts, taken, passes), sum(map(len, parts)) == total, known, not others)

    def _checked(
        self, passes: Sequence[BackwardPass], groups: Sequence[Calls], line: Line, expected: Expected
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
        if not true(torch.isfinite(every.values).all()):
            self._signature = None  # nothing can be compared: check the next time
            return every
        if self._others_moved(groups, line):
            self._signature = None
            if expected.slope is not None and true(every.apart_from(expected.slope, OTHERS_MOVED)):
                raise CannotDifferentiateError(OTHERS)
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
            far = true((mean - slope).abs() > tolerance * torch.maximum(slope.abs(), error))
            if far and not may_draw_others:
                raise CannotDifferentiateError(OF_LOSS_FN if line.others_move else OTHER_TERMS)
            # Where products are rounded other random numbers may come as near by chance.
            self._draws_others = may_draw_others and (far or tolerance != TOLERANCE)
        self._unproved = self._draws_others
        if every.losses is not None and expected.loss is not None:
            loss = every.losses.mean()
            limit = tolerance * loss.abs().clamp_min(1e-30)
            if self._draws_others:
                limit = limit + by_chance(every.losses)
            if true((loss - expected.loss.to(loss.device)).abs() > limit):
                raise CannotDifferentiateError(OTHER_TERMS)
        if not mixes_samples(innermost(self.model)):
            self._compare_some(passes, groups, line, APART_TF32 if tf32 else APART)
        return replace(every, repeated=not self._draws_others)

    def _may_draw_others(self, groups: Sequence[Calls]) -> bool:
        """Whether a repetition may drop other units than the pass did.

        Plain kernels use a GPU's random numbers in another order than fused ones, compiled code in an order of its own.
        """
        plain, compiled = self._repetition.with_plain_kernels, is_compiled(self.model)
        calls = [call for each in groups for call, _ in each.items]
        return any(call.drew and (compiled or (plain and call.random.own)) for call in calls)

    def _others_moved(self, groups: Sequence[Calls], line: Line) -> bool:
        """Whether parameters that this step does not move were changed since the calls, by another optimizer."""
        named = list(innermost(self.model).named_parameters())
        for call, _ in (item for calls in groups for item in calls.items):
            for (name, param), version in zip(named, call.parameters, strict=False):
                if name not in line.point and param._version != version:
                    return True
        return False

    def _compare_some(
        self, passes: Sequence[BackwardPass], groups: Sequence[Calls], line: Line, tolerance: float
    ) -> None:
        """Run some samples by themselves, without dropout, and compare them with the whole batch.

        Raises:
            CannotDifferentiateError: If they differ.
        """
        entry, calls = passes[0], groups[0]
        samples = entry.samples or 0
        pooled = any(samples < (call.samples or 0) for call, _ in calls.items)  # nodes of one graph belong together
        if samples < 2 or pooled:
            return
        count = min(SAMPLES, samples // 2)
        chosen = (torch.arange(count) * samples) // count + (samples // count - 1)
        try:
            every, some = self._repetition.all_and_some(entry, calls, line, chosen)
        except CannotCutError:
            return  # always the whole batch
        tolerance = APART_HALF if self._repetition.ran_in_half else tolerance
        if every.ratio is not None and some.ratio is not None:
            share, of_ratio = count / samples, read([some.ratio / every.ratio])[0]
            if not math.isfinite(of_ratio):  # none of them counts: other samples tell, the next time
                self._signature = None
                return
            self._repetition.sums = abs(of_ratio - share) < abs(of_ratio - 1.0)
        expected = every.along[chosen.to(every.along.device)]
        factor: Tensor | float = 1.0
        apart = False
        if some.losses is not None and every.losses is not None:
            reference = every.losses[chosen.to(every.losses.device)]
            # Losses are normalised by the targets that count in a batch, which are others in a part of it.
            factor = reference.sum() / some.losses.sum() if true(some.losses.sum() != 0) else 1.0
            apart = _apart(some.losses * factor, reference, reference, tolerance)
        if apart or _apart(some.along * factor, expected, every.along, tolerance):
            raise CannotDifferentiateError(INTERACT)
        self._whole = self._exact

    def _signature_of(self, groups: Sequence[Calls]) -> str:
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
        return {**super().state_dict(), **self._repetition.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was found out; of an older version: check anew."""
        super().load_state_dict(state if "sums" in state else {**state, "signature": None})
        self._repetition.load_state_dict(state)


def _apart(some: Tensor, expected: Tensor, every: Tensor, tolerance: float) -> bool:
    """Whether some samples differ from what they should be, relative to the largest of all."""
    if some.shape != expected.shape:
        return True
    return not true((some - expected).abs().max() <= tolerance * every.abs().max())


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
    return any(
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def mixes_samples(module: nn.Module) -> bool:
    """Whether a sample's output depends on the others: BatchNorm on the batch's statistics."""
    return any(
        isinstance(child, _BatchNorm) and (child.training or child.running_mean is None) for child in module.modules()
    )
