"""When variances are measured anew, and which stand in between."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alpha_optim.measure.refresh import LONGEST, SHARE, Variances, interval
from alpha_optim.observe.backward_passes import loss_weight
from alpha_optim.slopes.base import scattered_as_all
from alpha_optim.slopes.layerwise import LayerwiseBackend

SIZES = [(2000, 1.0), (100, 1.0), (50, 0.0)]
"""Samples of micro-batches, and the factor with which each is sent backward."""


@pytest.mark.parametrize("cost", [0.001, 0.01, 0.5, 2.6, 4.9])
def test_the_share_of_the_training_time_is_kept(cost):
    """In the long run; below a step in a hundred they may be measured always."""
    gap = interval(cost)
    assert cost / gap <= SHARE + 1e-12
    assert gap == 1 or cost / (gap - 1) > SHARE
    assert interval(1e9) == LONGEST


def refreshed(variances, iterations, cost):
    """Iterations at which an end is measured, each time it is due."""
    found = []
    for n in iterations:
        if variances.due("start", n, cost):
            variances.measured("start", n, 1.0, 64)
            found.append(n)
    return found


def test_gaps_double_until_the_share_is_kept():
    found = refreshed(Variances(sampled=True), range(3000), cost=2.0)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert gaps[:8] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert set(gaps[8:]) == {interval(2.0)} == {200}


def test_with_all_samples_every_iteration_is_measured():
    assert refreshed(Variances(sampled=False), range(20), cost=2.0) == list(range(20))


def test_the_ends_are_measured_apart():
    variances = Variances(sampled=True)
    variances.measured("start", 0, 1.0, 64)
    assert variances.due("end", 0, 2.0)
    variances.measured("end", 1, 5.0, 64)
    assert (variances.of_slope("start"), variances.of_slope("end")) == (1.0, 5.0)


def test_going_back_in_iterations_measures_anew():
    """As after a state of an earlier iteration was loaded by hand."""
    variances = Variances(sampled=True)
    refreshed(variances, range(500), cost=2.0)
    assert not variances.due("start", 500, 2.0)
    assert variances.due("start", 3, 2.0)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_variance_that_is_not_finite_does_not_stand_for_later_steps(bad, as_tensor):
    value = torch.tensor(bad, dtype=torch.float64) if as_tensor else bad
    variances = Variances(sampled=True)
    variances.measured("start", 0, 3.0, 64)
    variances.measured("start", 1, value, 64)
    variances.saw_loss(2.0)
    variances.saw_loss(value)
    assert (float(variances.of_slope("start")), float(variances.of_loss)) == (3.0, 2.0)
    first = Variances(sampled=True)
    first.measured("start", 0, value, 64)
    assert not math.isfinite(float(first.of_slope("start")))  # there is nothing better


def test_what_could_not_be_had_is_not_what_was_had_before():
    variances = Variances(sampled=True)
    variances.measured("start", 0, 3.0, 64)
    variances.measured("start", 1, None, 64)
    assert variances.of_slope("start") is None
    variances.saw_loss(2.0)
    variances.saw_loss(None)
    assert variances.of_loss is None


def test_an_attempt_in_vain_is_made_again_at_once_and_what_is_known_stands():
    variances = Variances(sampled=True)
    refreshed(variances, range(100), cost=2.0)
    variances.missed()
    assert variances.due("start", 101, 2.0)
    assert variances.due("end", 101, 2.0)
    assert variances.of_slope("start") == 1.0
    variances.measured("start", 101, 2.0, 64)
    assert not variances.due("start", 102, 2.0)


def test_a_step_that_moved_nothing_is_looked_at_again_only_while_nothing_is_known():
    variances = Variances(sampled=True)
    variances.looked("start", 0, 64)
    variances.look_again("start")
    assert variances.due("start", 1, 2.0)
    variances.measured("start", 1, 3.0, 64)
    variances.measured("start", 2, 3.0, 64)
    variances.look_again("start")
    assert not variances.due("start", 3, 2.0)


def test_a_state_goes_on_where_it_was():
    variances = Variances(sampled=True)
    refreshed(variances, range(77), cost=2.0)
    variances.saw_loss(torch.tensor(0.5))
    variances.missed()
    other = Variances(sampled=True)
    other.load_state_dict(json.loads(json.dumps(variances.state_dict())))
    assert other.state_dict() == variances.state_dict()
    assert refreshed(other, range(77, 900), 2.0) == refreshed(variances, range(77, 900), 2.0)
    assert other.of_loss == 0.5
    variances.forget()
    assert variances.of_loss is None
    assert variances.due("start", 901, 2.0)


@pytest.mark.parametrize("layer", [nn.GRU(4, 3, batch_first=True), nn.Linear(4, 3)])
@pytest.mark.parametrize("checked", [True, False])
def test_who_measures_says_when_it_is_checked(layer, checked, monkeypatch):
    """The rules of layers where all have some, else the model as a whole."""
    backend = LayerwiseBackend(layer, {id(p): name for name, p in layer.named_parameters()}, 0, sampled=False)
    of_rules = isinstance(layer, nn.Linear)
    monkeypatch.setattr(backend._check, "due", lambda: checked == of_rules)
    monkeypatch.setattr(backend._forward, "check_due", lambda: checked != of_rules)
    assert backend.check_due() == checked


def test_some_samples_of_unequal_micro_batches_scatter_as_all_do():
    """The few that are looked at come from the first; a third, in which no target counts, weighs nothing."""
    torch.manual_seed(0)
    entries = [SimpleNamespace(samples=n, gamma=torch.tensor(g), again=False, calls=()) for n, g in SIZES]
    weights = [float(loss_weight(entry, entries)) for entry in entries]
    raw = [torch.randn(n, dtype=torch.float64) + 0.5 for n, _ in SIZES]
    every = torch.cat([numbers * weight for numbers, weight in zip(raw, weights, strict=True)])
    found = scattered_as_all([raw[0] * weights[0]], entries[:1], entries)
    assert len(found) == SIZES[0][0]
    assert float(found.mean()) == pytest.approx(float(every.mean()), abs=0.15)
    assert float(found.var()) == pytest.approx(float(every.var()), rel=0.2)
    assert float((raw[0] * weights[0]).var()) < 0.1 * float(every.var())
    alone = scattered_as_all([raw[2] * 0.0], entries[2:], entries)
    assert torch.equal(alone, torch.zeros(SIZES[2][0], dtype=torch.float64))
