"""Losses, gradients and parameters that are hostile: measuring must not raise, and must say what it is."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, AlphaStatus, CalibrateThenAnneal

LOSSES = {
    "inf": math.inf, "-inf": -math.inf, "nan": math.nan, "1e38": 1e38, "-1e12": -1e12, "denormal": 1e-44, "0": 0.0,
}  # fmt: skip
WHEN = {
    "always": lambda n: True, "at the start": lambda n: n < 3, "at the end": lambda n: n > 8,
    "every other": lambda n: n % 2 == 0, "once": lambda n: n == 5,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHIFTED = {
    "times 1": (1.0, 0.0), "plus 1e12": (1.0, 1e12), "minus 1e12": (1.0, -1e12), "constant": (0.0, 5.0),
    "plus inf": (1.0, math.inf), "times 1e38": (1e38, 0.0), "times 1e-44": (1e-44, 0.0),
}  # fmt: skip
STEPS = 12
ORDINARY = (AlphaStatus.MEASURED, AlphaStatus.ASCENT, AlphaStatus.CONCAVE)


class Hostile(nn.MSELoss):
    """A squared error that is multiplied and shifted when it is told to; by samples, too, so that the fit is full."""

    factor, offset = None, 0.0

    def forward(self, output, target):
        loss = super().forward(output, target)
        return loss if self.factor is None else loss * self.factor + self.offset


def watch(dtype, value, when, optimizer, steered=False, size=4, scale=1.0, offset=0.0, variance="sampled"):
    """A run in which the loss is now and then multiplied by a hostile number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    loss_fn = Hostile()
    base = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2)
    guided = AlphaGuided(base, model, loss_fn, variance=variance)
    scheduler = AlphaScheduler(guided, CalibrateThenAnneal(150)) if steered else None
    loss_fn.offset = offset
    generator = torch.Generator().manual_seed(0)
    for n in range(STEPS):
        x = torch.randn(size, 3, generator=generator).to(dtype)
        y = torch.randn(size, 1, generator=generator).to(dtype)
        loss_fn.factor = value if when(n) else None
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        if scheduler is not None:
            scheduler.step()
    if scheduler is not None:
        scheduler.finish()
    for m in guided.alpha_history:
        seen = (m.loss_start, m.loss_end, m.slope_start, m.slope_end)
        # Losses that are not seen are nan, and say nothing against the slopes.
        bad = any(math.isinf(value) for value in seen) or any(math.isnan(value) for value in seen[2:])
        assert not (bad and m.status is AlphaStatus.MEASURED), m
        assert math.isfinite(m.alpha) == (m.status not in (AlphaStatus.NOT_FINITE, AlphaStatus.DEGENERATE)), m
    ordinary = value == 1.0 and offset == 0.0 and scale == 1.0 and size > 1 and not steered
    if ordinary and dtype in (torch.float32, torch.float64):
        assert guided.alpha_history[-1].information == "full"
        assert all(m.status in ORDINARY for m in guided.alpha_history)
    if scheduler is not None:
        assert all(math.isfinite(rate) and rate >= 0.0 for rate in scheduler.get_last_lr())
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters()), "a parameter is not finite"


def complex_parameters():
    model = nn.Linear(3, 2).to(torch.complex64)
    guided = AlphaGuided(torch.optim.Adam(model.parameters(), lr=1e-2))
    for _ in range(5):
        guided.zero_grad()
        model(torch.randn(4, 3, dtype=torch.complex64)).abs().pow(2).mean().backward()
        guided.step()
    assert len(guided.alpha_history) == 4
    assert all(math.isfinite(m.alpha) for m in guided.alpha_history)


def checks():
    """Pairs of a name and a check."""
    made = [("complex parameters", complex_parameters)]
    for (name, value), (when, asked), optimizer, steered in itertools.product(
        LOSSES.items(), WHEN.items(), ("SGD", "AdamW"), (False, True)
    ):
        made.append(
            (
                f"loss times {name} {when}, {optimizer}, {'steered' if steered else 'watched'}",
                functools.partial(watch, torch.float32, value, asked, optimizer, steered),
            )
        )
    for (dtype, kind), (name, (factor, offset)), optimizer, steered, variance in itertools.product(
        DTYPES.items(), SHIFTED.items(), ("SGD", "AdamW"), (False, True), ("sampled", "exact")
    ):
        made.append(
            (
                f"{dtype}, loss {name}, {optimizer}, {'steered' if steered else 'watched'}, {variance}",
                functools.partial(
                    watch, kind, factor, WHEN["every other"], optimizer, steered, 8, 1.0, offset, variance
                ),
            )
        )
    for (dtype, kind), size, scale, optimizer in itertools.product(
        DTYPES.items(), (1, 4), (0.0, 1.0, 1e30), ("SGD", "AdamW")
    ):
        made.append(
            (
                f"{dtype}, batches of {size}, parameters times {scale:g}, {optimizer}",
                functools.partial(watch, kind, 1.0, WHEN["always"], optimizer, False, size, scale),
            )
        )
    return made
