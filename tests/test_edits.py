"""What is written to parameters and gradients between passes and steps, and steps without a pass."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided
from alpha_optim.observe.some_elements import Views
from tests.loops import check_same, make_batches, make_model, plain_run, train, wrap


def test_gradients_altered_through_data_are_noticed():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    reference = plain_run("adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        for p in model.parameters():
            p.grad.data.mul_(0.5)  # Adam does not care, so the steps are the same
        guided.step()
    assert guided.alpha_history.dropped == {}
    check_same(guided.alpha_history, reference.alpha_history, ("slope_start", "slope_end"), tolerance=1e-5)


@pytest.mark.compatibility("Loops", "GANs: two networks, two optimizers")
def test_two_networks_trained_against_each_other():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    loss_fn = nn.BCEWithLogitsLoss()
    both = nn.ModuleList([generator, critic])
    d = AlphaGuided(torch.optim.SGD(critic.parameters(), lr=0.1), both, loss_fn, variance="exact")
    g = AlphaGuided(torch.optim.Adam(generator.parameters(), lr=0.01), both, loss_fn, variance="exact")
    real, fake = torch.ones(12, 1, dtype=torch.float64), torch.zeros(12, 1, dtype=torch.float64)
    for _ in range(5):
        noise = torch.randn(12, 4, dtype=torch.float64)
        d.zero_grad()
        (loss_fn(critic(torch.randn(12, 6, dtype=torch.float64)), real)
         + loss_fn(critic(generator(noise).detach()), fake)).backward()  # fmt: skip
        d.step()
        g.zero_grad()
        loss_fn(critic(generator(noise)), real).backward()  # also reaches the critic, whose next step clears it
        g.step()
    for guided in (d, g):
        assert [m.information for m in guided.alpha_history] == ["full"] * 4
        assert guided.alpha_history.dropped == {}


@pytest.mark.compatibility("Loops", "parameters edited between steps: that pair is dropped")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("how", ["no_grad", "data", "load_state_dict"])
def test_parameters_edited_between_steps_drop_the_pair(kind, how):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    for k, (x, y) in enumerate(make_batches(6)):
        if k == 3:
            if how == "no_grad":
                with torch.no_grad():
                    model[0].weight.add_(0.01)
            elif how == "data":
                model[0].weight.data.mul_(1.01)
            else:
                model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.alpha_history.iterations.tolist() == [0, 1, 3, 4]
    assert guided.alpha_history.dropped == {"parameters_changed": 1}


@pytest.mark.compatibility("Loops", "weights swapped for an evaluation (EMA)")
def test_weights_swapped_and_swapped_back_drop_nothing():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    for x, y in make_batches(5):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        own = copy.deepcopy(model.state_dict())
        model.load_state_dict({name: value * 0.0 for name, value in own.items()})
        with torch.no_grad():
            loss_fn(model(x), y)
        model.load_state_dict(own)
    assert len(guided.alpha_history) == 4


@pytest.mark.parametrize("edit", ["flip", "negate"])
def test_edits_that_keep_every_norm_are_noticed_too(edit):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    for k, (x, y) in enumerate(make_batches(5)):
        if k == 2:
            with torch.no_grad():
                weight = model[2].weight
                weight.copy_(weight.flip(0) if edit == "flip" else -weight)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.alpha_history.iterations.tolist() == [0, 2, 3]


def test_foreign_weights_during_the_pass_drop_both_pairs():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided, other = wrap(model, loss_fn), make_model(5).state_dict()
    for k, (x, y) in enumerate(make_batches(6)):
        own = copy.deepcopy(model.state_dict())
        if k == 3:
            model.load_state_dict(other)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        model.load_state_dict(own)
        guided.step()
    assert 2 not in guided.alpha_history.iterations
    assert 3 not in guided.alpha_history.iterations


def test_a_parameter_edited_between_backward_and_step_drops_the_pair_that_starts_there():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    for k, (x, y) in enumerate(make_batches(6)):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        if k == 3:
            with torch.no_grad():
                model[0].weight.add_(0.01)
        guided.step()
    assert guided.alpha_history.iterations.tolist() == [0, 1, 2, 4]
    assert guided.alpha_history.dropped == {"parameters_changed": 1}


@pytest.mark.compatibility("Loops", "step() before any backward pass")
def test_step_without_backward_is_allowed():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    guided.step()
    (x, y), *_ = make_batches(1)
    loss_fn(model(x), y).backward()
    guided.step()
    guided.step()  # with the old gradients, as torch allows
    assert guided.iteration == 3
    assert len(guided.alpha_history) == 0
    assert guided.alpha_history.dropped["no_backward"] >= 2


def test_gradients_set_by_hand_are_measured():
    weight = nn.Parameter(torch.tensor([4.0, 2.0], dtype=torch.float64))
    guided = AlphaGuided(torch.optim.SGD([weight], lr=0.25))
    for _ in range(4):
        weight.grad = 2.0 * weight.detach()  # of |w|^2
        guided.step()
    assert guided.alpha_history.alphas == pytest.approx([-0.5] * 3)


def test_frozen_and_unused_parameters_are_allowed():
    model = make_model()
    model.add_module("unused", nn.Linear(3, 3).double())
    used = nn.Sequential(model[0], model[1], model[2])
    model[0].bias.requires_grad_(False)
    loss_fn = nn.CrossEntropyLoss()
    for build in (lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p)):
        guided = AlphaGuided(build(list(model.parameters())), model, loss_fn, variance="exact")
        train(guided, used, loss_fn, make_batches(4))
        assert [m.information for m in guided.alpha_history] == ["full"] * 3
        guided.detach()


@pytest.mark.compatibility("Loops", "requires_grad toggled in mid-run")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_requires_grad_toggled_in_mid_run(kind):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    for k, (x, y) in enumerate(make_batches(8)):
        if k == 3:
            model[0].weight.requires_grad_(False)
        if k == 5:
            model[0].weight.requires_grad_(True)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert len(guided.alpha_history) >= 6


class DecaysIntoTheGradient(torch.optim.Optimizer):
    """As optimizers of some years ago were written: weight decay goes into the gradient, through ``.data``."""

    def __init__(self, params, lr=0.1, decay=0.5):
        super().__init__(params, {"lr": lr, "decay": decay})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                gradient = param.grad.data
                gradient.add_(param.data, alpha=group["decay"])
                param.data.add_(gradient, alpha=-group["lr"])


class ClipsAround(torch.optim.Optimizer):
    """Clips the gradients of an optimizer of torch's that it holds."""

    def __init__(self, params):
        self.optimizers = [torch.optim.SGD(params, lr=0.1)]
        super().__init__(self.optimizers[0].param_groups, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.data.clamp_(-0.01, 0.01)
        self.optimizers[0].step()


@pytest.mark.parametrize("kind", [DecaysIntoTheGradient, ClipsAround])
def test_an_optimizer_that_writes_into_gradients_behind_their_versions_costs_one_measurement(kind):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(kind(model.parameters()), model, loss_fn, variance="exact")
    products = []
    for x, y in make_batches(6):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        guided.step()
        step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        products.append(float(gradient @ step / step.norm()))
    history = guided.alpha_history
    assert history.dropped == {"gradients_modified": 1}
    assert {m.information for m in history} == {"full"}
    assert [m.slope_start for m in history] == pytest.approx(products[1:5], rel=1e-9)


class Elsewhere(torch.Tensor):
    """Numbers that say they lie on a device."""

    is_cpu = False


@pytest.fixture
def on_a_device(monkeypatch):
    """Nothing is free to read."""
    for name, module in list(sys.modules.items()):
        if name.startswith("alpha_optim.") and hasattr(module, "free_to_read"):
            monkeypatch.setattr(module, "free_to_read", lambda device: False)
    now = Views.now
    monkeypatch.setattr(Views, "now", lambda self: torch.Tensor._make_subclass(Elsewhere, now(self)))


@pytest.mark.parametrize("model_given", [False, True])
def test_gradients_scaled_behind_their_versions_from_some_step_on(model_given, on_a_device):
    """A gradient scaler's unscaling counts no versions, and its scale may be 1 at first."""
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    given = (model, loss_fn) if model_given else ()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), *given)
    products = []
    for k, (x, y) in enumerate(make_batches(12)):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
        if k > 3:
            for p in model.parameters():
                p.grad.data.mul_(0.5)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        guided.step()
        step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        products.append(float(gradient @ step / step.norm()))
    assert guided.alpha_history.dropped == {}
    assert [m.slope_start for m in guided.alpha_history] == pytest.approx(products[:11], rel=1e-6)


def test_an_optimizer_that_begins_to_write_into_gradients_is_noticed_at_the_next_refresh(on_a_device):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    optimizer = DecaysIntoTheGradient(model.parameters(), decay=0.0)
    guided = AlphaGuided(optimizer, model, loss_fn)
    for k, (x, y) in enumerate(make_batches(60)):
        guided.param_groups[0]["decay"] = 0.5 if k > 8 else 0.0
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    history = guided.alpha_history
    assert (
        1 <= sum(m.status == "gradients_modified" for m in history) + history.dropped.get("gradients_modified", 0) < 20
    )
    assert history[-1].iteration == 58


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("given", ["optimizer", "model", "all"])
@pytest.mark.parametrize("uncleared", [{1}, {2}, {3}, {2, 3}, set(range(1, 6))])
@pytest.mark.parametrize("again", [False, True])
def test_gradients_that_are_added_to_those_of_the_step_before(kind, given, uncleared, again):
    """They are no gradients of the loss: every pair that is left is right, and it is told why others are missing."""
    torch.manual_seed(0)
    model, loss_fn = torch.nn.Linear(3, 2).double(), torch.nn.CrossEntropyLoss()
    x, y = torch.randn(6, 5, 3).double(), torch.randint(0, 2, (6, 5))
    base = torch.optim.SGD(model.parameters(), lr=0.5) if kind == "sgd" else torch.optim.Adam(model.parameters())
    guided = AlphaGuided(base, *{"optimizer": (), "model": (model,), "all": (model, loss_fn)}[given])
    begin = copy.deepcopy([part.state_dict() for part in (model, guided)])

    def train():
        step, found = None, {}
        for n in range(6):
            if n not in uncleared:
                guided.zero_grad()
            loss = loss_fn(model(x[n]), y[n])
            if step is not None:
                gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                length = math.sqrt(sum(float(d.square().sum()) for d in step))
                found[n - 1] = sum(float((d * g).sum()) for d, g in zip(step, gradients, strict=True)) / length
            before = [p.detach().clone() for p in model.parameters()]
            loss.backward()
            guided.step()
            step = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        return found

    with pytest.warns(UserWarning, match=r"optimizer\.zero_grad\(\) was not called"):
        found = train()
    if again:  # gradients and what was seen of them are there from before
        for part, state in zip((model, guided), begin, strict=True):
            part.load_state_dict(state)
        assert train() == found
    lost = {n for at in uncleared for n in (at - 1, at)}
    assert guided.alpha_history.iterations.tolist() == sorted(set(range(5)) - lost)
    assert guided.alpha_history.dropped == {"gradients_modified": len(lost)}
    for m in guided.alpha_history:
        assert m.slope_end == pytest.approx(found[m.iteration], rel=1e-9)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("given", "clear", "others"),
    [
        (given, clear, others)
        for given in (True, False)
        for clear in ("none", "in place", "data", "foreach")
        for others in (True, False)
        if not (given and clear == "data" and others)  # both passes seem to be of one step, which is said
    ],
)
def test_gradients_that_were_cleared_in_any_way_are_no_old_ones(kind, given, clear, others):
    """Also after a pass between two steps (a second network's, a probe) has been added to those of the step."""
    torch.manual_seed(0)
    model, loss_fn = torch.nn.Linear(3, 2).double(), torch.nn.CrossEntropyLoss()
    base = torch.optim.SGD(model.parameters(), lr=0.1) if kind == "sgd" else torch.optim.Adam(model.parameters())
    guided = AlphaGuided(base, *((model,) if given else ()))
    for _ in range(8):
        if others:
            model(torch.randn(4, 3).double()).square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if clear == "data":
            for gradient in gradients:
                gradient.data.zero_()
        elif clear == "foreach" and gradients:
            torch._foreach_zero_(gradients)
        else:
            model.zero_grad(set_to_none=clear == "none")
        loss_fn(model(torch.randn(5, 3).double()), torch.randint(0, 2, (5,))).backward()
        guided.step()  # a warning would be an error here
    dropped = guided.alpha_history.dropped
    # Of plain SGD the gradients of the step are the step: where others are added to them it may be lost.
    assert dropped == {} or (kind == "sgd" and set(dropped) == {"direction_overwritten"})
    assert len(guided.alpha_history) + sum(dropped.values()) == 7
    assert len(guided.alpha_history) >= 5
