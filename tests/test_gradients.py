"""Gradients as the backward passes leave them, whatever is done to them before the step."""

import math

import pytest
import torch
from torch import nn

from alpha_optim.observe.gradients import GradientHooks, Gradients, Habits


class Loop:
    """Takes the place of the iteration that the hooks report to."""

    def __init__(self, habits=None, **attach):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2))
        self.params, self.passes = list(self.model.parameters()), None
        self.habits, self.buffer, self.reached = habits or Habits(), [], 0
        self.hooks = GradientHooks(lambda: self)
        self.attach = attach
        self.begin()

    def begin(self):
        self.gradients = Gradients(self.habits, self.buffer)
        self.hooks.attach(self.params, self.gradients, self.attach.get("each"), late=self.attach.get("late", False))

    def backward_reached(self):
        self.reached += 1

    def backward_ended(self):
        self.gradients.backward_ended(look=True)

    def backward(self, scale=1.0):
        (self.model(torch.randn(8, 40)).square().mean() * scale).backward()
        self.true = [p.grad.clone() for p in self.params]

    def seen(self):
        return self.gradients.of_loss(self.params)


def test_untouched_gradients_are_those_of_the_loss():
    loop = Loop()
    loop.backward()
    found = loop.seen()
    assert found.factor is None
    assert found.lost is False
    assert all(a is p.grad for a, p in zip(found.tensors, loop.params, strict=True))
    assert found.intact()
    loop.params[0].grad.mul_(2.0)
    assert not found.intact()


@pytest.mark.parametrize("factor", [0.25, -3.0, 1e-6, 65536.0])
@pytest.mark.parametrize("how", ["in place", "new tensors", "data"])
def test_one_factor_is_found(factor, how):
    """As clipping by norm, unscaling and averaging leave gradients; also behind autograd's back."""
    loop = Loop()
    loop.backward()
    for p in loop.params:
        if how == "in place":
            p.grad.mul_(factor)
        elif how == "data":
            p.grad.data.mul_(factor)
        else:
            p.grad = p.grad * factor
    found = loop.seen()
    if how == "new tensors":  # what the backward pass left is there as it was
        assert found.factor is None or float(found.factor) == pytest.approx(1.0)
    else:
        assert float(found.factor) == pytest.approx(factor, rel=1e-5)
        assert not bool(found.lost)


@pytest.mark.parametrize("how", ["clipped by value", "noise", "one of them"])
def test_what_is_no_factor_is_told_and_copied_from_then_on(how):
    loop = Loop()
    loop.backward()

    def change():
        for k, p in enumerate(loop.params):
            if how == "clipped by value":
                p.grad.clamp_(-1e-3, 1e-3)
            elif how == "noise":
                p.grad.add_(torch.randn_like(p.grad))
            elif k == 0:
                p.grad.mul_(2.0)

    change()
    assert bool(loop.seen().lost)
    assert loop.habits.keep_copies
    loop.model.zero_grad()
    loop.begin()
    loop.backward()
    change()
    found = loop.seen()
    assert found.lost is False
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, loop.true, strict=True))


def test_what_is_changed_where_nobody_looks_is_seen_by_norms_once_gradients_are_written():
    """Elements that are not looked at: of the second change the norms tell."""
    loop = Loop()
    for _ in range(2):
        loop.model.zero_grad()
        loop.begin()
        loop.backward()
        largest = loop.params[0].grad.abs().max()
        loop.params[0].grad.clamp_(-0.99 * largest, 0.99 * largest)  # a few elements of 1,200
        found = loop.seen()
    assert loop.habits.compare_norms
    assert bool(found.lost) or found.lost is False  # copies by then
    if found.lost is False:
        assert torch.equal(found.tensors[0], loop.true[0])


def test_gradients_set_by_hand_are_taken_as_they_are():
    loop = Loop()
    for p in loop.params:
        p.grad = torch.ones_like(p)
    assert not loop.gradients.any_seen
    found = loop.seen()
    assert found.factor is None
    assert all(bool((t == 1).all()) for t in found.tensors)


def test_gradients_that_are_gone_or_not_finite_are_told():
    loop = Loop()
    loop.backward()
    assert not loop.gradients.gone()
    assert not loop.gradients.not_finite()
    loop.model.zero_grad()
    assert loop.gradients.gone()
    loop.begin()
    loop.backward(scale=float("inf"))
    assert loop.gradients.not_finite()
    loop.begin()
    loop.backward()
    loop.model.zero_grad(set_to_none=False)
    assert loop.gradients.gone()


def test_a_parameter_that_was_written_to_since_is_told():
    loop = Loop()
    loop.backward()
    assert not loop.gradients.params_edited(loop.params)
    with torch.no_grad():
        loop.params[1].add_(1.0)
    assert loop.gradients.params_edited(loop.params)


def test_every_pass_is_told_once_and_every_parameter_in_it():
    each = []
    loop = Loop(each=lambda p: each.append(id(p)))
    loop.backward()
    loop.backward()
    assert loop.reached == 2
    assert sorted(each) == sorted(2 * [id(p) for p in loop.params])
    late = []
    loop = Loop(each=lambda p: late.append(id(p)), late=True)
    loop.backward()
    assert sorted(late) == sorted(id(p) for p in loop.params)


def test_gradients_that_a_step_used_up_are_not_fresh():
    loop = Loop()
    assert not loop.hooks.fresh(loop.params)
    loop.backward()
    assert loop.hooks.fresh(loop.params)
    loop.hooks.step_done(loop.params)
    assert not loop.hooks.fresh(loop.params)
    assert loop.hooks.reused(loop.params)
    loop.backward()  # added to the same tensors
    assert loop.hooks.fresh(loop.params)


def test_hooks_are_put_where_gradients_can_come_and_taken_off():
    loop = Loop()
    loop.params[0].requires_grad_(False)
    loop.begin()
    loop.backward_ended = lambda: None
    assert not loop.params[0]._post_accumulate_grad_hooks
    assert all(p._post_accumulate_grad_hooks for p in loop.params[1:])
    loop.hooks.detach()
    assert not any(p._post_accumulate_grad_hooks for p in loop.params)


@pytest.mark.parametrize("compares", [False, True])
def test_one_element_that_is_not_finite_is_seen_though_gradients_were_clipped_since(compares):
    """As where a gradient scaler unscales, the loop clips, and the scaler then skips the step."""
    loop = Loop()
    loop.habits.compare_norms = compares
    loop.begin()
    place = (torch.tensor(3), torch.tensor(1))
    loop.model[0].weight.register_hook(lambda g: g.clone().index_put(place, torch.tensor(math.inf)))
    loop.backward()
    assert loop.gradients.not_finite()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
    assert loop.gradients.not_finite()
