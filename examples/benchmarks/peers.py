"""Methods that set their own rate, or that people take as they are, as their authors advise to use them."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR


class Setting(NamedTuple):
    """What a method is told of a run.

    Attributes:
        model: The network.
        loss_fn: Its loss function.
        steps: Optimizer steps of the run.
        others: Mini-batches beside those that are trained on, for a method that looks at more.
    """

    model: nn.Module
    loss_fn: nn.Module
    steps: int
    others: Iterator[tuple[Tensor, Tensor]]


class Peer(NamedTuple):
    """A method: its optimizer, and the schedule that its authors advise (None: a constant rate)."""

    build: Callable[[Setting], Any]
    schedule: Callable[[Any, int], LRScheduler] | None = None


class Gen:
    """AdamW whose rate a parabola through losses at three rates sets, every fourth step (`gen-optim`).

    Bu and Xu, ICLR 2025. It begins at the rate of its README and is told the horizon by a factor that falls linearly.
    """

    EVERY = 4

    def __init__(self, setting: Setting) -> None:
        self._setting, self._made = setting, 0
        self.base = torch.optim.AdamW(setting.model.parameters(), lr=1e-4)
        self.param_groups = self.base.param_groups

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def step(self) -> None:
        self._made += 1
        if self._made % self.EVERY == 0:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it could not fit
                package("GeN", "lr_parabola")(
                    self._setting.model,
                    self.base,
                    self._setting.loss_fn,
                    tr_iter=self._setting.others,
                    device="cpu",
                    task="image_cls",
                    scale=1.0 - self._made / self._setting.steps,
                )
        self.base.step()


def package(module: str, name: str) -> Any:
    """An optimizer of another package."""
    return getattr(importlib.import_module(module), name)


def _of(module: str, name: str, **options: Any) -> Callable[[Setting], Optimizer]:
    return lambda setting: package(module, name)(setting.model.parameters(), **options)


def _adamw(lr: float) -> Callable[[Setting], Optimizer]:
    return lambda setting: torch.optim.AdamW(setting.model.parameters(), lr=lr)


def _one_cycle(lr: float) -> Callable[[Any, int], LRScheduler]:
    return lambda optimizer, steps: OneCycleLR(optimizer, max_lr=lr, total_steps=steps)


PEERS: dict[str, Peer] = {
    "Prodigy": Peer(_of("prodigyopt", "Prodigy"), CosineAnnealingLR),
    "DAdaptAdam": Peer(_of("dadaptation", "DAdaptAdam"), CosineAnnealingLR),
    "DAdaptSGD": Peer(_of("dadaptation", "DAdaptSGD", momentum=0.9), CosineAnnealingLR),
    "MoMo": Peer(_of("momo", "Momo")),
    "GeN": Peer(Gen),
    "Prodigy + Schedule-Free": Peer(_of("prodigyplus", "ProdigyPlusScheduleFree")),
    "Schedule-Free AdamW, default": Peer(_of("schedulefree", "AdamWScheduleFree")),
    "Schedule-Free SGD, default": Peer(_of("schedulefree", "SGDScheduleFree")),
    "Adam, default": Peer(lambda setting: torch.optim.Adam(setting.model.parameters())),
    "AdamW 1e-3, cosine": Peer(_adamw(1e-3), CosineAnnealingLR),
    "AdamW 1e-3, OneCycle": Peer(_adamw(1e-3), _one_cycle(1e-3)),
    "AdamW 3e-3, OneCycle": Peer(_adamw(3e-3), _one_cycle(3e-3)),
    "ReduceLROnPlateau": Peer(lambda setting: torch.optim.SGD(setting.model.parameters(), lr=0.1, momentum=0.9)),
}
