"""The configurations that torch tests its optimizers with: wrapped and bare end bit for bit alike."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alpha_optim import AlphaGuided
from tests.conftest import DEVICE
from tests.test_transparency import equal_states

with warnings.catch_warnings():  # of what torch's own tests import
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import optim_db

STEPS = 20
SPARSE = {"SparseAdam"}


def configurations():
    """Each with the for-loop, foreach, fused and differentiable implementations it has on the device."""
    for info in optim_db:
        name = info.optim_cls.__name__
        for number, given in enumerate(info.optim_inputs_func(DEVICE)):
            for impl in ({}, *({flag: True} for flag in info.supported_impls), {"foreach": False}):
                if impl == {"foreach": False} and "foreach" not in info.supported_impls:
                    continue
                label = "-".join([name, str(number), *(f"{k}={v}" for k, v in impl.items())])
                yield pytest.param(info.optim_cls, {**given.kwargs, **impl}, id=label)


class Matrices(nn.Module):
    """Two matrices and, unless only matrices are allowed, biases."""

    def __init__(self, bias=True, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6, sparse=sparse)
        self.hidden = None if sparse else nn.Linear(6, 5, bias=bias)
        self.head = None if sparse else nn.Linear(5, 3, bias=bias)

    def forward(self, tokens):
        x = self.embedding(tokens).mean(1)
        return x[:, :3] if self.hidden is None else self.head(self.hidden(x).tanh())


def train(cls, options, wrapped):
    model, loss_fn = Matrices(bias=cls.__name__ != "Muon", sparse=cls.__name__ in SPARSE), nn.CrossEntropyLoss()
    optimizer = base = cls(model.parameters(), **copy.deepcopy(options))
    if wrapped:
        optimizer = AlphaGuided(base, model, loss_fn)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        if cls is torch.optim.LBFGS:  # on changing batches it goes to nan within a few steps
            generator.manual_seed(0)
        tokens = torch.randint(0, 7, (12, 4), generator=generator)
        target = torch.randint(0, 3, (12,), generator=generator)

        def closure(tokens=tokens, target=target):
            optimizer.zero_grad()
            loss = loss_fn(model(tokens), target)
            loss.backward()
            return loss

        optimizer.step(closure)
    return model, base, optimizer


@pytest.mark.compatibility(
    "torch.optim", "every optimizer in every configuration of torch's own test table, on the CPU: bit for bit"
)
@pytest.mark.parametrize(("cls", "options"), [c for c in configurations() if not c.values[1].get("differentiable")])
def test_wrapped_and_bare_are_alike(cls, options):
    bare_model, bare, _ = train(cls, options, wrapped=False)
    model, base, guided = train(cls, options, wrapped=True)
    assert equal_states(bare_model.state_dict(), model.state_dict())
    assert equal_states(bare.state_dict(), base.state_dict())
    history = guided.alpha_history
    assert len(history) + sum(history.dropped.values()) == STEPS - 1
    assert history.dropped == {}
    moved = [m for m in history if m.step_length > 0.0]
    assert all(math.isfinite(m.slope_start) for m in moved)


@pytest.mark.compatibility("torch.optim", "differentiable=True")
@pytest.mark.parametrize(("cls", "options"), [c for c in configurations() if c.values[1].get("differentiable")])
def test_differentiable_steps_too(cls, options):
    def run(wrapped):
        generator = torch.Generator().manual_seed(0)
        leaf = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        param = leaf.clone()
        param.retain_grad()
        base = cls([param], **copy.deepcopy(options))
        optimizer = AlphaGuided(base) if wrapped else base
        # One step: torch's own second one overwrites what the first needs for its derivative.
        param.grad = (F.normalize(param.detach()) + 0.1).requires_grad_()
        optimizer.step()
        param.square().sum().backward()
        return param.detach(), leaf.grad

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)
