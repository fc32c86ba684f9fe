"""Loops of a small classifier that several tests vary."""

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided

FIELDS = ("alpha", "step_length", "slope_start", "slope_end", "slope_variance_start", "slope_variance_end")
KINDS = ["sgd", "momentum", "adam"]


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_batches(count, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def wrap(model, loss_fn, kind="sgd", **options):
    base = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.2),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=0.01),
    }[kind]()
    return AlphaGuided(base, model, loss_fn, **{"variance": "exact", **options})


def train(optimizer, model, loss_fn, batches):
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def plain_run(kind="sgd", batches=None, **options):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind, **options)
    train(guided, model, loss_fn, batches or make_batches(6))
    return guided


def check_same(a, b, fields=FIELDS, tolerance=1e-9):
    assert len(a) > 0
    for left, right in zip(a, b, strict=True):
        for name in fields:
            assert getattr(left, name) == pytest.approx(getattr(right, name), rel=tolerance), name
