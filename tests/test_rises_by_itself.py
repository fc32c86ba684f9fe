"""Have the steps raised the loss, or something else?"""

import numpy as np
import pytest

from alpha_optim.alpha.loss_level import Level, level_of
from alpha_optim.alpha.window import rise_of_steps
from alpha_optim.alpha.window import rises_by_itself as by_itself


def rises_by_itself(rise, ends, steps):
    return by_itself(rise, rise_of_steps(ends, steps))


def steps_on_a_parabola(rate, count, noise, growth=0.0, seed=0):
    """Gradient steps on the mean of noisy parabolas: by how much the loss has risen, and the end slopes times length.

    Args:
        rate: 2 and more diverges.
        count: How many steps.
        noise: Deviation of the minimum from batch to batch.
        growth: What is added to the loss at every step, whatever the parameter.
        seed: Of the noise.
    """
    random = np.random.default_rng(seed)
    here, ends = 1.0, []
    losses = []
    for n in range(count):
        now, following = noise * random.normal(size=2)
        losses.append(0.5 * (here - now) ** 2 + growth * n)
        step = -rate * (here - now)
        ends.append(step * (here + step - following))
        here += step
    return losses[-1] - losses[0], ends


@pytest.mark.parametrize("rate", [2.1, 2.5, 4.0])
def test_the_rise_of_steps_that_are_too_long_is_theirs(rate):
    rise, ends = steps_on_a_parabola(rate, 20, noise=0.0)
    assert rise > 0.0
    assert sum(ends) >= rise  # as on every convex line
    assert not rises_by_itself(rise, level_of(ends), len(ends))


def test_noise_does_not_hide_that_the_steps_were_too_long():
    found = [steps_on_a_parabola(2.1, 20, noise=0.3, seed=seed) for seed in range(300)]
    assert not any(rises_by_itself(rise, level_of(ends), len(ends)) for rise, ends in found)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_a_rise_while_steps_go_down_is_not_theirs(rate):
    rise, ends = steps_on_a_parabola(rate, 40, noise=0.01, growth=0.2)
    assert rises_by_itself(rise, level_of(ends), len(ends))


def test_a_rise_of_which_the_steps_may_have_made_half_is_theirs():
    assert rises_by_itself(1.0, Level(0.049, 0.0, 10), 10)
    assert not rises_by_itself(1.0, Level(0.051, 0.0, 10), 10)


def test_noise_of_the_slopes_is_added():
    """The upper bound of a Student t interval with 9 degrees of freedom: 2.262 standard errors."""
    bound = 0.05 * 10**0.5 / 2.262
    assert rises_by_itself(1.0, Level(0.0, 0.99 * bound, 10), 10)
    assert not rises_by_itself(1.0, Level(0.0, 1.01 * bound, 10), 10)


@pytest.mark.parametrize(("measured", "made", "known"), [(3, 8, True), (3, 9, False), (2, 2, False), (0, 0, False)])
def test_too_few_measured_steps_say_nothing(measured, made, known):
    """The newest step cannot be measured yet."""
    assert rises_by_itself(1.0, level_of([-0.1] * measured), made) == known
