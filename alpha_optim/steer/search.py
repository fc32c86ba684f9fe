"""Whether a search for the rate goes on, and the points that it keeps: where trials begin, where the best one ended."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.observe.numbers import read
from alpha_optim.observe.some_elements import SomeElements
from alpha_optim.observe.step_direction import parameters_of, versions_of
from alpha_optim.policies.base import Place
from alpha_optim.steer.point import Point, all_finite

LOG = logging.getLogger(__name__)
EDIT = 1e-3
"""Parameters that lie so far from where they were, relative to their length, were edited; those that were exchanged
for others and came back (averages, Schedule-Free's two sets of weights) are the same but for rounding."""
Span = tuple[int, int]
"""First and last iteration of a trial."""


class Search:
    """Parameters, persistent buffers and the whole state of the optimizer at two points, in the memory of the CPU.

    Attributes:
        under_way: Whether a policy searches, so that hooks for accepted points sleep.
        trial: Whether the steps at hand belong to a trial, which the guard ends instead of lowering the rate.
    """

    def __init__(self, model: nn.Module | None, optimizer: Optimizer) -> None:
        """Start with nothing kept.

        Args:
            model: Model whose buffers belong to the points.
            optimizer: The optimizer.
        """
        self._model, self._optimizer = model, optimizer
        self.under_way = self.trial = False
        self._elements = SomeElements()
        # The parameters as the last step left them, by identity, version and some elements.
        self._left: tuple[list[int], list[int], Tensor] | None = None
        self._edited = False  # whether somebody has edited them since this search began
        self.forget()

    def goes_on(self, under_way: bool, trial: bool, over: bool) -> None:
        """Take note of how the search stands.

        Args:
            under_way: Whether it goes on.
            trial: Whether the coming steps belong to a trial.
            over: Whether it does not only wait: then no point is kept any longer.
        """
        self.under_way, self.trial = under_way, trial
        if over:
            self.forget()
            self._edited = False

    def step_made(self, elements: Tensor | None = None) -> None:
        """The optimizer has made a step: note where the parameters are.

        Args:
            elements: Some elements of them, if somebody has just looked.
        """
        self._left = None
        if self.under_way and not self._edited:
            params = parameters_of(self._optimizer)
            elements = self._elements.of(params) if elements is None else elements
            self._left = (list(map(id, params)), versions_of(params), elements)

    def was_edited(self) -> bool:
        """Whether somebody has changed the parameters since the last step (weights that were loaded, say).

        That is told once: a loop that does it again and again is one that clamps or exchanges weights.
        """
        left, self._left = self._left, None
        if left is None or not self.under_way:
            return False
        params = parameters_of(self._optimizer)
        ids, versions, before = left
        if ids == list(map(id, params)) and versions != versions_of(params):
            now, then = self._elements.of(params).double(), before.double()
            self._edited = now.shape == then.shape and bool(read([(now - then).norm() > EDIT * then.norm()])[0])
        return self._edited

    def forget(self) -> None:
        """Free the points."""
        self._points: dict[Place, Point] = {}
        self._begin = 0  # iteration at which the trial under way began
        self._best: Span | None = None

    def keep(self, place: Place, iteration: int) -> bool:
        """Keep the point reached before this iteration; a new start is that of a new search.

        Returns:
            Whether it is kept; not if there is no memory for it, or if a parameter is not finite there.
        """
        broken = not all_finite(parameters_of(self._optimizer))
        if place == "start":
            self.forget()
        if broken:  # the last step has just made it so, and the guard has not seen it yet
            return False
        if place == "start":
            LOG.info(
                "a search keeps up to two copies of parameters, buffers and optimizer state in the memory of the CPU"
            )
        point = self._points.setdefault(place, Point(on_host=True, whole=True))
        point.keep(parameters_of(self._optimizer), self._model, self._optimizer)
        if place == "best":
            self._best = (self._begin, iteration - 1)
        else:
            self._begin = iteration
        return bool(point)

    def restore(self, place: Place) -> bool:
        """Put a point back; False, and nothing is changed, if it is not there or does not fit."""
        point, self._left = self._points.get(place), None
        return point is not None and point.restore(parameters_of(self._optimizer), self._model)

    def abandoned(self, place: Place, iteration: int, before: list[Span]) -> list[Span]:
        """The trials that came to nothing, once a point is put back before this iteration; the next trial begins.

        Args:
            place: The point.
            iteration: The coming iteration.
            before: The trials that had come to nothing so far.
        """
        spans = [*before, (self._begin, iteration - 1)] if iteration > self._begin else list(before)
        self._begin = iteration
        return [span for span in spans if place != "best" or span != self._best]

    def state_dict(self) -> dict[str, Any]:
        """Return everything; tensors are copies.

        Points with a part of an optimizer's state are left out: one rank's file is loaded by all, and all must agree
        whether there is a point to go back to.
        """
        whole = {place: point for place, point in self._points.items() if point and not point.of_this_rank}
        return {
            "points": {place: point.state_dict() for place, point in whole.items()},
            "begin": self._begin,
            "best": to_plain(self._best),
            "edited": self._edited,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over a state; a point that does not fit is left out."""
        self.forget()
        self._left, self._edited = None, False  # what is loaded is no edit
        if state is None:
            return
        self._edited = bool(state.get("edited", False))
        for place, saved in state["points"].items():
            point = Point(on_host=True, whole=True)
            if point.load_state_dict(saved, parameters_of(self._optimizer), self._model, self._optimizer):
                self._points[place] = point
        self._begin = int(state["begin"])
        self._best = from_plain(Span | None, state["best"], "best")
