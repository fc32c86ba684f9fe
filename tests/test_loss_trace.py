"""Where the loss over a climbing rate was lowest, for advice from histories."""

import math

import pytest

from alpha_optim.alpha.loss_trace import LossTrace


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


def test_noise_alone_is_no_rise():
    trace = LossTrace(10, first=1.0)
    for n in range(300):
        trace.add(1.0 + 0.3 * math.sin(12.9 * n * n), 0.01 * n, 0.3)
    assert not trace.risen()


def test_a_noisy_stretch_without_progress_is_not_taken_for_the_lowest():
    trace = LossTrace(5, first=1.0)
    for n in range(30):
        trace.add(1.0 + 0.3 * math.sin(12.9 * n * n), 0.1 * n, 0.3)
    assert not trace.has_fallen()
    for n in range(30, 40):
        trace.add(0.1, 0.1 * n, 0.3)
    assert trace.has_fallen()
