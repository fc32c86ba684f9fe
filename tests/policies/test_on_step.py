"""Policies that listen hear of every step, measured or not, with the loss that it was made from."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import (
    AlphaGuided,
    AlphaScheduler,
    Bounded,
    CalibrateThenAnneal,
    GuardEvent,
    WithWarmup,
)
from alpha_optim.observe import gradients as gradient_watch
from alpha_optim.policies import base

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


def train(model, criterion, optimizer, scheduler, steps=STEPS, learnable_from=math.inf, scheduled=1):
    """Returns losses and rates."""
    losses, rates = [], []
    for n in range(steps):
        x, y = batch(n)
        y = (x[:, 0] > 0).long() if n >= learnable_from else y
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if (n + 1) % scheduled == 0:
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


def test_a_policy_that_listens_only_need_not_answer():
    silent, answering = Listening(answer=None), Listening(answer=1.0)
    assert train(*build(silent)) == train(*build(answering))
    assert silent.told == answering.told


def test_without_a_guard_steps_are_told_without_losses():
    policy = Listening()
    train(*build(policy, guard=False))
    assert [n for n, _ in policy.told] == list(range(STEPS))
    assert all(math.isnan(loss) for _, loss in policy.told)


def test_a_scheduler_that_is_stepped_now_and_then_tells_of_all_steps():
    policy = Listening()
    losses, _ = train(*build(policy), scheduled=5)
    assert [n for n, _ in policy.told] == list(range(STEPS))
    assert [loss for _, loss in policy.told] == pytest.approx(losses, rel=1e-6)


def test_after_detach_there_are_no_losses_to_tell():
    policy = Listening()
    model, criterion, optimizer, scheduler = build(policy)
    train(model, criterion, optimizer, scheduler, steps=5)
    optimizer.detach()
    train(model, criterion, optimizer, scheduler, steps=5)
    assert [n for n, _ in policy.told] == list(range(10))
    assert [math.isnan(loss) for _, loss in policy.told] == [False] * 5 + [True] * 5


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


@pytest.mark.parametrize("answer", [0.0, -1.0, math.nan, math.inf, "2"])
def test_a_factor_that_is_none_is_refused(answer):
    with pytest.raises(ValueError, match=r"policy Listening returned .* for iteration 0; expected a finite"):
        train(*build(Listening(answer)), steps=1)


@pytest.mark.parametrize("anneal", [True, False])
def test_measuring_one_step_in_ten_finds_and_corrects_the_same_rates(anneal, caplog):
    """After the calibration the losses steer, and those the guard reads at every step."""
    runs = []
    for every in (1, None):
        policy = CalibrateThenAnneal(600, anneal=anneal)
        with caplog.at_level("INFO", logger="alpha_optim"):
            run = train(*build(policy, every=every, lr=1e-3), steps=600, learnable_from=0)
            runs.append((run, caplog.text))
            caplog.clear()
    assert runs[0] == runs[1]
    assert "the best rate is" in runs[0][1]


def saved_run(tmp_path, cut):
    """A run that is saved between the steps of optimizer and scheduler, and its rates from there on."""
    model, criterion, optimizer, scheduler = build(CalibrateThenAnneal(400), lr=1e-3)
    train(model, criterion, optimizer, scheduler, steps=cut)
    x, y = batch(cut)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    states = [part.state_dict() for part in (model, optimizer, scheduler)]
    torch.save(states, tmp_path / "run.pt")
    scheduler.step()
    return train(model, criterion, optimizer, scheduler, steps=60), optimizer.alpha_history


@pytest.mark.parametrize("scheduler_last", [True, False])
@pytest.mark.parametrize("cut", [30, 143, 150, 260])
def test_a_run_that_listens_resumes_bit_for_bit(cut, scheduler_last, tmp_path):
    expected, history = saved_run(tmp_path, cut)
    states = torch.load(tmp_path / "run.pt", weights_only=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    model.load_state_dict(states[0])
    criterion = nn.CrossEntropyLoss()
    base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer = AlphaGuided(base, model, criterion, every=None)
    if scheduler_last:
        optimizer.load_state_dict(states[1])
        scheduler = AlphaScheduler(optimizer, CalibrateThenAnneal(400))
    else:
        scheduler = AlphaScheduler(optimizer, CalibrateThenAnneal(400))
        optimizer.load_state_dict(states[1])
    scheduler.load_state_dict(states[2])
    scheduler.step()
    assert train(model, criterion, optimizer, scheduler, steps=60) == expected
    assert optimizer.alpha_history.iterations.tolist() == history.iterations.tolist()
    assert optimizer.alpha_history.alphas.tolist() == pytest.approx(history.alphas.tolist(), nan_ok=True, abs=0)


def test_steps_that_are_not_measured_look_at_no_gradients(monkeypatch):
    looked = []
    views = gradient_watch.Views
    monkeypatch.setattr(gradient_watch, "Views", lambda tensors: looked.append(1) or views(tensors))
    run = build(Listening())
    train(*run, steps=10)
    before = len(looked)
    train(*run, steps=1)  # iteration 10, the start of a pair
    assert len(looked) > before
    train(*run, steps=1)  # and its end
    before = len(looked)
    train(*run, steps=8)
    assert len(looked) == before


def test_bounds_do_not_take_back_what_the_guard_did():
    policy = Bounded(CalibrateThenAnneal(1000), 0.1, 10.0)
    policy.policy._done = True
    base.restore(policy, {**base.state_of(policy), "product": 10.0, "wanted": 30.0})
    event = GuardEvent(50, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5)
    base.tell_event(policy, event)
    assert [base.step_factor_of(policy, 50 + n, math.nan) for n in range(10)] == [1.0] * 10
