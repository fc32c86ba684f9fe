"""Optimizers that are not torch's own: wrapped and bare end bit for bit alike, and alpha is measured."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from tests.test_transparency import equal_states

STEPS = 20


OPTIMIZERS = {
    "schedulefree.SGDScheduleFree": ("schedulefree", "SGDScheduleFree", {"lr": 0.5}),
    "schedulefree.AdamWScheduleFree": ("schedulefree", "AdamWScheduleFree", {"lr": 0.01, "warmup_steps": 3}),
    "schedulefree.RAdamScheduleFree": ("schedulefree", "RAdamScheduleFree", {"lr": 0.01}),
    "prodigyopt.Prodigy": ("prodigyopt", "Prodigy", {}),
    "dadaptation.DAdaptAdam": ("dadaptation", "DAdaptAdam", {}),
    "dadaptation.DAdaptSGD": ("dadaptation", "DAdaptSGD", {}),
    "pytorch_optimizer.Lion": ("pytorch_optimizer", "Lion", {"lr": 1e-3}),
    "pytorch_optimizer.Muon": ("pytorch_optimizer", "Muon", {}),
    "pytorch_optimizer.Lookahead": ("pytorch_optimizer", "Lookahead", {}),
    "momo.Momo": ("momo", "Momo", {"lr": 0.1}),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def make(name):
    module, cls, options = OPTIMIZERS[name]
    package = pytest.importorskip(module, reason=f"{module} is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    params = list(model.parameters())
    if cls == "Muon":  # matrices its own way, the rest by AdamW
        groups = [{"params": [p for p in params if (p.dim() == 2) is own], "use_muon": own} for own in (True, False)]
        return model, package.Muon(groups)
    if cls == "Lookahead":
        return model, package.Lookahead(torch.optim.AdamW(params, lr=0.01))
    return model, getattr(package, cls)(params, **options)


def train(model, optimizer, steps=STEPS, seed=0, toggle=False, loss_fn=None):
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    modes = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
    if modes:
        optimizer.train()
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x, y = torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        if "Momo" in repr(optimizer):
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        if toggle and modes and step % 5 == 4:
            optimizer.eval()
            model(x)
            optimizer.train()
    return modes


@pytest.mark.compatibility("Other packages", "Schedule-Free, Prodigy, D-Adaptation, Lion, Muon, Lookahead, MoMo")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wrapped_and_bare_are_alike(name):
    (bare_model, bare), (model, base) = make(name), make(name)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    train(bare_model, bare)
    train(model, guided, loss_fn=loss_fn)
    assert equal_states(bare_model.state_dict(), model.state_dict())
    assert equal_states(bare.state_dict(), base.state_dict())
    history = guided.alpha_history
    # Schedule-Free Adam uses the gradients as scratch memory: seen at the first step, copied from then on.
    assert history.dropped in ({}, {"gradients_modified": 1})
    assert len(history) + sum(history.dropped.values()) == STEPS - 1
    assert all(m.information == "full" for m in history)
    assert all(math.isfinite(m.slope_start) for m in history if m.step_length > 0.0)
    assert sum(m.status == "measured" for m in history) >= STEPS // 4


@pytest.mark.compatibility("Other packages", "Schedule-Free's train() and eval() modes, absent where there are none")
@pytest.mark.parametrize("name", ["schedulefree.SGDScheduleFree", "schedulefree.AdamWScheduleFree"])
def test_modes_are_forwarded(name):
    (bare_model, bare), (model, base) = make(name), make(name)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    assert train(bare_model, bare, toggle=True)
    assert train(model, guided, toggle=True, loss_fn=loss_fn)
    assert equal_states(bare_model.state_dict(), model.state_dict())
    # There and back again the weights differ in their last bits: those pairs are dropped, and no others.
    assert set(guided.alpha_history.dropped) <= {"parameters_changed", "gradients_modified"}
    assert len(guided.alpha_history) >= STEPS - 2 - STEPS // 5
    plain = AlphaGuided(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert not hasattr(plain, "train")
    assert not hasattr(plain, "eval")


@pytest.mark.parametrize("name", ["schedulefree.SGDScheduleFree", "prodigyopt.Prodigy"])
def test_rates_are_set_for_them_too(name):
    model, base = make(name)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: 0.5 if m.iteration == 3 else 1.0, guard=False)
    before = base.param_groups[0]["lr"]
    generator = torch.Generator().manual_seed(0)
    if hasattr(guided, "train"):
        guided.train()
    for _ in range(8):
        x, y = torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.5 * before)


@pytest.mark.compatibility("Other packages", "ReduceLROnPlateau and other schedulers on the wrapper")
def test_torch_schedulers_accept_the_wrapper():
    model, base = make("prodigyopt.Prodigy")
    guided = AlphaGuided(base, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(guided, 10)
    AlphaScheduler(guided, Hold(), schedule=schedule)
    assert guided.param_groups[0]["initial_lr"] == 1.0
