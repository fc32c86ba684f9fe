"""What users do to layers, gradients and parameters between steps, against one backward pass per sample."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from alpha_optim import AlphaGuided
from tests import zoo
from tests.reference.per_sample_loop import observe_run
from tests.test_per_sample_oracle import check, train

BACKENDS = pytest.mark.parametrize("backend", ["backpack", "layerwise"])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3)).double()


def make_batches(count, samples=6):
    torch.manual_seed(1)
    return [(torch.randn(samples, 40, dtype=torch.float64), torch.randint(3, (samples,))) for _ in range(count)]


def wrap(model, backend, lr=0.1):
    loss_fn = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    return loss_fn, AlphaGuided(sgd, model, loss_fn, backend=backend, variance="exact")


def oracle(model, batches, optimizer=torch.optim.SGD):
    bare = optimizer(model.parameters(), lr=0.1)
    return observe_run(model, zoo.cross_entropy_of_one, F.cross_entropy, bare, batches)


@BACKENDS
@pytest.mark.parametrize("kept", [0.94, 0.5])
def test_gradients_that_a_hook_of_the_user_masks(backend, kept):
    model, twin, batches = net(), net(), make_batches(5)
    mask = (torch.rand(30, 40) < kept).double()
    for some in (model, twin):
        some[0].weight.register_hook(lambda gradient: gradient * mask)
    loss_fn, guided = wrap(model, backend)
    check(train(guided, model, loss_fn, batches), oracle(twin, batches))


def test_clipping_by_value_does_not_cost_the_layers():
    model, twin, batches = net(), net(), make_batches(7)

    class Clipped(torch.optim.SGD):
        def step(self, closure=None):
            nn.utils.clip_grad_value_(self.param_groups[0]["params"], 0.01)
            return super().step(closure)

    loss_fn, guided = wrap(model, "layerwise")
    for x, y in batches:  # a warning would be an error here
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        guided.step()
    history = list(guided.alpha_history)
    assert len(history) == 5  # the first pair is dropped
    check(history, oracle(twin, batches, Clipped)[1:])
    assert guided._session.plan._built["layerwise"]._by_rules


def test_a_frozen_weight_whose_gradient_is_zeroed_in_place():
    model, batches = net(), make_batches(9)
    loss_fn, guided = wrap(model, "layerwise")
    for n, (x, y) in enumerate(batches):
        model[2].weight.requires_grad_(n not in (3, 4, 5))
        guided.zero_grad(set_to_none=False)
        loss_fn(model(x), y).backward()
        guided.step()
    assert all(m.information == "full" for m in guided.alpha_history)
    assert guided._session.plan._built["layerwise"]._by_rules


def test_a_parameter_used_outside_its_module_in_one_iteration():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.on = nn.Linear(40, 30), nn.Linear(30, 3), False

        def forward(self, x):
            h = self.a(x)
            return self.c((h + 3 * F.linear(x.flip(1), self.a.weight) if self.on else h).tanh())

    torch.manual_seed(0)
    model, batches = Sometimes().double(), make_batches(7)
    loss_fn, guided = wrap(model, "layerwise")
    with pytest.warns(UserWarning, match="not all of the loss that is sent backward"):
        for n, (x, y) in enumerate(batches):
            model.on = n == 3
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
            guided.alpha_history[-1:]
    known = [m.information == "full" for m in guided.alpha_history]
    assert known == [True, True, False, False, True, True]  # neither the end nor the start of iteration 3


@BACKENDS
def test_output_gradients_that_the_user_overwrites(backend):
    model = nn.Sequential(*list(net())[:-1], nn.Linear(30, 30).double())
    sgd, memory = torch.optim.SGD(model.parameters(), lr=0.1), torch.empty(6, 30).double()
    guided = AlphaGuided(sgd, model, backend=backend, variance="exact")
    for x, _ in make_batches(6):
        guided.zero_grad()
        model(x).backward(memory.copy_(torch.randn(6, 30)))
        guided.step()
    assert all(m.information == "slopes+variances" for m in guided.alpha_history)


@BACKENDS
def test_inputs_overwritten_without_torchs_knowledge(backend):
    model, twin, batches = net(), net(), make_batches(6)
    loss_fn, guided = wrap(model, backend)
    memory = torch.empty(6, 40, dtype=torch.float64)
    for x, y in batches:
        memory.numpy()[:] = x.numpy()
        guided.zero_grad()
        loss_fn(model(memory), y).backward()
        guided.step()
    check(list(guided.alpha_history), oracle(twin, batches))


@BACKENDS
@pytest.mark.parametrize("variance", ["exact", "sampled"])
def test_checkpoints_hold_no_data_of_the_user(backend, variance):
    data = torch.randn(50_000, 40, dtype=torch.float64)
    model, loss_fn = net(), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    guided = AlphaGuided(sgd, model, loss_fn, backend=backend, variance=variance)
    for n in range(3):
        guided.zero_grad()
        loss_fn(model(data[6 * n : 6 * n + 6]), torch.randint(3, (6,))).backward()
        guided.step()
    file = io.BytesIO()
    torch.save(guided.state_dict(), file)
    assert file.tell() < 100_000


@pytest.mark.parametrize("backend", ["backpack", "layerwise", "cached", "gradients"])
@pytest.mark.parametrize("taken_out", [True, False])
def test_parameters_taken_out_of_a_group_or_put_into_it(backend, taken_out):
    model = net()
    params, loss_fn = list(model.parameters()), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(params if taken_out else params[2:], lr=0.1)
    guided = AlphaGuided(sgd, model, loss_fn, backend=backend)
    for n, (x, y) in enumerate(make_batches(7)):
        if n == 3:
            sgd.param_groups[0]["params"][:] = params[2:] if taken_out else params
        model.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.alpha_history.dropped == {"parameters_changed": 2}
    assert [m.iteration for m in guided.alpha_history] == [0, 1, 4, 5]


@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
@pytest.mark.parametrize("backend", ["auto", "layerwise"])
def test_weights_made_by_hooks_of_old(kind, backend):
    def build():
        model = net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # weight_norm is deprecated, and used all the same
            if kind == "weight_norm":
                nn.utils.weight_norm(model[0])
            else:
                torch.manual_seed(3)
                prune.random_unstructured(model[0], "weight", 0.3)
        return model

    model, twin, batches = build(), build(), make_batches(5)
    loss_fn, guided = wrap(model, backend)
    check(train(guided, model, loss_fn, batches), oracle(twin, batches))
