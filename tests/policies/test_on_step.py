"""Policies that listen hear of every step, measured or not, with the loss that it was made from."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, Bounded, CalibrateThenAnneal, WithWarmup

STEPS = 30


class Listening:
    """Measures one step in ten, and notes what it is told."""

    def __init__(self, answer=1.0):
        self.told, self.measured, self.answer = [], [], answer

    def __call__(self, m):
        self.measured.append((m.iteration, m.loss_start))
        return 1.0

    def on_step(self, iteration, loss):
        self.told.append((iteration, loss))
        return self.answer

    def wants(self, iteration):
        return iteration % 10 == 0


def build(policy, guard=True, loss_fn=True, every=None, lr=0.05):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    criterion = nn.CrossEntropyLoss()
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    guided = AlphaGuided(base, model, criterion if loss_fn else None, every=every)
    return model, criterion, guided, AlphaScheduler(guided, policy, guard=guard)


def batch(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(16, 5, generator=generator), torch.randint(0, 2, (16,), generator=generator)


def train(model, criterion, optimizer, scheduler, steps=STEPS):
    """Returns losses and rates."""
    losses, rates = [], []
    for n in range(steps):
        x, y = batch(n)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        rates.append(optimizer.param_groups[0]["lr"])
    return losses, rates


@pytest.mark.parametrize("around", [lambda policy: policy, lambda policy: WithWarmup(policy, 1), Bounded])
def test_every_step_is_told_with_its_loss_though_few_are_measured(around):
    policy = Listening()
    losses, _ = train(*build(around(policy)))
    assert [n for n, _ in policy.told][-STEPS + 1 :] == list(range(1, STEPS))  # a warm-up hides the first
    assert [loss for _, loss in policy.told][-STEPS + 1 :] == pytest.approx(losses[1:], rel=1e-6)
    assert [n for n, _ in policy.measured if n > 0] == [10, 20]


def test_without_a_guard_the_losses_are_those_of_the_measurements():
    policy = Listening()
    train(*build(policy, guard=False))
    known = [(n, loss) for n, loss in policy.told if not math.isnan(loss)]
    assert len(policy.told) == STEPS
    assert [(n - 1, loss) for n, loss in known] == policy.measured
    assert len(known) == 3


def test_where_nobody_reads_a_loss_it_is_nan():
    policy = Listening()
    train(*build(policy, loss_fn=False))
    assert [n for n, _ in policy.told] == list(range(STEPS))
    assert all(math.isnan(loss) for _, loss in policy.told)


def test_the_losses_of_all_micro_batches_count_but_not_those_whose_gradients_were_dropped():
    policy = Listening()
    model, criterion, optimizer, scheduler = build(policy)
    expected = []
    for n in range(STEPS):
        parts = []
        for part in range(3):
            if part == 1 and n % 2:  # the first gradients are thrown away
                optimizer.zero_grad()
                parts = []
            x, y = batch(10 * n + part)
            loss = criterion(model(x), y)
            loss.backward()
            parts.append(loss.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        expected.append(sum(parts) / len(parts))
    assert [loss for _, loss in policy.told] == pytest.approx(expected, rel=1e-6)


def test_a_step_that_was_not_made_is_not_told():
    policy = Listening()
    model, criterion, optimizer, scheduler = build(policy)
    for n in range(STEPS):
        x, y = batch(n)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if n % 3 == 2:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        scheduler.step()
    assert [n for n, _ in policy.told] == list(range(STEPS - STEPS // 3))


def test_its_answer_is_a_factor_like_that_for_a_measurement():
    _, rates = train(*build(Listening(0.9)))
    assert rates == pytest.approx([0.05 * 0.9 ** (n + 1) for n in range(STEPS)])
    _, rates = train(*build(Bounded(Listening(0.9), 0.5)))
    assert rates == pytest.approx([0.05 * max(0.5, 0.9 ** (n + 1)) for n in range(STEPS)])
    _, rates = train(*build(WithWarmup(Listening(0.9), 10)))
    assert rates[-1] == pytest.approx(0.05 * 0.9 ** (STEPS - 10))


@pytest.mark.parametrize("answer", [0.0, -1.0, math.nan, math.inf, None, "2"])
def test_a_factor_that_is_none_is_refused(answer):
    with pytest.raises(ValueError, match=r"policy Listening returned .* for iteration 0; expected a finite"):
        train(*build(Listening(answer)), steps=1)


@pytest.mark.parametrize("anneal", [True, False])
def test_measuring_one_step_in_ten_finds_and_corrects_the_same_rates(anneal):
    """After the calibration the losses steer, and those are read at every step."""
    runs = [
        train(*build(CalibrateThenAnneal(400, anneal=anneal), every=every, lr=1e-3), steps=400)
        for every in (1, None)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0][1])) > 100
