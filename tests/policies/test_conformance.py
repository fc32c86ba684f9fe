"""What every policy must satisfy; a new one is tested by adding a line to the table."""

import json
import math

import numpy as np
import pytest

from alpha_optim import (
    Bounded,
    CalibrateThenAnneal,
    GuardEvent,
    Hold,
    Observation,
    OvershootBackoff,
    TargetAlpha,
    WithWarmup,
    measure_alpha,
)
from alpha_optim.policies import base

POLICIES = {
    "Hold": lambda: Hold(),
    "TargetAlpha": lambda: TargetAlpha(),
    "TargetAlpha greedy": lambda: TargetAlpha(0.0, gain=0.5, window=1),
    "OvershootBackoff": lambda: OvershootBackoff(),
    "OvershootBackoff eager": lambda: OvershootBackoff(limit=0.01, factor=0.9, window=2, certainty=0.0),
    "CalibrateThenAnneal": lambda: CalibrateThenAnneal(1000),
    "CalibrateThenAnneal short": lambda: CalibrateThenAnneal(110, trial_steps=10),
    "CalibrateThenAnneal around": lambda: CalibrateThenAnneal(1000, around=True),
    "CalibrateThenAnneal hold": lambda: CalibrateThenAnneal(1000, anneal=False),
    "Bounded": lambda: Bounded(TargetAlpha(gain=1.0), lowest=0.5, highest=2.0),
    "WithWarmup": lambda: WithWarmup(TargetAlpha(), steps=20),
    "Bounded WithWarmup Calibrate": lambda: Bounded(WithWarmup(CalibrateThenAnneal(500), 10), 0.01, 100.0),
    "a function": lambda: lambda m: 0.9 if m.alpha > 0.5 else 1.0,
}

EVENT = GuardEvent(50, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5)


def measurements(count, seed=0, level=0.0, spread=0.5):
    """Random ones, some of every status, with a gap now and then."""
    rng = np.random.default_rng(seed)
    n = 0
    for _ in range(count):
        n += 1 + (rng.random() < 0.1)
        kind = rng.random()
        start = math.nan if kind < 0.03 else 0.0 if kind < 0.05 else -abs(rng.normal(1.0, 0.3))
        t = 0.0 if 0.05 < kind < 0.08 else 10.0 ** rng.uniform(-3, 1)
        end = -(level + spread * rng.normal()) * start
        losses = 2.0 + 0.1 * rng.normal(size=2) - min(1.5, 0.01 * n)
        before, after = (Observation(32, s, 1e-4, v, 0.1) for s, v in zip((start, end), losses, strict=True))
        yield measure_alpha(n, t, before, after, (0.1,))


def unusable(count):
    for n in range(count):
        start, t = [(math.nan, 1.0), (-1.0, 0.0)][n % 2]
        yield measure_alpha(n, t, Observation(0, start), Observation(0, 1.0), (0.1,))


def said(policy, m):
    """What a policy makes of a measurement, and of the step that was made before it was known."""
    loss = 2.0 + 0.1 * math.sin(m.iteration) - min(1.5, 0.01 * m.iteration)
    factor = base.factor_of(policy, m) * base.step_factor_of(policy, m.iteration + 1, loss)
    decision = base.decision_of(policy, m.iteration + 2, 0.1)
    return factor if decision.scale is None else (decision.scale, decision.keep, decision.restore, decision.searching)


@pytest.mark.filterwarnings("ignore:more steps than total_steps")  # on purpose, and tested on its own
@pytest.mark.parametrize("name", POLICIES)
def test_factors_are_finite_and_positive_and_stay_in_bounds(name):
    policy, product = POLICIES[name](), 1.0
    for m in measurements(1000):
        answer = said(policy, m)
        product = answer[0] if isinstance(answer, tuple) else product * answer
        assert 1e-30 < product < 1e30  # false for nan
        assert base.envelope_of(policy, m.iteration) >= 0.0


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "a function"])
def test_what_could_not_be_measured_is_ignored(name):
    policy = POLICIES[name]()
    assert all(policy(m) == 1.0 for m in unusable(30))


@pytest.mark.parametrize("name", POLICIES)
def test_same_input_same_output(name):
    one, two = POLICIES[name](), POLICIES[name]()
    assert [said(one, m) for m in measurements(300)] == [said(two, m) for m in measurements(300)]


@pytest.mark.filterwarnings("ignore:more steps than total_steps")
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cut", [1, 15, 60, 299])
def test_the_state_survives_json_and_everything_goes_on_alike(name, cut):
    one, two = POLICIES[name](), POLICIES[name]()
    sequence = list(measurements(300))
    for m in sequence[:cut]:
        said(one, m)
    base.tell_event(one, EVENT)
    base.restore(two, json.loads(json.dumps(base.state_of(one))))
    assert [said(one, m) for m in sequence[cut:]] == [said(two, m) for m in sequence[cut:]]
    assert [base.envelope_of(one, n) for n in range(0, 900, 50)] == [
        base.envelope_of(two, n) for n in range(0, 900, 50)
    ]
    assert base.state_of(one) == base.state_of(two)


@pytest.mark.parametrize("name", POLICIES)
def test_settings_are_not_changed_by_use(name):
    policy = POLICIES[name]()
    before = {k: v for k, v in vars(policy).items() if not k.startswith("_")}
    for m in measurements(200):
        said(policy, m)
    after = {k: v for k, v in vars(policy).items() if not k.startswith("_")}
    assert before == after
