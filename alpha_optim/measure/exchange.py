"""Puts a rank's report together, has all of them added up, and learns from the sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alpha_optim.alpha.records import DropReason
from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.distributed import Ranks
from alpha_optim.measure.across_ranks import (
    RANKS,
    Centres,
    PairAcrossRanks,
    Report,
    Scatter,
    StartAcrossRanks,
    Together,
)
from alpha_optim.measure.iteration import Iteration, Task
from alpha_optim.measure.refresh import Variances
from alpha_optim.measure.step_ends import EndSeen
from alpha_optim.observe.backward_passes import gamma_of, inseparable, shares_of_one_mean
from alpha_optim.observe.numbers import Number, Truth, free_to_read, saved
from alpha_optim.observe.step_direction import Direction
from alpha_optim.slopes.base import SampleSlopes

TOLERANCE, TOLERANCE_HALF = 1e-2, 5e-2
"""Deviation of the mean over all samples from the slope of the gradients, relative to the slopes of samples, at which
they count as not adding up to the gradient, with parameters of 32 and of 16 bits; rounding in float32 is 1e-6."""


def tolerance_of(params: Sequence[Tensor]) -> float:
    """The tolerance for a model of these parameters."""
    half = any(param.dtype in (torch.float16, torch.bfloat16) for param in params)
    return TOLERANCE_HALF if half else TOLERANCE


class Exchange:
    """Talks to the other ranks of a run, once at every step that is measured or judged."""

    def __init__(self, ranks: Ranks, variances: Variances, on_doubt: Callable[[], None]) -> None:
        """Start with nothing known.

        Args:
            ranks: This process and the others.
            variances: Where the variances over all ranks' samples are kept.
            on_doubt: Called when samples do not add up to the gradient.

        Raises:
            ValueError: If there are more ranks than can be counted.
        """
        if ranks.size >= RANKS:
            raise ValueError(f"alpha can be measured over fewer than {RANKS} ranks, there are {ranks.size}")
        self.ranks, self._variances, self.on_doubt = ranks, variances, on_doubt
        self._centres: Centres | None = None
        self._doubted = False  # whether samples did not add up when all were looked at last
        self._unread: tuple[Task, Together, PairAcrossRanks | DropReason | None] | None = None

    def at_step(
        self, iteration: Iteration, seen: EndSeen | DropReason | None, guard: Report, read_now: bool
    ) -> tuple[Together, PairAcrossRanks | DropReason | None]:
        """Add up what all ranks have seen in an iteration, and put the step that ends in it together.

        Args:
            iteration: The iteration, whose step is about to be made.
            seen: What this rank has seen of the step that ends.
            guard: What its guard has seen.
            read_now: Whether somebody decides by the sums at once.

        Returns:
            The sums; and the pair, the reason why it is dropped, or None if there is none.
        """
        self._learn()
        ranks, variances = self.ranks, self._variances
        device = iteration.params[0].device
        if self._centres is None:  # the first time: the means first, then the scatter about them
            first = Together(ranks.sum(self._report(iteration, seen, guard).begins().packed(device)), ranks, Centres())
            _check(first.sums, ranks.size, begins=True)
            self._centres = first.next_centres(Centres())
        numbers = ranks.sum(self._report(iteration, seen, guard).packed(device))
        together = iteration.together = Together(numbers, ranks, self._centres)
        pair: PairAcrossRanks | DropReason | None = None
        if not isinstance(seen, EndSeen):
            pair = seen
        elif not isinstance(seen.start.point, StartAcrossRanks):
            pair = DropReason.OTHER_RANK  # the step was made before there were others
        else:
            pair = PairAcrossRanks(
                seen.start.iteration,
                seen.edited,
                seen.start.point,
                together,
                saved(variances.of_loss),
                saved(variances.of_slope("end")),
                seen.start.lr,
                tolerance_of(iteration.params),
                self.on_doubt,
                self._doubted,
            )
        self._unread = (iteration.task, together, pair)
        if read_now or iteration.task.due:  # else ranks add up while the next forward pass runs
            self._learn()
            iteration.loss = replace(iteration.loss, variance=variances.of_loss)
        return together, pair

    def start(
        self,
        iteration: Iteration,
        direction: Direction,
        product: Tensor,
        slopes: SampleSlopes | None,
        unseen: bool,
    ) -> StartAcrossRanks:
        """What this rank has seen at the start of a step; told to the others at its end.

        Args:
            iteration: The iteration in which the step was made.
            direction: The step.
            product: <d, gradient that the optimizer used>.
            slopes: Slopes of this rank's samples, None if they were not due or could not be had.
            unseen: Whether they were due and could not be had.
        """
        variances, together, gradients = self._variances, iteration.together, iteration.used_gradients
        assert together is not None
        assert gradients is not None
        centre = 0.0 if self._centres is None else self._centres.start
        return StartAcrossRanks(
            together,
            product,
            gradients.factor,
            gradients.lost,
            _scatter(slopes, direction, iteration, centre),
            unseen or inseparable(iteration.passes.reached),
            saved(variances.of_loss),
            saved(variances.of_slope("start")),
            (self.ranks.rank, self.ranks.size),
        )

    def after_last(self, loss: float | None, guard: Report, device: torch.device) -> Together:
        """Add up what the guards of all ranks have seen after the last step.

        Args:
            loss: A loss of this rank there, if there is one.
            guard: What its guard has seen.
            device: Where the parameters are.
        """
        report = replace(guard, loss_unseen=loss is None, gamma=1.0, loss=0.0 if loss is None else loss)
        return Together(self.ranks.sum(report.packed(device)), self.ranks, Centres())

    def _report(self, iteration: Iteration, seen: EndSeen | DropReason | None, guard: Report) -> Report:
        """Say what this rank has seen in an iteration."""
        loss, centres = iteration.loss, self._centres or Centres()
        nothing, single = iteration.without_data(), loss.individual
        if single is None and isinstance(seen, EndSeen) and seen.slopes is not None:
            single = seen.slopes.losses
        backend = iteration.task.backend
        refused = backend is not None and bool(backend.unaccounted.reasons)
        report = replace(
            guard,
            unpaired=True,
            loss_unseen=loss.mean is None and not nothing,
            losses_unseen=refused or not (loss.complete or single is not None or nothing),
            samples=float(loss.samples),
            gamma=self._weight(iteration),
            loss=0.0 if loss.mean is None else _plain(loss.mean) * _gamma(iteration),
            losses=Scatter.of(single, _share(iteration), centres.loss, loss.samples),
        )
        if not isinstance(seen, EndSeen) or not isinstance(seen.start.point, StartAcrossRanks):
            return report
        start, direction, factor = seen.start.point, seen.start.direction, self.ranks.factor
        return replace(
            report,
            unpaired=_either(seen.edited, start.lost),
            slopes_unseen=seen.unseen or start.unseen or inseparable(iteration.passes.reached),
            end=_scatter(seen.slopes, direction, iteration, centres.end),
            start=start.slopes,
            end_product=_plain(seen.product) * factor,
            start_product=_plain(start.sent) * factor,
            squared_length=_length(direction) ** 2 * factor,
        )

    def _weight(self, iteration: Iteration) -> Number:
        """What the loss of this rank counts for: Gamma, where ranks send means; of shares of one mean, one."""
        gamma = _gamma(iteration)
        if not shares_of_one_mean(iteration.passes.reached) or gamma == 1.0:
            return gamma
        # Shares of a mean over all ranks are multiplied by their number, since gradients are averaged afterwards.
        return gamma / self.ranks.size

    def _learn(self) -> None:
        """Take over what the last sums say about variances."""
        if self._unread is None:
            return
        (task, together, pair), self._unread = self._unread, None
        variances = self._variances
        _check(together.sums, self.ranks.size, begins=False)
        self._centres = together.next_centres(self._centres or Centres())
        for role in task.due:  # on all ranks alike, whatever one of them could not see
            variances.looked(role, task.number, together.samples // self.ranks.size)
        of_loss, of_start, of_end = map(
            saved, (variances.of_loss, variances.of_slope("start"), variances.of_slope("end"))
        )
        variances.saw_loss(together.loss_variance(of_loss))
        if together.sums.unpaired or not isinstance(pair, PairAcrossRanks):
            return  # nothing was learned of slopes, on any rank
        if not together.sums.squared_length:
            variances.look_again("start")
            variances.look_again("end")
            return
        length = math.sqrt(float(together.sums.squared_length))
        for role, at, known in (("end", together, of_end), ("start", pair.start.together, of_start)):
            sure = together.adds_up(role, at, length, pair.tolerance)
            self._doubted = self._doubted if sure is None else not sure
            if sure is False:
                self.on_doubt()
            variances.found(role, None if self._doubted else together.slope_variance(role, at, known))
        if self._doubted:
            variances.found("end", None)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        self._learn()
        return {"centres": to_plain(self._centres), "doubted": self._doubted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._unread = None
        self._centres = from_plain(Centres | None, state["centres"], "centres")
        self._doubted = bool(state.get("doubted", False))


def _check(sums: Report, size: int, begins: bool) -> None:
    """Make sure that all ranks begin, or all go on from a state: those that begin talk once more.

    Raises:
        RuntimeError: If they differ.
    """
    new = sums.beginners
    if new != (size if begins else 0):
        raise RuntimeError(
            f"{new} of {size} ranks begin to measure, and the others go on from a state that was loaded: load the "
            "state of the optimizer on every rank, or on none"
        )


def _plain(number: Number) -> Number:
    """A number as a float where that waits for nothing: arithmetic with tensors of one element is slow."""
    if isinstance(number, Tensor):
        return float(number) if free_to_read(number.device) else number.double()
    return number


def _length(direction: Direction) -> Number:
    """|d|; 0 where no parameter changed, whatever the rounding says."""
    moved, length = direction.moved, direction.length
    if isinstance(moved, Tensor):
        return torch.where(moved | ~torch.isfinite(length), length, torch.zeros_like(length))
    return _plain(length) if moved or not bool(torch.isfinite(length)) else 0.0


def _either(one: Truth, other: Truth) -> Truth:
    return one | other if isinstance(one, Tensor) else bool(one) | other if isinstance(other, Tensor) else one or other


def _gamma(iteration: Iteration) -> Number:
    """Factor with which this rank sends its mean loss backward; 1 where it was not seen, 0 without data."""
    gamma = gamma_of(iteration.passes.reached)
    if gamma is not None:
        return _plain(gamma)
    return 0.0 if iteration.without_data() else 1.0


def _share(iteration: Iteration) -> Number:
    """What the loss of one sample of this rank is multiplied by in what it sends backward."""
    return _gamma(iteration) / max(1, iteration.loss.samples)


def _scatter(slopes: SampleSlopes | None, direction: Direction, iteration: Iteration, centre: float) -> Scatter:
    """Scatter of the slopes of this rank's samples along d / |d|."""
    if slopes is None:
        return Scatter()
    # One is left out where random numbers were others: a sum of which samples are missing is compared otherwise.
    values = slopes.values if slopes.repeated else slopes.values[1:]
    return Scatter.of(values / direction.length.to(values.device), _share(iteration), centre, iteration.loss.samples)
