"""What users are told while they train: warnings at their own line, a log, and what a scheduler prints as."""

import logging
import math
import re

import pytest
import torch
from torch import nn

from alpha_optim import (
    AlphaGuided,
    AlphaScheduler,
    Bounded,
    CalibrateThenAnneal,
    GuardEvent,
    Hold,
    OvershootBackoff,
    TargetAlpha,
    WithWarmup,
)


class OwnLoss(nn.Module):
    """A loss without ``reduction``."""

    def forward(self, output, target):
        return (output - target).square().mean()


class Centred(nn.Module):
    """Its samples interact: every output depends on the mean of all."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x - self.layer(x).mean())


def steps(count, optimizer, model, loss_fn, scheduler=None, between=lambda n: None):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2, generator=generator)
    for n in range(count):
        x = torch.randn(16, 4, generator=generator)
        optimizer.zero_grad()
        loss_fn(model(x), x @ weight).backward()
        optimizer.step()
        between(n)
        if scheduler is not None:
            scheduler.step()


def foreign_rate(optimizer, model, loss_fn):
    def halve(n):
        optimizer.param_groups[0]["lr"] *= 0.5

    steps(2, optimizer, model, loss_fn, AlphaScheduler(optimizer, Hold()), halve)


def past_the_horizon(optimizer, model, loss_fn):
    steps(5, optimizer, model, loss_fn, AlphaScheduler(optimizer, total_steps=3))


def forgotten_scheduler(optimizer, model, loss_fn):
    AlphaScheduler(optimizer, Hold())
    steps(12, optimizer, model, loss_fn)


def unused_loss(optimizer, model, loss_fn):
    steps(2, optimizer, model, nn.MSELoss())


def plainly(optimizer, model, loss_fn):
    steps(3, optimizer, model, loss_fn)


def with_adam(optimizer, model, loss_fn):
    optimizer.detach()
    steps(3, AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn), model, loss_fn)


LINEAR = (lambda: nn.Linear(4, 2), nn.MSELoss)


@pytest.mark.parametrize(
    ("train", "model", "loss_fn", "message"),
    [
        (foreign_rate, *LINEAR, "a learning rate was changed outside"),
        (past_the_horizon, *LINEAR, "more steps than total_steps=3"),
        (forgotten_scheduler, *LINEAR, r"without scheduler\.step\(\)"),
        (unused_loss, *LINEAR, "none of its calls was seen"),
        (plainly, LINEAR[0], OwnLoss, "gives no losses of single samples"),
        (with_adam, Centred, nn.MSELoss, "no slopes of single samples .* samples interact"),
    ],
)
def test_every_warning_names_the_users_own_line(train, model, loss_fn, message):
    model, loss_fn = model(), loss_fn()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = AlphaGuided(sgd, model, loss_fn, variance="exact")
    with pytest.warns(UserWarning, match=message) as caught:
        train(optimizer, model, loss_fn)
    assert [warning.filename for warning in caught] == [__file__] * len(caught)


def test_the_log_says_what_the_guard_did_and_which_rate_was_found(caplog):
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)), nn.MSELoss()
    optimizer = AlphaGuided(torch.optim.Adam(model.parameters(), lr=10.0), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=300)
    assert "searching the learning rate (jump), at 1e-07" in repr(scheduler)
    with caplog.at_level(logging.INFO, logger="alpha_optim"):
        steps(30, optimizer, model, loss_fn, scheduler)
        assert re.search(r"searching the learning rate \(\w+\), at ", repr(scheduler))
        steps(220, optimizer, model, loss_fn, scheduler)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("iteration")] == [str(event) for event in optimizer.guard_events]
    told = [text for _, text in scheduler.policy.story]
    assert [line for line in lines if line in told] == told
    (found,) = [line for line in lines if "the best rate is" in line]
    assert found in repr(scheduler)
    # Held, it is two thirds of what was found, until losses correct it.
    rate = float(re.search(r"the best rate is ([\d.e+-]+); ", found)[1])
    assert float(re.search(r"holds ([\d.e+-]+) since step", repr(scheduler))[1]) == pytest.approx(
        rate * 2 / 3, rel=0.01
    )


@pytest.mark.parametrize(
    ("loss_fn", "total_steps", "why"),
    [(None, 300, "no losses were seen that can be used"), (nn.MSELoss(), 60, "total_steps=60 is too short")],
)
def test_a_search_that_depends_on_the_initial_rate_says_so(caplog, loss_fn, total_steps, why):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.01), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=total_steps)
    steps(10, optimizer, model, nn.MSELoss() if loss_fn is None else loss_fn, scheduler)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert why in record.getMessage()
    assert "the rate given is kept" in record.getMessage()


@pytest.mark.parametrize(
    "policy",
    [
        Hold(),
        TargetAlpha(0.2, 0.05),
        OvershootBackoff(),
        Bounded(WithWarmup(TargetAlpha(), 10), 0.5, 2.0),
        WithWarmup(Bounded(OvershootBackoff(0.7, 0.4, certainty=1.0)), 5),
    ],
)
def test_a_policy_prints_as_the_call_that_builds_it(policy):
    again = eval(repr(policy))
    assert repr(again) == repr(policy)
    assert type(again) is type(policy)


def test_what_was_found_survives_a_resume():
    policy = CalibrateThenAnneal(1000)
    policy._phase, policy._envelope.found_at = None, 90
    policy._held.found, policy._held.position = math.log(0.5), math.log(0.25)
    other = CalibrateThenAnneal(1000)
    other.load_state_dict(policy.state_dict())
    assert other.calibrated
    assert (other._held.found, other._held.position) == (math.log(0.5), math.log(0.25))
    assert repr(other) == repr(policy)


def test_a_scheduler_that_searches_nothing_says_so_once(caplog):
    optimizer = AlphaGuided(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))
    AlphaScheduler(optimizer, TargetAlpha())
    assert not caplog.records
    optimizer.detach()
    AlphaScheduler(AlphaGuided(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)))
    (record,) = caplog.records
    assert "total_steps" in record.getMessage()
    assert "CalibrateThenAnneal" in record.getMessage()
    assert len(record.getMessage()) < 500


def test_a_policy_without_words_of_its_own_is_shown_by_its_name():
    def shy(measurement):
        return 1.0

    class Quiet:
        def __call__(self, measurement):
            return 1.0

    def wrapped():
        return AlphaGuided(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))

    for policy, name in ((shy, "shy"), (lambda m: 1.0, "<lambda>"), (Quiet(), "Quiet"), (Hold(), "Hold()")):
        assert repr(AlphaScheduler(wrapped(), policy)) == f"AlphaScheduler(learning rate 0.1, {name})"
        assert repr(AlphaScheduler(wrapped(), Bounded(policy))).endswith(f"Bounded({name}, 0.1, 10.0))")
        assert repr(AlphaScheduler(wrapped(), WithWarmup(policy, 5))).endswith(f"WithWarmup({name}, 5))")


def test_a_second_broken_batch_is_told_as_the_next_one_of_two():
    first = GuardEvent(4, "loss_not_finite", 1.0, math.nan, restored=False)
    second = GuardEvent(5, "loss_not_finite", 1.0, math.nan, restored=True, scale_factor=0.5)
    exploded = GuardEvent(9, "loss_rose", 1.0, 1e9, restored=True, scale_factor=0.5, skipped=False)
    assert "batch skipped" in str(first)
    assert "again, so the step before was taken back, learning rate times 0.5" in str(second)
    assert "again" not in str(exploded)
    assert "the step was taken back" in str(exploded)
