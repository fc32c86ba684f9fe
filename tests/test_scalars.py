"""The same measurement with plain numbers (CPU) and with tensors (an accelerator, here played by the CPU)."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided
from alpha_optim.observe import scalars
from tests.test_cheap import OPTIMIZERS


@pytest.fixture
def accelerator(monkeypatch):
    """Reading costs something everywhere."""
    for module in ("observe.scalars", "observe.step_direction", "observe.some_elements", "measure.step_ends"):
        monkeypatch.setattr(f"alpha_optim.{module}.free_to_read", lambda device: False)


def train(name, steps=12, clip=None, **options):
    torch.manual_seed(0)
    model, loss_fn = (
        nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).double(),
        nn.CrossEntropyLoss(),
    )
    optimizer = AlphaGuided(OPTIMIZERS[name](model.parameters()), model, loss_fn, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if step == 7:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        for _ in range(2 if clip == "accumulate" else 1):
            x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 3, (10,), generator=generator)
            loss_fn(model(x), y).backward()
        if clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if clip == "value":
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
    return optimizer.alpha_history


@pytest.mark.parametrize("clip", [None, "norm", "value", "accumulate"])
@pytest.mark.parametrize("options", [{}, {"variance": "exact"}, {"backend": "gradients"}], ids=str)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_tensors_give_what_plain_numbers_give(name, options, clip, request):
    plain = train(name, clip=clip, **options)
    request.getfixturevalue("accelerator")
    waiting = train(name, clip=clip, **options)
    assert len(plain) >= 5
    assert waiting.iterations.tolist() == plain.iterations.tolist()
    assert waiting.dropped == plain.dropped
    for one, other in zip(plain, waiting, strict=True):
        assert one.status == other.status
        assert one.information == other.information
        for field in ("alpha", "alpha_std", "step_length", "slope_start", "slope_variance_end", "loss_end"):
            a, b = getattr(one, field), getattr(other, field)
            assert b == pytest.approx(a, rel=1e-9, abs=1e-12, nan_ok=True)


def test_a_quotient_by_zero_is_no_number():
    assert math.isnan(scalars.quotient(1.0, 0.0))
    assert scalars.quotient(torch.tensor(3.0), torch.tensor(2.0)) == 1.5


def test_a_small_tensor_holds_plain_numbers_tensors_and_gaps():
    mixed = scalars.small_tensor((1.5, None, torch.tensor(2.0), True), torch.device("cpu"))
    assert mixed.dtype == torch.float64
    assert mixed.nan_to_num(7.0).tolist() == [1.5, 7.0, 2.0, 1.0]
