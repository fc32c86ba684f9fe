"""What torch's own tests ask of an optimizer, asked of a wrapped one beside a bare one."""

import copy
import multiprocessing

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from alpha_optim import AlphaGuided, AlphaScheduler
from tests.test_transparency import equal_states


def make(wrap, lr=0.1, kind=torch.optim.AdamW):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 3))
    optimizer = kind(model.parameters(), lr=lr)
    loss_fn = nn.CrossEntropyLoss()
    return model, loss_fn, AlphaGuided(optimizer, model, loss_fn) if wrap else optimizer


def step(model, loss_fn, optimizer, x=None, y=None):
    optimizer.zero_grad()
    x = torch.randn(8, 6) if x is None else x
    loss_fn(model(x), x[:, :3].argmax(1) if y is None else y).backward()
    optimizer.step()


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_on_state_dicts_run_in_their_order_and_may_replace_the_state(wrap, prepend):
    model, loss_fn, optimizer = make(wrap)
    step(model, loss_fn, optimizer)
    order = []
    optimizer.register_state_dict_pre_hook(lambda o: order.append("pre 1"))
    optimizer.register_state_dict_pre_hook(lambda o: order.append("pre 2"), prepend=prepend)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": len(order)})
    handle = optimizer.register_load_state_dict_pre_hook(
        lambda o, state: {key: value for key, value in state.items() if key != "extra"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: order.append("loaded"))
    state = optimizer.state_dict()
    assert order == (["pre 2", "pre 1"] if prepend else ["pre 1", "pre 2"])
    assert state["extra"] == 2
    optimizer.load_state_dict(state)
    assert order[2:] == ["loaded"]
    handle.remove()
    step(model, loss_fn, optimizer)


class Odd:
    """No tensor."""


BAD_GROUPS = {
    "no dictionary": lambda model: [nn.Parameter(torch.ones(2))],
    "no tensor": lambda model: {"params": ["weight"]},
    "another object": lambda model: {"params": [Odd()]},
    "a set": lambda model: {"params": set(model.parameters())},
    "not a leaf": lambda model: {"params": [next(model.parameters()) * 2]},
    "there already": lambda model: {"params": list(model.parameters())},
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_bad_groups_are_refused_as_torch_refuses_them(name):
    errors = []
    for wrap in (False, True):
        model, _, optimizer = make(wrap)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - compared below
            optimizer.add_param_group(BAD_GROUPS[name](model))
        errors.append((type(caught.value), str(caught.value)[:30]))
        assert len(optimizer.param_groups) == 1
    assert errors[0] == errors[1]


SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_torch_on_a_wrapped_optimizer(name, as_tensor):
    """Rates and weights are those of the bare one."""
    ends = []
    for wrap in (False, True):
        model, loss_fn, optimizer = make(wrap, lr=torch.tensor(0.1) if as_tensor else 0.1)
        schedule = SCHEDULES[name](optimizer)
        rates = []
        for _ in range(10):
            step(model, loss_fn, optimizer)
            schedule.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        ends.append((rates, copy.deepcopy(model.state_dict())))
    assert ends[0][0] == ends[1][0]
    assert equal_states(ends[0][1], ends[1][1])


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_loaders_with_workers_of_their_own(context, steered):
    """Data come from other processes, started while training runs; nothing changes, and nothing hangs."""
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    ends = []
    for wrap in (False, True):
        model, loss_fn, optimizer = make(wrap)
        scheduler = AlphaScheduler(optimizer, total_steps=50) if wrap and steered else None
        x = torch.randn(64, 6)
        loader = DataLoader(
            TensorDataset(x, x[:, :3].argmax(1)), 8, shuffle=True, num_workers=2, multiprocessing_context=context
        )
        for inputs, targets in loader:
            step(model, loss_fn, optimizer, inputs, targets)
            if scheduler is not None:
                scheduler.step()
        ends.append((copy.deepcopy(model.state_dict()), torch.rand(2)))
        if wrap:
            assert len(optimizer.alpha_history) >= 4
    if not steered:
        assert equal_states(ends[0][0], ends[1][0])
        assert torch.equal(ends[0][1], ends[1][1])
