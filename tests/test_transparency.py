"""Without a scheduler the wrapper changes nothing: bit for bit, for every optimizer of torch."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD for-loop": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "SGD maximize": lambda p: torch.optim.SGD(p, lr=0.01, maximize=True),
    "SGD tensor lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05)),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01)


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 3))


def train(model, optimizer, steps=8):
    loss_fn = optimizer_loss(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = torch.randn(10, 6, generator=generator), torch.randint(0, 3, (10,), generator=generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        if "LBFGS" in repr(optimizer):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return torch.random.get_rng_state()


def optimizer_loss(optimizer):
    session = getattr(optimizer, "_session", None) if isinstance(optimizer, AlphaGuided) else None
    return session.plan.loss_fn if session is not None and session.plan.loss_fn is not None else nn.CrossEntropyLoss()


def equal_states(a, b):
    if isinstance(a, torch.Tensor):
        if a.is_sparse or not a.is_floating_point():
            return torch.equal(a, b)
        # A run that diverges has nan in the same places.
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal_states, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return a == b


@pytest.mark.compatibility("torch.optim", "without a scheduler: parameters, buffers and random numbers bit for bit")
@pytest.mark.parametrize("given", ["optimizer", "model", "model and loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bit_for_bit_the_bare_optimizers(name, given):
    bare, guided = make_model(), make_model()
    one = OPTIMIZERS[name](list(bare.parameters()))
    arguments = {"optimizer": (), "model": (guided,), "model and loss": (guided, nn.CrossEntropyLoss())}[given]
    two = AlphaGuided(OPTIMIZERS[name](list(guided.parameters())), *arguments)
    torch.manual_seed(7)
    rng_bare = train(bare, one)
    torch.manual_seed(7)
    rng_guided = train(guided, two)
    assert torch.equal(rng_bare, rng_guided)
    assert equal_states(bare.state_dict(), guided.state_dict())
    ours = two.state_dict()
    ours.pop("alpha_guided")
    assert equal_states(one.state_dict(), ours)
    assert len(two.alpha_history) == 7
    expected = {"optimizer": "slopes", "model": "slopes+variances", "model and loss": "full"}[given]
    assert {m.information for m in two.alpha_history} == {expected}


@pytest.mark.compatibility("torch.optim", "sparse gradients")
def test_sparse_gradients_and_sparse_adam():
    def run(wrap):
        torch.manual_seed(0)
        model = nn.Embedding(20, 4, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
        optimizer = AlphaGuided(optimizer) if wrap else optimizer
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randint(0, 20, (8,))).square().sum().backward()
            optimizer.step()
        return model.weight.detach(), optimizer

    (bare, _), (guided, optimizer) = run(False), run(True)
    assert torch.equal(bare, guided)
    assert len(optimizer.alpha_history) == 4


@pytest.mark.compatibility("torch.optim", "complex parameters")
def test_complex_parameters():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    optimizer = AlphaGuided(torch.optim.SGD([weight], lr=0.1))
    target = torch.randn(4, dtype=torch.complex64)
    for _ in range(4):
        optimizer.zero_grad()
        (weight - target).abs().square().sum().backward()
        optimizer.step()
    # On the parabola |w - target|^2 a step of 0.1 times the gradient 2 (w - target) leaves 0.8 of the slope.
    assert optimizer.alpha_history.alphas == pytest.approx([-0.8] * 3, abs=1e-5)


def test_it_is_an_optimizer_and_shares_the_wrapped_ones_objects():
    model = make_model()
    base = torch.optim.Adam(model.parameters())
    guided = AlphaGuided(base, model)
    assert isinstance(guided, torch.optim.Optimizer)
    assert guided.optimizer is base
    assert guided.param_groups is base.param_groups
    assert guided.state is base.state
    assert guided.defaults is base.defaults
    base.load_state_dict(base.state_dict())  # torch replaces these objects here
    assert guided.param_groups is base.param_groups
    assert guided.state is base.state


def test_copies_and_pickles_of_the_model_carry_nothing_of_the_wrapper(tmp_path):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    clone = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for net in (clone, loaded):
        loss_fn(net(torch.randn(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
        assert "Session" not in repr(list(net[0]._forward_hooks.values()))
    train(model, guided)
    assert len(guided.alpha_history) == 7


@pytest.mark.parametrize("steered", [False, True])
def test_a_run_that_is_over_leaves_nothing_behind(steered):
    loss_fn, model = nn.MSELoss(), make_model()
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=100) if steered else None
    loss_fn(model(torch.randn(4, 6)), torch.zeros(4, 3)).backward()
    optimizer.step()
    gone = [weakref.ref(thing) for thing in (model, model[0].weight, optimizer, optimizer._session)]
    assert loss_fn._forward_hooks
    del model, optimizer, scheduler
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert not loss_fn._forward_hooks


def test_no_attribute_is_left_on_modules_or_parameters():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    before = [sorted(vars(m)) for m in model.modules()] + [sorted(vars(p)) for p in model.parameters()]
    with AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn) as guided:
        train(model, guided)
    after = [sorted(vars(m)) for m in model.modules()] + [sorted(vars(p)) for p in model.parameters()]
    assert before == after
    assert not any(m._forward_hooks or m._backward_hooks for m in [*model.modules(), loss_fn])
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_after_detach_the_wrapped_optimizer_steps_alone():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    train(model, guided, steps=3)
    guided.detach()
    before = model[0].weight.clone()
    train(model, guided, steps=3)
    assert len(guided.alpha_history) == 2
    assert not torch.equal(before, model[0].weight)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.compatibility("Process", "deepcopy and pickle of optimizer, model and scheduler")
def test_deepcopy_of_the_wrapper_goes_on_by_itself():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn)
    train(model, guided, steps=4)
    clone = copy.deepcopy(guided)
    twin = clone._session.plan.model
    assert twin is not model
    torch.manual_seed(1)
    train(model, guided, steps=3)
    torch.manual_seed(1)
    train(twin, clone, steps=3)
    assert torch.equal(model[0].weight, twin[0].weight)
    assert clone.alpha_history.alphas.tolist() == guided.alpha_history.alphas.tolist()


@pytest.mark.compatibility("Process", "step hooks, local and global: once, with the object they were registered on")
def test_step_hooks_run_once_and_the_wrappers_own_receive_the_wrapper():
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    guided = AlphaGuided(base, model)
    calls = []
    everywhere = register_optimizer_step_pre_hook(lambda opt, *_: calls.append("global"))
    guided.register_step_pre_hook(lambda opt, *_: calls.append(type(opt).__name__))
    base.register_step_post_hook(lambda opt, *_: calls.append(type(opt).__name__))
    try:
        train(model, guided, steps=1)
    finally:
        everywhere.remove()
    assert sorted(calls) == ["AlphaGuided", "SGD", "global"]


def test_what_the_wrapped_optimizer_lacks_the_wrapper_lacks_too():
    model = make_model()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1, fused=True), model)
    assert not hasattr(guided, "train")
    assert not hasattr(guided, "_step_supports_amp_scaling")  # or GradScaler leaves gradients scaled

    class WithModes(torch.optim.SGD):
        def train(self):
            return "training"

    assert AlphaGuided(WithModes(model.parameters(), lr=0.1)).train() == "training"


def test_global_state_is_left_as_found():
    import warnings

    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    from backpack.context import CTX

    filters, dtype, handles = list(warnings.filters), torch.get_default_dtype(), list(CTX.hook_handles)
    with AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn) as guided:
        train(model, guided)
        assert len(guided.alpha_history) == 7
    assert warnings.filters == filters
    assert torch.get_default_dtype() == dtype
    assert CTX.get_active_exts() == ()
    assert CTX.hook_handles == handles
