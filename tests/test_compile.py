"""`torch.compile`: a compiled model and a compiled step give what they give without alpha.

With the "eager" backend, which traces and guards like any other but leaves the arithmetic alone, so that
results can be compared bit for bit; with Inductor where it matters that code draws random numbers of its own.
"""

import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

from alpha_optim import AlphaGuided
from tests.test_transparency import equal_states

STEPS = 30
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend="eager")


def train(net, loss_fn, optimizer, step=None, samples=12, further=None):
    """Train on random batches; ``further``: returns a term of the loss that the loss function does not see."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x, y = torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
        optimizer.zero_grad()
        loss = loss_fn(net(x), y)
        (loss if further is None else loss + further()).backward()
        (step or optimizer.step)()


def run(kind, wrapped=True, compile_model=False, compile_step=None, **options):
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), nn.CrossEntropyLoss()
    net = compiled(model) if compile_model else model
    optimizer = OPTIMIZERS[kind](model.parameters())
    if compile_step == "wrapped one's":
        optimizer.step = compiled(optimizer.step)
    if wrapped:
        optimizer = AlphaGuided(optimizer, net, loss_fn, **options)
    step = compiled(lambda: optimizer.step()) if compile_step == "wrapper's" else None
    train(net, loss_fn, optimizer, step)
    return model, optimizer


@pytest.mark.compatibility("torch.compile", "a compiled model")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("variance", ["sampled", "exact"])
def test_a_compiled_model(kind, variance):
    bare, _ = run(kind, wrapped=False, compile_model=True)
    _, expected = run(kind, variance=variance)
    torch._dynamo.utils.counters.clear()
    model, optimizer = run(kind, compile_model=True, variance=variance)
    assert equal_states(bare.state_dict(), model.state_dict())
    # The model as a whole is differentiated in place of its layers: the same up to rounding.
    for one, other in zip(optimizer.alpha_history, expected.alpha_history, strict=True):
        assert one.information == other.information == "full"
        assert one.slope_variance_end == pytest.approx(other.slope_variance_end, rel=1e-4)
        assert one.alpha == pytest.approx(other.alpha, rel=1e-4, abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (0, 1)  # no hook gets into the graph


@pytest.mark.compatibility("torch.compile", "model.compile()")
def test_a_model_compiled_in_place():
    def build(wrapped):
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), nn.CrossEntropyLoss()
        model.compile(backend="eager")
        call = model._compiled_call_impl
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer = AlphaGuided(optimizer, model, loss_fn) if wrapped else optimizer
        train(model, loss_fn, optimizer)
        if wrapped:
            optimizer.detach()
        assert model._compiled_call_impl is call
        return model, optimizer

    (bare, _), (model, optimizer) = build(False), build(True)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert {m.information for m in optimizer.alpha_history} == {"full"}
    with pytest.raises(ValueError, match="backend='cached' is impossible here: a compiled model"):
        AlphaGuided(torch.optim.Adam(model.parameters()), model, backend="cached")


@pytest.mark.compatibility("torch.compile", "the compiled model in the loop, the bare one given: slopes, and a warning")
def test_the_bare_model_given_and_the_compiled_one_called():
    model, loss_fn = nn.Linear(6, 3), nn.CrossEntropyLoss()
    net = compiled(model)
    optimizer = AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn)
    with pytest.warns(UserWarning, match="give AlphaGuided the very module that the loop calls"):
        for _ in range(6):
            optimizer.zero_grad()
            loss_fn(net(torch.randn(8, 6)), torch.randint(0, 3, (8,))).backward()
            optimizer.step()
    assert {m.information for m in optimizer.alpha_history} == {"slopes"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.compatibility("torch.compile", "a compiled step (alpha's part runs as it is)")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_compiled_step(kind):
    plain, expected = run(kind)
    model, optimizer = run(kind, compile_step="wrapper's")
    assert equal_states(plain.state_dict(), model.state_dict())
    assert repr(list(optimizer.alpha_history)) == repr(list(expected.alpha_history))


@pytest.mark.compatibility("torch.compile", "the wrapped optimizer's step compiled before wrapping")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_compiled_step_of_the_wrapped_optimizer(kind):
    bare, _ = run(kind, wrapped=False, compile_step="wrapped one's")
    model, optimizer = run(kind, compile_step="wrapped one's")
    assert equal_states(bare.state_dict(), model.state_dict())
    assert len(optimizer.alpha_history) == STEPS - 1


@pytest.fixture(scope="module")
def cache_of_its_own(tmp_path_factory):
    """Code and headers that were compiled for other kernels of the CPU have the same names, and do not fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        if hasattr(inductor, "cpp_cache_precompile_headers"):  # not before torch 2.8
            patch.setattr(inductor, "cpp_cache_precompile_headers", False)
        yield


class Dropping(nn.Module):
    """A layer that is worth compiling by itself: of torch's own ones the compiler leaves the code as it is."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, h):
        return nn.functional.dropout(self.linear(h).relu(), 0.3, self.training)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles for the CPU with g++")
@pytest.mark.compatibility("torch.compile", "dropout in code that Inductor has made, which draws other random numbers")
@pytest.mark.parametrize("part", ["model", "layer"])
@pytest.mark.usefixtures("cache_of_its_own")
def test_dropout_in_compiled_code(part):
    """No repetition drops the same units: slopes of samples are compared at the end of a step, but for chance."""

    def trained(wrapped, unseen=0.0):
        torch.manual_seed(0)
        dropping = Dropping()
        model, loss_fn = nn.Sequential(nn.Linear(6, 32), dropping, nn.Linear(32, 3)), nn.CrossEntropyLoss()
        if part == "layer":
            dropping.compile()
        net = torch.compile(model) if part == "model" else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = AlphaGuided(optimizer, net, loss_fn) if wrapped else optimizer
        train(net, loss_fn, optimizer, samples=48, further=lambda: unseen * sum(p.sum() for p in model.parameters()))
        return model, optimizer, torch.get_rng_state()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # of what the compiler imports
        bare, _, random = trained(wrapped=False)
        model, optimizer, same_random = trained(wrapped=True)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert torch.equal(random, same_random)
    assert {m.information for m in optimizer.alpha_history} == {"full"}
    with pytest.warns(UserWarning, match="not all of the loss that is sent backward"):
        _, optimizer, _ = trained(wrapped=True, unseen=3.0)
    assert {m.information for m in optimizer.alpha_history} == {"slopes"}
