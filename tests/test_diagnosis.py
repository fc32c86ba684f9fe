"""Advice is given only where the data tell."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaHistory, GuardEvent, Observation, measure_alpha
from alpha_optim.diagnosis import diagnose


def history(alpha, count=100, spread=0.3, losses=None, samples=8):
    rng = np.random.default_rng(0)
    filled = AlphaHistory()
    for n in range(count):
        start = -1.0 + 0.1 * rng.normal()
        loss = None if losses is None else losses(n) + 0.05 * rng.normal()
        ends = (
            Observation(samples, start, None, loss),
            Observation(samples, alpha + spread * rng.normal(), None, loss),
        )
        filled.append(measure_alpha(n, 1.0, *ends, (0.1,)))
    return filled


@pytest.mark.parametrize(
    ("alpha", "verdict"), [(-0.7, "undershooting"), (0.3, "balanced"), (1.5, "overshooting"), (0.0, "unknown")]
)
def test_verdicts(alpha, verdict):
    said = diagnose(history(alpha))
    assert said.verdict == verdict
    assert said.alpha == pytest.approx(alpha, abs=0.1)
    assert said.suggested_lr is None
    assert str(said).startswith(f"{verdict}: ")
    assert f"over {said.count} steps" in str(said)


def test_near_zero_is_balanced_for_large_batches_and_says_nothing_for_small_ones():
    assert diagnose(history(0.0, samples=64)).verdict == "balanced"
    assert diagnose(history(0.0, samples=8)).verdict == "unknown"
    assert diagnose(history(-0.3, samples=64)).verdict == "undershooting"


def test_too_few_or_too_noisy_measurements_tell_nothing():
    assert diagnose(AlphaHistory()).verdict == "unknown"
    assert diagnose(history(-0.7, count=10)).verdict == "unknown"
    assert diagnose(history(-0.2, spread=5.0)).verdict == "unknown"


def test_a_rising_loss_is_diverging_whatever_alpha_says():
    assert diagnose(history(0.2, losses=lambda n: 1.0 + 0.02 * n)).verdict == "diverging"
    assert diagnose(history(0.2, losses=lambda n: 3.0 - 0.02 * n)).verdict == "balanced"


def test_a_loss_that_is_not_finite_is_diverging():
    filled = history(0.2)
    filled.append(measure_alpha(100, 1.0, Observation(8, -1.0), Observation(8, math.nan), (0.1,)))
    assert diagnose(filled).verdict == "diverging"


def test_many_steps_taken_back_are_diverging():
    events = [GuardEvent(n, "loss_rose", 1.0, 9.0, restored=True) for n in (50, 60, 70, 80)]
    assert diagnose(history(0.2), events).verdict == "diverging"
    assert diagnose(history(0.2), events[:1]).verdict == "balanced"


@pytest.mark.parametrize(("lr", "verdicts"), [(1e-5, {"undershooting"}), (2.0, {"balanced", "unknown"})])
def test_on_a_real_run(lr, verdicts):
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3)), nn.CrossEntropyLoss()
    teacher = nn.Linear(10, 3)
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=lr), model, loss_fn)
    for _ in range(120):
        x = torch.randn(64, 10)
        guided.zero_grad()
        loss_fn(model(x), teacher(x).argmax(1)).backward()
        guided.step()
    assert guided.diagnose().verdict in verdicts
