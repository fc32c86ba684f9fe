"""What was kept of an optimizer's state is put back into whatever is there by then."""

import pytest
import torch
from torch import nn

from alpha_optim.steer.point import OptimizerState, Point, copy_of, put_back


def test_a_tensor_of_the_same_make_is_written_to_in_place():
    now, kept = torch.zeros(3), torch.ones(3)
    assert put_back(now, kept, None) is now
    assert torch.equal(now, kept)


@pytest.mark.parametrize("now", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), None, 7.0, {"a": 1}])
def test_another_one_is_left_alone_and_a_copy_stands_in(now):
    kept, before = torch.ones(3), copy_of(now)
    found = put_back(now, kept, nn.Parameter(torch.zeros(3)))
    assert torch.equal(found, torch.ones(3))
    assert found.dtype == torch.float32
    assert found is not kept
    assert found is not now
    assert torch.equal(now, before) if isinstance(now, torch.Tensor) else now == before


def test_containers_are_those_that_were_kept_with_the_tensors_that_are_there():
    there = torch.zeros(2)
    found = put_back({"a": [there], "gone": 1}, {"a": [torch.ones(2)], "b": (3, 4)}, None)
    assert found["a"][0] is there
    assert found == {"a": [there], "b": (3, 4)}
    assert put_back([there, there], [torch.full((2,), 5.0)], None)[0] is not there


def make():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer


def step(model, optimizer, count=1):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()


def test_a_group_that_was_added_since_is_no_reason_to_mix_them_up():
    model, optimizer = make()
    step(model, optimizer)
    state = OptimizerState(optimizer)
    assert state.fits()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert not state.fits()


def test_a_point_that_does_not_fit_changes_nothing():
    model, optimizer = make()
    step(model, optimizer)
    params = list(model.parameters())
    point = Point(on_host=True, whole=True)
    point.keep(params, model, optimizer)
    step(model, optimizer, 3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    before = [param.detach().clone() for param in params]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    assert not point.restore([*params, optimizer.param_groups[1]["params"][0]], model)
    assert all(map(torch.equal, params, before))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
