"""A point to return to when the loss has drifted up over many steps.

Single steps of small batches may each look harmless while the run diverges: per-sample losses of an
exploding network scatter as widely as they rise. So the loss is also watched in windows of `WINDOW`
steps. The best window so far is the good point. A window whose mean lies more than `DRIFT` usual
batch-to-batch deviations above it has diverged, whatever single steps say; so has one that lost `LOST` of
all progress since the first step, the second time in a row that this is more than `DRIFT` standard errors
of a window's mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alpha_optim.direction import copied

WINDOW = 10
DRIFT = 8.0
LOST = 0.9
PATIENCE = 10
"""After so many returns without progress in between the higher loss is accepted as the new level."""


class GoodPoint:
    """Parameters and buffers of the best window so far, and the window in progress."""

    def __init__(self) -> None:
        """Start with nothing kept."""
        self.tensors: list[Tensor] = []
        self._level: Tensor | None = None  # mean loss and batch-to-batch deviation of the good window [2]
        self._first: Tensor | None = None  # loss before the first step []
        self._lost_before = torch.zeros((), dtype=torch.bool)  # whether the last window had lost it all
        self._losses: list[Tensor] = []  # of the window in progress, on the device
        self._returns = 0

    def drifted(self, device: torch.device) -> Tensor | None:
        """Whether the window that is now complete has diverged ``[]``; None if none is complete."""
        if len(self._losses) < WINDOW or self._level is None or self._first is None:
            return None
        mean, _ = self._window()
        level, deviation = self._level
        far = torch.gt(mean, level + DRIFT * deviation)
        return (far | (self._lost(mean) & self._lost_before.to(mean.device))).to(device)

    def _lost(self, mean: Tensor) -> Tensor:
        """Whether a window of this mean lost almost all progress ``[]``."""
        if self._level is None or self._first is None:
            return torch.zeros((), dtype=torch.bool, device=mean.device)
        level, deviation = self._level
        rise, progress = mean - level, self._first.to(mean.device) - level
        certain = DRIFT / math.sqrt(WINDOW) * deviation
        # Where there was no progress yet there is none to lose.
        return torch.gt(rise, LOST * progress) & torch.gt(rise, certain) & torch.gt(progress, certain)

    def improved(self, device: torch.device) -> Tensor | None:
        """Whether the window that is now complete is the best so far ``[]``."""
        if len(self._losses) < WINDOW or self._level is None:
            return None
        return torch.lt(self._window()[0], self._level[0]).to(device)

    @torch.no_grad()
    def note(self, mean: Tensor, standard_error: Tensor | None, state: Sequence[Tensor]) -> None:
        """Take note of an accepted point; the first is the good point until a window is complete.

        Args:
            mean: Its mini-batch loss ``[]``.
            standard_error: Standard error of that, if known ``[]``.
            state: Parameters and buffers.
        """
        mean = mean.detach().double()
        if self._level is None:
            self._first = mean
            spread = 0.1 * mean.abs() if standard_error is None else standard_error.to(mean.device)
            self._level = torch.stack([mean, torch.maximum(spread, 0.02 * mean.abs())])
            self.keep(state)
        self._losses.append(mean)

    @torch.no_grad()
    def close_window(self, improved: bool, state: Sequence[Tensor]) -> None:
        """The window is complete and has not diverged: the best one becomes the good point."""
        mean, deviation = self._window()
        self._lost_before = self._lost(mean)
        if improved:
            self._level = torch.stack([mean, torch.maximum(deviation, 0.02 * mean.abs())])
            self.keep(state)
            self._returns = 0
        self._losses = []

    @torch.no_grad()
    def go_back(self, state: Sequence[Tensor], counts: bool = True) -> None:
        """Put the good point back, bit for bit; whether that counts against the patience."""
        self._returns += counts
        self._lost_before = torch.zeros((), dtype=torch.bool)
        for now, kept in zip(state, self.tensors, strict=True):
            now.copy_(kept)
        self._losses = []

    @torch.no_grad()
    def accept(self, state: Sequence[Tensor]) -> bool:
        """Whether patience is over; then the point reached becomes the good point."""
        if self._returns < PATIENCE:
            return False
        self.close_window(True, state)
        return True

    def levels(self) -> tuple[float, float]:
        """Loss of the good point and of the window in progress."""
        if self._level is None or not self._losses:
            return math.nan, math.nan
        return float(self._level[0]), float(self._recent().mean())

    def keep(self, state: Sequence[Tensor]) -> None:
        """Copy parameters and buffers."""
        self.tensors = copied(self.tensors, state)

    def _window(self) -> tuple[Tensor, Tensor]:
        losses = self._recent()
        return losses.mean(), losses.std()

    def _recent(self) -> Tensor:
        """Losses of the window in progress ``[n]``."""
        return torch.stack([loss.to(self._losses[0].device) for loss in self._losses])

    def state_dict(self) -> dict[str, Any]:
        """Return everything; tensors are copies."""
        return {
            "tensors": [tensor.clone() for tensor in self.tensors],
            "level": self._level,
            "first": self._first,
            "lost_before": self._lost_before,
            "losses": list(self._losses),
            "returns": self._returns,
        }

    def load_state_dict(self, state: dict[str, Any], like: Sequence[Tensor]) -> None:
        """Take over a state; tensors move to where ``like`` is."""
        if len(state["tensors"]) != len(like):
            return
        self.tensors = [kept.to(now.device) for kept, now in zip(state["tensors"], like, strict=True)]
        self._level, self._first = state["level"], state["first"]
        self._losses, self._lost_before = list(state["losses"]), state["lost_before"]
        self._returns = int(state["returns"])
