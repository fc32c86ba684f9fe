"""`CalibrateThenAnneal` where losses are known: the loss over the climbing rate finds the rate."""

import json
import math

import numpy as np
import pytest

from alpha_optim import CalibrateThenAnneal, GuardEvent, Observation, WithWarmup, measure_alpha
from alpha_optim.alpha.loss_trace import LossTrace
from alpha_optim.policies import base
from alpha_optim.policies.calibrate.loss_search import FAST, KNEE, SLOW, agreed, ceiling

STEPS = 1000


class Caricature:
    """Training whose loss falls with the rate and rises above an edge; a measurement comes a step later."""

    def __init__(self, initial, edge=1.0, steps=STEPS, samples=32):
        self.samples, self.variance = samples, None if samples == 1 else 0.1
        self.policy = CalibrateThenAnneal(steps)
        self.rate, self.edge, self.loss, self.good, self.n = initial, edge, 2.0, 2.0, 0
        self.pending, self.returns = None, []

    def step(self):
        lr = self.rate * self.policy.envelope(self.n)
        wobble = 0.02 * math.sin(7.0 * self.n)
        measurement = measure_alpha(
            self.n,
            lr,
            Observation(self.samples, -1.0, 1.0, self.loss + wobble, self.variance),
            Observation(self.samples, min(0.3, math.log(lr / self.edge)), 1.0, self.loss - wobble, self.variance),
            (lr,),
        )
        start = measurement.loss_start
        self.good = min(self.good, self.loss)
        self.loss += -0.1 * min(lr, self.edge) * self.loss / self.edge + 0.2 * max(0.0, lr / self.edge - 1.0)
        self.loss = min(self.loss, 5.0)
        if self.pending is not None:
            self.rate *= base.factor_of(self.policy, self.pending)
        self.rate *= base.step_factor_of(self.policy, self.n, start)
        if base.return_wanted_by(self.policy):
            self.returns.append(self.n)
            self.loss = self.good
        self.pending = measurement
        self.n += 1
        return lr


@pytest.mark.parametrize("loss", [1.0, None])
def test_a_climb_that_a_bound_holds_does_not_run_away(loss):
    """The scheduler cuts rates at max_lr; beyond 1e30 it cuts the scale too, and the policy would not know."""
    policy, log_scale = CalibrateThenAnneal(10_000), 0.0
    for n in range(2500):
        known = (None, None) if loss is None else (loss + 0.01 * math.sin(n), 0.1)
        end = Observation(32, -1e-3, 1e-6, *known)
        log_scale += math.log(base.factor_of(policy, measure_alpha(n, 1e-3, end, end, (1e-3,))))
        assert abs(log_scale) < math.log(1e30)
    assert policy.calibrated


def test_points_past_the_knee_of_the_fast_climb_are_not_trusted():
    run = Caricature(1e-2)
    seen = [(run.step(), base.point_trusted_by(WithWarmup(run.policy, 1))) for _ in range(260)]
    first = [trusted for _, trusted in seen].index(False)
    back = run.returns[0] + 1
    assert 0.5 < seen[first][0] < 6.0  # the knee of the caricature is at 1, and seen in a window of eight
    assert not any(trusted for _, trusted in seen[first : back - 1])
    assert all(trusted for _, trusted in seen[:first] + seen[back:])
    assert back - 1 > first


@pytest.mark.parametrize("edge", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("initial", [1e-6, 1e-2, 1.0, 100.0])
def test_the_rate_is_found_from_anywhere(initial, edge):
    run = Caricature(initial, edge)
    rates = [run.step() for _ in range(260)]
    assert edge / 4 < max(rates[230:]) < edge * 2
    assert len(run.returns) == 2
    assert run.returns[-1] <= 2 * run.policy.calibration_steps + 2


def test_losses_of_single_samples_are_searched_by_their_scatter():
    """Batches of one sample have no variance of the loss."""
    run = Caricature(1e-3, samples=1)
    rates = [run.step() for _ in range(260)]
    assert 1 / 4 < max(rates[230:]) < 2
    assert len(run.returns) == 2


def test_what_is_found_hardly_depends_on_the_initial_rate():
    found = []
    for initial in (1e-6, 1e-3, 1.0, 100.0):
        run = Caricature(initial)
        found.append([run.step() for _ in range(260)][-1])
    assert max(found) < 1.6 * min(found)


def test_the_first_step_is_tiny_and_the_run_ends_at_zero():
    run = Caricature(1.0)
    rates = [run.step() for _ in range(STEPS)]
    assert rates[0] == 1e-8
    top = max(rates[220:])
    assert 0.0 < rates[-1] < 0.01 * top
    assert rates[300:] == sorted(rates[300:], reverse=True)


@pytest.mark.parametrize("cut", [1, 5, 40, 90, 150, 400])
def test_a_search_by_loss_resumes_from_json(cut):
    one = Caricature(1e-3)
    for _ in range(cut):
        one.step()
    base.tell_event(one.policy, GuardEvent(one.n, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5))
    two = Caricature(1e-3)
    two.rate, two.loss, two.good, two.n, two.pending = one.rate, one.loss, one.good, one.n, one.pending
    two.policy.load_state_dict(json.loads(json.dumps(one.policy.state_dict())))
    assert [one.step() for _ in range(200)] == [two.step() for _ in range(200)]
    assert one.policy.state_dict() == two.policy.state_dict()


def test_the_trace_knows_where_the_loss_was_lowest_and_when_it_rose():
    trace = LossTrace(4, first=2.0)
    losses = [2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 1.0, 1.0, 1.0, 1.2, 1.4]
    for position, loss in enumerate(losses):
        trace.add(loss + 0.001 * (-1) ** position, float(position), 0.01)
    assert not trace.risen()
    assert trace.lowest() == pytest.approx(6.5, abs=0.6)
    for position in range(11, 15):
        trace.add(1.9, float(position), 0.01)
    assert trace.risen()


def test_the_trace_knows_when_the_lowest_loss_lies_behind():
    falling = [2.0 - 0.02 * n for n in range(50)]
    for above, expected in ((0.0, False), (0.15, True)):
        trace = LossTrace(4, first=2.0)
        for n, loss in enumerate(falling + [1.02 + above] * 30):
            trace.add(loss + 0.001 * (-1) ** n, 0.05 * n, 0.01)
        assert not trace.risen()
        assert trace.passed(0.05 * 80) is expected
        assert not trace.passed(trace.lowest() + 0.9)  # not far enough


@pytest.mark.parametrize(("size", "count", "pace"), [(5, 60, 0.125), (20, 100, 0.04), (20, 400, 0.01)])
def test_noise_around_a_level_is_no_lowest_loss_that_lies_behind(size, count, pace):
    """The three are a fast climb, a slow one, and one of a long run; by chance alone few may end."""
    noise = np.random.default_rng(0)
    ended = 0
    for _ in range(100):
        trace = LossTrace(size, first=3.0)
        for n in range(count):
            trace.add((2.0 if n < size else 1.0) + 0.1 * noise.normal(), n * pace, 0.1)
            if n >= 2 * size and trace.passed(n * pace):
                ended += 1
                break
    assert ended <= 10


@pytest.mark.parametrize("initial", [1e-6, 1.0, 100.0])
def test_a_loss_that_stays_low_for_long_does_not_draw_the_climb_far_above_the_knee(initial):
    class Patient(Caricature):
        """Above the edge nothing is gained, and far above it a little lost, until the loss rises for good."""

        def step(self):
            before = self.loss
            lr = super().step()
            if self.edge < lr < 100.0 * self.edge:
                self.loss = before if lr < 6.0 * self.edge else self.good + 0.3 * (2.0 - self.good)
            return lr

    run = Patient(initial)
    rates = [run.step() for _ in range(260)]
    assert max(rates) < 20.0  # a climb until the loss has risen for good passes 100
    assert run.policy.calibrated
    assert 1 / 4 < max(rates[230:]) < 6  # where nothing is lost


def test_noise_alone_is_no_rise():
    trace = LossTrace(10, first=1.0)
    for n in range(300):
        trace.add(1.0 + 0.3 * math.sin(12.9 * n * n), 0.01 * n, 0.3)
    assert not trace.risen()


def test_steps_are_measured_rarely_once_the_rate_is_known():
    run = Caricature(1.0)
    assert all(run.policy.wants(n) for n in range(30))
    for _ in range(260):
        run.step()
    assert [n for n in range(300, 330) if run.policy.wants(n)] == [300, 310, 320]


def test_a_noisy_stretch_without_progress_is_not_taken_for_the_lowest():
    trace = LossTrace(5, first=1.0)
    for n in range(30):
        trace.add(1.0 + 0.3 * math.sin(12.9 * n * n), 0.1 * n, 0.3)
    assert not trace.has_fallen()
    for n in range(30, 40):
        trace.add(0.1, 0.1 * n, 0.3)
    assert trace.has_fallen()


def test_a_search_that_begins_late_takes_its_time():
    """Behind a warm-up that is longer than the calibration."""
    run = Caricature(1e-3)
    run.policy = WithWarmup(CalibrateThenAnneal(STEPS), 2 * run.policy.calibration_steps + 50)
    rates = [run.step() for _ in range(550)]
    assert 1 / 4 < max(rates[520:]) < 2


def test_a_knee_far_below_the_only_other_rate_is_a_chance_crossing():
    slow = SLOW
    assert agreed({KNEE: math.log(0.5), slow: 0.0}) == pytest.approx(0.5 * math.log(0.5))
    assert agreed({KNEE: math.log(0.15), slow: 0.0}) == pytest.approx(0.5 * math.log(0.15))
    assert agreed({KNEE: math.log(0.01), slow: 0.0}) == 0.0
    assert agreed({FAST: -4.0, slow: 0.0}) == -2.0
    assert agreed({KNEE: -4.0, FAST: -1.0, slow: 0.0}) == -1.0  # the median
    assert agreed({KNEE: -4.0}) == -4.0


def test_the_rate_lies_not_far_above_a_knee_unless_that_lies_far_below_everything():
    fast, slow = FAST, SLOW
    within = {KNEE: 0.0, fast: 1.0, slow: 4.0}
    assert (agreed(within), ceiling(within)) == (1.0, 1.5)
    above = {KNEE: 0.0, fast: 4.0, slow: 2.2}
    assert (agreed(above), ceiling(above)) == (1.5, 1.5)
    none = {KNEE: 0.0, fast: 2.4, slow: 4.0}
    assert (agreed(none), ceiling(none)) == (2.4, 4.0)
    assert ceiling({fast: 4.0, slow: 2.2}) == 4.0
    assert ceiling({KNEE: 0.0}) == 0.0


def test_where_too_little_is_seen_the_users_rate_is_used():
    run = Caricature(0.5)
    whole = run.policy
    run.policy = lambda m: whole(m) if m.iteration % 50 == 0 else 1.0
    run.policy.envelope = whole.envelope
    rates = [run.step() for _ in range(400)]
    assert 0.2 < rates[-1] <= 0.5
