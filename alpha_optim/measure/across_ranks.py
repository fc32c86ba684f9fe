"""What ranks tell each other at a step: one report each, added up, and alpha of a step from such sums.

A report is 16 float64 numbers, 128 bytes: counts, sums and centred second moments, and what the guard wants to know.
Counts that stay small share a number. Means of ranks are weighted as training weights them: the loss is
sum(Gamma_r L_r) / sum(Gamma_r), with Gamma_r the factor with which rank r sends its mean loss L_r backward, and sample
i of rank r weighs Gamma_r N / (N_r sum(Gamma)), as samples of micro-batches do in one process.

Second moments are taken about a centre that all ranks know, the mean of the last step. So one sum is enough, and
nothing cancels as in mean of squares minus squared mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alpha_optim.alpha.measurement import AlphaMeasurement, measure_alpha
from alpha_optim.alpha.records import DropReason, Observation
from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.distributed import Ranks, Sum
from alpha_optim.observe.numbers import Number, Truth, read
from alpha_optim.slopes.base import OF_OTHER_GRADIENTS, chance_of_means

RANKS = 1 << 17
"""Counts of ranks lie below this, so that three of them fit into the 53 bits in which float64 counts exactly."""
SAMPLES = 1 << 26
"""Counts of samples over all ranks lie below this; two fit."""


@dataclass(frozen=True)
class Scatter:
    """How numbers of single samples lie about a centre, not yet divided by anything.

    Where a rank looks at some of its samples each of them stands for as many as there are to one looked at: ranks look
    at equally many of batches that may be unequally large.

    Attributes:
        count: How many were looked at.
        total: Sum over all samples of their distances from the centre.
        squares: Sum of the squares of those.
        stand_for: So many samples they stand for; does not travel, since N is known of all ranks together.
    """

    count: float = 0.0
    total: Number = 0.0
    squares: Number = 0.0
    stand_for: float = 0.0

    @classmethod
    def of(cls, values: Tensor | None, weight: Number, centre: float, samples: int) -> Scatter:
        """Take the scatter of values ``[n]`` of some of a rank's samples times a weight; empty for None."""
        if values is None or values.numel() == 0:
            return cls()
        weight = weight.to(values.device) if isinstance(weight, Tensor) else weight
        weighed = values.double() * weight
        # Without targets that count they are divided by 0 (and a mean of none is nan).
        nothing = torch.as_tensor(weight == 0.0, device=values.device)
        apart = torch.where(nothing, 0.0, weighed) - centre
        all_of_them = float(max(samples, values.numel()))
        each = all_of_them / values.numel()
        return cls(float(values.numel()), apart.sum() * each, apart.square().sum() * each, all_of_them)

    def mean(self, centre: float) -> float:
        """Mean of the values; once the numbers of all ranks have been read."""
        return math.nan if not self.count else float(self.total) / self.stand_for + centre

    def variance(self) -> float:
        """Variance of the values (ddof=1); once the numbers of all ranks have been read."""
        if self.count < 2:
            return math.nan
        total = float(self.total)
        value = (float(self.squares) - total * total / self.stand_for) / self.stand_for * self.count / (self.count - 1)
        return 0.0 if value < 0.0 else value  # nan stays nan


class Centres(NamedTuple):
    """About what scatters are taken: means of the last step, the same on all ranks."""

    loss: float = 0.0
    end: float = 0.0
    start: float = 0.0


@dataclass(frozen=True)
class Report:
    """What one rank has seen when `step` is called; or, in whole numbers and floats, the sum over all ranks.

    Attributes:
        rates: `distributed.fingerprint` of the learning rates.
        params_broke: Whether a parameter that was finite is so no longer.
        buffers_broke: Whether a buffer is.
        gradient_broke: Whether a gradient is not finite.
        unpaired: Whether this rank cannot complete the pair that ends here.
        no_return: Whether it has no point to go back to.
        pass_broke: Whether a pass that came to no step had a loss that is not finite.
        loss_unseen: Whether it has seen no loss.
        losses_unseen: Whether losses of single samples cannot be had.
        slopes_unseen: Whether slopes of single samples were due and could not be had.
        samples: N of this rank.
        gamma: Gamma_r.
        loss: Gamma_r L_r.
        losses: Scatter of single losses; the sum of all of them is ``loss``.
        end: Scatter of single slopes along the step that ends here, divided by its length.
        start: The same at its start.
        end_product: <d, gradient> of the local parts of the parameters, at the end of the step.
        start_product: The same at its start.
        squared_length: |d|^2 of the local parts.
    """

    rates: float = 0.0
    params_broke: Truth | float = False
    buffers_broke: Truth | float = False
    gradient_broke: Truth | float = False
    unpaired: Truth | float = False
    no_return: Truth | float = False
    pass_broke: Truth | float = False
    loss_unseen: Truth | float = False
    losses_unseen: Truth | float = False
    slopes_unseen: Truth | float = False
    samples: float = 0.0
    gamma: Number = 0.0
    loss: Number = 0.0
    losses: Scatter = field(default_factory=Scatter)
    end: Scatter = field(default_factory=Scatter)
    start: Scatter = field(default_factory=Scatter)
    end_product: Number = 0.0
    start_product: Number = 0.0
    squared_length: Number = 0.0

    def begins(self) -> Report:
        """The first report of a rank, of which only means are used: it is sent once more, about them."""
        return replace(self, squared_length=-math.inf, pass_broke=True)

    @property
    def beginners(self) -> int:
        """In a sum, how many ranks have sent their first report."""
        return int(self.pass_broke) if self.squared_length == -math.inf else 0

    def packed(self, device: torch.device) -> Tensor:
        """The numbers as they travel, float64 ``[16]``.

        Args:
            device: Where the ranks add them up.
        """
        numbers: list[Any] = [
            self.rates,
            _together(RANKS, self.params_broke, self.buffers_broke, self.gradient_broke),
            _together(RANKS, self.unpaired, self.no_return, self.pass_broke),
            _together(RANKS, self.loss_unseen, self.losses_unseen, self.slopes_unseen),
            _together(SAMPLES, self.samples, self.losses.count),
            _together(SAMPLES, self.end.count, self.start.count),
            self.gamma,
            self.loss,
            self.losses.squares,
            self.squared_length,
            self.end.total,
            self.end.squares,
            self.start.total,
            self.start.squares,
            self.end_product,
            self.start_product,
        ]
        if device.type == "cpu":
            return torch.tensor(read(numbers), dtype=torch.float64)
        return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])

    @classmethod
    def unpacked(cls, numbers: Sequence[float]) -> Report:
        """The sum of all reports from the numbers that came back."""
        params, buffers, gradient = _apart(RANKS, numbers[1], 3)
        unpaired, no_return, passes = _apart(RANKS, numbers[2], 3)
        loss, losses, slopes = _apart(RANKS, numbers[3], 3)
        samples, counted = _apart(SAMPLES, numbers[4], 2)
        at_end, at_start = _apart(SAMPLES, numbers[5], 2)
        return cls(
            rates=numbers[0],
            params_broke=params,
            buffers_broke=buffers,
            gradient_broke=gradient,
            unpaired=unpaired,
            no_return=no_return,
            pass_broke=passes,
            loss_unseen=loss,
            losses_unseen=losses,
            slopes_unseen=slopes,
            samples=samples,
            gamma=numbers[6],
            loss=numbers[7],
            losses=Scatter(counted, 0.0, numbers[8]),
            squared_length=numbers[9],
            end=Scatter(at_end, numbers[10], numbers[11]),
            start=Scatter(at_start, numbers[12], numbers[13]),
            end_product=numbers[14],
            start_product=numbers[15],
        )


def _together(radix: int, *counts: Any) -> Number:
    """Whole numbers in one."""
    total: Any = 0.0
    for place, count in enumerate(counts):
        value = count.double() if isinstance(count, Tensor) else float(count)
        total = total + value * float(radix**place)
    result: Number = total
    return result


def _apart(radix: int, number: float, count: int) -> list[float]:
    """The whole numbers in one that is finite."""
    rest = int(number)
    found = []
    for _ in range(count):
        rest, value = divmod(rest, radix)
        found.append(float(value))
    return found


class Together:
    """The sum of all ranks' reports; waited for and read from the device when somebody asks."""

    def __init__(self, numbers: Sum, ranks: Ranks, centres: Centres) -> None:
        """Keep it.

        Args:
            numbers: The sums ``[16]``.
            ranks: Those who have added them up.
            centres: About what scatters were taken.
        """
        self._numbers = numbers
        self._size, self._batches = ranks.size, ranks.batches
        self.centres = centres

    @cached_property
    def sums(self) -> Report:
        """The numbers, read."""
        return Report.unpacked(self._numbers.read())

    @property
    def samples(self) -> int:
        """N over all ranks; a batch that several are fed counts once."""
        return int(self.sums.samples) // self._batches

    @property
    def gamma(self) -> float:
        """Factor between the mean loss and what the mean over ranks is sent backward with; 1 if none was seen."""
        return float(self.sums.gamma) / self._size or 1.0

    @property
    def loss(self) -> float | None:
        """The loss; None if a rank has not seen its own."""
        if self.sums.loss_unseen or not self.sums.gamma:
            return None
        return float(self.sums.loss) / float(self.sums.gamma)

    @property
    def _unit(self) -> float:
        """What a sample's contribution to what is sent backward has to be multiplied by."""
        gamma = float(self.sums.gamma)
        return self.sums.samples / gamma if gamma else math.nan

    def loss_variance(self, known: float | None) -> float | None:
        """Variance of one sample's loss over all ranks; as it was known before where it was not measured here."""
        sums = self.sums
        if sums.losses_unseen or sums.loss_unseen:
            return None
        count, centre = sums.losses.count, self.centres.loss
        if count < 2:
            return known
        apart = float(sums.loss) / sums.samples - centre  # of the mean of all samples
        if count == sums.samples:
            every = replace(sums.losses, total=count * apart, stand_for=sums.samples)
            return self._variance(every, self._unit, known)
        # Of some samples only, about the mean of all.
        value = float(sums.losses.squares) / sums.samples - apart * apart
        return self._unit**2 * (0.0 if value < 0.0 else value)

    def slope_variance(self, role: str, at: Together, known: float | None) -> float | None:
        """Variance of one sample's slope; as it was known before where it was not measured here.

        Args:
            role: At which end of the step.
            at: The sum of the iteration at that end.
            known: The last variance.
        """
        if self.sums.slopes_unseen:
            return None
        return self._variance(self._slopes(role, at), at._unit, known)

    def _slopes(self, role: str, at: Together) -> Scatter:
        return replace(self.sums.end if role == "end" else self.sums.start, stand_for=at.sums.samples)

    def _variance(self, scatter: Scatter, unit: float, known: float | None) -> float | None:
        share = 1.0 / self._batches  # samples that several ranks are fed count once
        once = Scatter(*(float(getattr(scatter, field.name)) * share for field in fields(scatter)))
        return known if once.count < 2 else unit * unit * once.variance()

    def adds_up(self, role: str, at: Together, length: float, tolerance: float) -> bool | None:
        """Whether the slopes of all samples give the slope of the gradients; None if only some samples were looked at.

        Ranks that repeat their samples with random numbers other than the training loop's leave one out each. Those
        that are left give it but for chance (`slopes.base.by_chance`), and only at the end of a step.

        Args:
            role: At which end of the step.
            at: The sum of the iteration at that end.
            length: |d|.
            tolerance: How far apart they may be, relative to the slopes of samples.
        """
        scatter = self._slopes(role, at)
        product = float(self.sums.end_product if role == "end" else self.sums.start_product)
        left_out = at.sums.samples - scatter.count
        compared = 0 <= left_out <= (self._size if role == "end" else 0)
        if not scatter.count or not compared or not length:
            return None
        mean = scatter.mean(self.centres.end if role == "end" else self.centres.start)
        slope = product / length
        every = at.sums.samples / self._size  # from one sample's contribution to the mean over ranks
        size = abs(slope) + every * math.sqrt(scatter.variance() + mean * mean)
        limit = tolerance * size
        if left_out:
            limit = OF_OTHER_GRADIENTS * size + chance_of_means(scatter.count) * every * math.sqrt(scatter.variance())
        return not abs(mean * every - slope) > limit  # True for nan, which has a status of its own

    def next_centres(self, before: Centres) -> Centres:
        """Means of this step; where there are none, those of the last."""
        sums = self.sums
        seen = self.loss is not None and sums.samples > 0
        # That of the start was taken of the batch before, which is about as large.
        end, start = self._slopes("end", self), self._slopes("start", self)
        found = Centres(
            float(sums.loss) / sums.samples if seen else before.loss,
            end.mean(self.centres.end) if sums.end.count and sums.samples else before.end,
            start.mean(self.centres.start) if sums.start.count and sums.samples else before.start,
        )
        return Centres(*(value if math.isfinite(value) else old for value, old in zip(found, before, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"numbers": self._numbers.read(), "centres": to_plain(self.centres)}

    @classmethod
    def from_state(cls, state: dict[str, Any], ranks: Ranks) -> Together:
        """Build it anew."""
        numbers = torch.tensor(state["numbers"], dtype=torch.float64)
        return cls(Sum(numbers, None, ranks), ranks, from_plain(Centres, state["centres"], "centres"))


@dataclass(frozen=True)
class StartAcrossRanks:
    """What this rank has seen at the start of a step, and what all have.

    Attributes:
        together: The sum of the iteration that the step was made in.
        product: <d, gradient> of this rank, after clipping if ``factor`` says so.
        factor: What the gradient is a multiple of the one sent backward by; None if it is that one.
        lost: Whether the gradient of the loss is not known.
        slopes: Scatter of the slopes of samples along d / |d|; empty if they were not due.
        unseen: Whether they were due and could not be had.
        loss_variance: Variance of one sample's loss as it was known before.
        slope_variance: Variance of one sample's slope as it was known before.
        of: The rank, and how many there are.
    """

    together: Together
    product: Number
    factor: Number | None
    lost: Truth
    slopes: Scatter
    unseen: bool
    loss_variance: float | None
    slope_variance: float | None
    of: tuple[int, int]

    @property
    def sent(self) -> Number:
        """<d, gradient> of what was sent backward."""
        return self.product if self.factor is None else self.product / self.factor

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, and whose they are."""
        slopes = self.slopes
        product, factor, lost, total, squares = read(
            [self.product, self.factor, self.lost, slopes.total, slopes.squares]
        )
        return {
            "together": self.together.state_dict(),
            "of": list(self.of),
            "own": [product, factor, lost, slopes.count, total, squares, self.unseen],
            "variances": [self.loss_variance, self.slope_variance],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], ranks: Ranks | None) -> StartAcrossRanks | None:
        """Build it anew; None if another rank has seen it, or other ranks were there."""
        if ranks is None or list(state["of"]) != [ranks.rank, ranks.size]:
            return None
        product, factor, lost, count, total, squares, unseen = state["own"]
        of_loss, of_slope = state["variances"]
        return cls(
            Together.from_state(state["together"], ranks),
            product,
            factor,
            bool(lost),
            Scatter(count, total, squares),
            bool(unseen),
            of_loss,
            of_slope,
            (ranks.rank, ranks.size),
        )


@dataclass(frozen=True)
class PairAcrossRanks:
    """Both ends of a step as all ranks have seen them; becomes a measurement when somebody reads.

    Attributes:
        iteration: Iteration n of the start.
        edited: Whether they were changed between the step and the pass at its end.
        start: What was seen at the start.
        end: The sum of the iteration that the step ended in.
        loss_variance: Variance of one sample's loss as it was known before that.
        slope_variance: Variance of one sample's slope at the end as it was known before.
        lr: Learning rates of the step, one per group.
        tolerance: See `Together.adds_up`.
        on_doubt: Called when samples do not add up.
        doubted: Whether they did not the last time: then variances of some samples are believed once all have.
    """

    iteration: int
    edited: Truth
    start: StartAcrossRanks
    end: Together
    loss_variance: float | None
    slope_variance: float | None
    lr: tuple[float | Tensor, ...]
    tolerance: float
    on_doubt: Callable[[], None]
    doubted: bool

    @classmethod
    def resolve(cls, pairs: Sequence[PairAcrossRanks]) -> list[AlphaMeasurement | DropReason]:
        """Fetch the numbers of pairs, and measure; or the reason why one has to be dropped."""
        return [pair._measured() for pair in pairs]

    def _measured(self) -> AlphaMeasurement | DropReason:
        edited, lost, *lr = read([self.edited, self.start.lost, *self.lr])
        at_start, at_end = self.start.together, self.end
        if edited:
            return DropReason.PARAMETERS_CHANGED
        if lost:
            return DropReason.GRADIENTS_MODIFIED
        if at_end.sums.unpaired:
            return DropReason.OTHER_RANK
        length = math.sqrt(float(at_end.sums.squared_length))
        loss_variance = at_end.loss_variance(self.loss_variance)
        start = Observation(
            at_start.samples,
            _divided(at_end.sums.start_product, at_start.gamma, length),
            self._slope_variance("start", at_start, self.start.slope_variance, length),
            at_start.loss,
            # Where it was not known yet the next batch's stands in: it was measured at the same refresh.
            at_start.loss_variance(loss_variance if self.start.loss_variance is None else self.start.loss_variance),
        )
        end = Observation(
            at_end.samples,
            _divided(at_end.sums.end_product, at_end.gamma, length),
            self._slope_variance("end", at_end, self.slope_variance, length),
            at_end.loss,
            loss_variance,
        )
        return measure_alpha(self.iteration, length, start, end, tuple(map(float, lr)))

    def _slope_variance(self, role: str, at: Together, known: float | None, length: float) -> float | None:
        variance = self.end.slope_variance(role, at, known)
        if variance is None:
            return None
        sure = self.end.adds_up(role, at, length, self.tolerance)
        if sure is False:
            self.on_doubt()
        return variance if sure or (sure is None and not self.doubted) else None


def _divided(product: Any, *divisors: float) -> float:
    value = float(product)
    for divisor in divisors:
        value = math.nan if divisor == 0.0 else value / divisor
    return value
