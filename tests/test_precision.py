"""Half precision: autocast, gradient scaling and 16-bit parameters; slopes are summed in at least float32."""

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided
from tests.test_transparency import equal_states

STEPS = 15
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 1, 4, 0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "recurrent": lambda: Recurrent(),
}
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(2, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cell(x.unflatten(1, (3, 2)))[0][:, -1])


def train(model, optimizer, loss_fn, autocast=None, scaled=False, dtype=torch.float32):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x, y = torch.randn(24, 6, generator=generator), torch.randint(0, 3, (24,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = loss_fn(model(x.to(dtype)), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def make(name, kind, wrapped=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model, loss_fn = MODELS[name]().to(dtype), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, AlphaGuided(optimizer, model, loss_fn, **options) if wrapped else optimizer, loss_fn


@pytest.mark.compatibility("Precision", "torch.amp autocast in bf16 and fp16, with a GradScaler")
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name, kind, precision):
    autocast, scaled = DTYPES[precision], precision == "fp16"
    bare, optimizer, loss_fn = make(name, kind, wrapped=False)
    train(bare, optimizer, loss_fn, autocast, scaled)
    model, guided, loss_fn = make(name, kind)
    train(model, guided, loss_fn, autocast, scaled)
    assert equal_states(bare.state_dict(), model.state_dict())
    history = guided.alpha_history
    assert len(history) == STEPS - 1
    assert {m.information for m in history} == {"full"}
    # The first step is the one in full precision up to the rounding of 16 bits, a loss scale or not.
    full_model, full, loss_fn = make(name, kind)
    train(full_model, full, loss_fn)
    one, other = history[0], full.alpha_history[0]
    assert one.loss_start == pytest.approx(other.loss_start, rel=0.01)
    assert one.slope_start == pytest.approx(other.slope_start, rel=0.05)
    assert one.slope_variance_start == pytest.approx(other.slope_variance_start, rel=0.2)


def first_step(name, precision, lr):
    torch.manual_seed(0)
    model, loss_fn = MODELS[name](), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=lr), model, loss_fn)
    x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))
    for _ in range(2):
        guided.zero_grad()
        with torch.autocast("cpu", dtype=DTYPES[precision]):
            loss = loss_fn(model(x), y)
        loss.backward()
        guided.step()
    return guided.alpha_history[0]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_with_steps_of_any_length(name, precision):
    """A step of 1e-9 is zero in float16, one of 1e5 infinite: the model is not differentiated along the step itself."""
    usual = first_step(name, precision, 1e-3)
    assert usual.slope_variance_start > 0.0
    for lr in (1e-6, 1e5):  # the first step of AdamW has one direction, whatever its length
        assert first_step(name, precision, lr).slope_variance_start == pytest.approx(
            usual.slope_variance_start, rel=0.1
        )
    tiny = first_step(name, precision, 1e-9)  # of which rounding leaves a part of the coordinates
    assert tiny.step_length > 0.0
    assert 0.0 < tiny.slope_variance_start < 1.0


class AutocastInside(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.float16):
            return self.body(x).float()


class WithAnEmptyParameter(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        self.nothing = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return super().forward(x) + self.nothing.sum()


def normed(width, layers):
    inner = [part for _ in range(layers) for part in (nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))]
    return nn.Sequential(nn.Linear(6, width), *inner, nn.Linear(width, 3))


@pytest.mark.parametrize(
    ("build", "lr"),
    [
        (lambda: normed(256, 6), 1e-3),  # the norms' weights are large, a step of all parameters must not be as large
        (lambda: AutocastInside(normed(16, 1)), 1e-8),  # that it computes in 16 bits is seen when it runs again
        (lambda: AutocastInside(WithAnEmptyParameter()), 1e-8),
    ],
    ids=["deep", "inside", "empty"],
)
def test_float16_in_deep_models_and_inside_of_models(build, lr):
    torch.manual_seed(0)
    model, loss_fn = build(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.Adam(model.parameters(), lr=lr), model, loss_fn)
    for _ in range(3):
        x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))
        guided.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16, enabled=not isinstance(model, AutocastInside)):
            loss = loss_fn(model(x), y)
        loss.backward()
        guided.step()
    assert [m.information for m in guided.alpha_history] == ["full", "full"]


@pytest.mark.compatibility("Precision", "parameters in bf16 and fp16")
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("variance", ["sampled", "exact"])
@pytest.mark.parametrize("name", ["linear", "convolution", "attention"])
def test_16_bit_parameters(name, variance, precision):
    dtype = DTYPES[precision]
    bare, optimizer, loss_fn = make(name, "sgd", wrapped=False, dtype=dtype)
    train(bare, optimizer, loss_fn, dtype=dtype)
    model, guided, loss_fn = make(name, "sgd", dtype=dtype, variance=variance)
    train(model, guided, loss_fn, dtype=dtype)
    assert equal_states(bare.state_dict(), model.state_dict())
    history = guided.alpha_history
    assert {m.information for m in history} == {"full"}
    # -lr times the gradient: its slope is minus its norm, exactly; float32 sums get four digits of it.
    for m in history:
        assert m.slope_start == pytest.approx(-m.step_length / 0.1, rel=1e-4)
