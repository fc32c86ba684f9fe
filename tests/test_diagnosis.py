"""Advice is given only where the data tell."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaHistory, GuardEvent, Observation, measure_alpha
from alpha_optim.alpha.diagnosis import diagnose
from examples.data import digits


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
    said = diagnose(history(alpha, losses=lambda n: 3.0 - 0.02 * n))
    assert said.verdict == verdict
    assert said.alpha == pytest.approx(alpha, abs=0.1)
    assert said.suggested_lr is None
    assert str(said).startswith(f"{verdict}: ")
    assert f"over {said.count} steps" in str(said)


def test_near_zero_is_balanced_for_large_batches_and_says_nothing_for_small_ones():
    falling = [diagnose(history(0.0, samples=n, losses=lambda n: 3.0 - 0.02 * n)).verdict for n in (64, 8)]
    assert falling == ["balanced", "unknown"]
    assert diagnose(history(-0.3, samples=64)).verdict == "undershooting"


def test_too_few_or_too_noisy_measurements_tell_nothing():
    assert diagnose(AlphaHistory()).verdict == "unknown"
    assert diagnose(history(-0.7, count=10)).verdict == "unknown"
    assert diagnose(history(-0.2, spread=5.0)).verdict == "unknown"


def test_a_climb_at_rates_far_too_low_suggests_none_of_them():
    """The loss only scatters; the lowest of many windows is low by chance."""
    for seed in range(100):
        rng, filled = np.random.default_rng(seed), AlphaHistory()
        for n in range(344):
            ends = Observation(32, -1e-3, 1e-6, 2.3 + 0.05 * rng.normal(), 0.08)
            filled.append(measure_alpha(n, 1.0, ends, ends, (1e-6 * 1.047**n,)))
        assert diagnose(filled).suggested_lr is None


def test_a_rising_loss_is_diverging_whatever_alpha_says():
    assert diagnose(history(0.2, losses=lambda n: 1.0 + 0.02 * n)).verdict == "diverging"
    assert diagnose(history(0.2, losses=lambda n: 3.0 - 0.02 * n)).verdict == "balanced"


def test_a_loss_that_has_not_fallen_is_not_called_balanced():
    assert diagnose(history(0.3, count=200, losses=lambda n: 2.3)).verdict == "unknown"
    said = diagnose(history(0.3, count=200, losses=lambda n: 2.3 if n < 5 else 2.0))
    assert (said.verdict, "no longer falls" in str(said)) == ("unknown", True)
    assert diagnose(history(0.3, count=200, losses=lambda n: 2.3 - 0.005 * n)).verdict == "balanced"


def test_a_loss_that_rises_at_last_is_not_called_falling_though_it_lies_below_where_the_window_began():
    """A rate that was raised too far: the second half of the window is lower than the first, and goes up."""
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.normal(size=200)
    bent = [3.0 - 0.02 * min(n, 170) + 0.03 * max(0, n - 170) for n in range(200)]
    assert np.mean(bent[150:]) < np.mean(bent[100:150])
    said = diagnose(history(0.3, count=200, losses=lambda n: bent[n] + noise[n]))
    assert (said.verdict, "rises again" in str(said), "falls" in str(said)) == ("unknown", True, False)


def test_few_steps_say_nothing_about_a_loss_that_scatters():
    rng = np.random.default_rng(0)
    scatter = rng.normal(size=40)
    said = diagnose(history(0.3, count=40, losses=lambda n: 2.3 + 0.1 * scatter[n]))
    assert (said.verdict, "too few steps" in str(said), "and the loss falls" in str(said)) == ("balanced", True, False)
    falls = diagnose(history(0.3, count=40, losses=lambda n: 2.3 - 0.05 * n + 0.1 * scatter[n]))
    assert "and the loss falls." in str(falls)


def test_without_losses_no_rate_is_called_balanced():
    """A spoilt network's alpha may look like any; only a loss that falls tells."""
    said = diagnose(history(0.2))
    assert (said.verdict, "since no losses are seen" in said.cause) == ("unknown", True)
    assert diagnose(history(-0.7)).verdict == "undershooting"


def test_steps_of_which_none_can_be_judged_are_counted_by_kind():
    still = AlphaHistory()
    for n in range(30):
        still.append(
            measure_alpha(n, 0.0 if n >= 10 else 1.0, *[Observation(8, math.nan if n < 10 else 1.0)] * 2, (1.0,))
        )
    said = str(diagnose(still))
    assert "None of the last 30 steps can be judged: 20 no_step, 10 " in said
    assert "Nothing has been measured" not in said


def test_a_rate_that_grows_back_after_the_guard_lowered_it_is_no_climb():
    whole, cut = climbing(0.1), AlphaHistory()
    assert diagnose(whole).suggested_lr is not None
    for n in range(50):  # at the highest rate of the climb, before
        cut.append(replace(whole[0], iteration=n, lr=(whole[199].lr[0],)))
    for item in whole:
        cut.append(replace(item, iteration=50 + item.iteration))
    assert diagnose(cut).suggested_lr is None


def test_what_a_window_before_the_decay_could_not_tell_the_loss_after_it_does():
    """The loss stood at the rate held, and has come down with it since."""

    def run(after):
        filled = AlphaHistory()
        rng = np.random.default_rng(0)
        for n in range(400):
            loss = (1.0 if n < 200 else after(n)) + 0.02 * rng.normal()
            ends = Observation(64, -1.0, 1e-3, loss), Observation(64, 0.2 + 0.3 * rng.normal(), 1e-3, loss)
            filled.append(measure_alpha(n, 1.0, *ends, (0.1 * min(1.0, (400 - n) / 200),)))
        return diagnose(filled)

    fell, stood = run(lambda n: 1.0 - 0.004 * (n - 200)), run(lambda n: 1.0)
    assert (fell.verdict, "has fallen with the rate since" in str(fell)) == ("balanced", True)
    assert stood.verdict == "unknown"
    assert "no lower than at the beginning" in str(stood)


def test_steps_well_beyond_the_minimum_are_not_called_near_it():
    assert "near or a little beyond" in str(diagnose(history(0.2)))
    assert "near" not in diagnose(history(0.6)).cause


def test_the_climb_of_a_search_that_was_taken_back_suggests_nothing():
    climbed, searched = climbing(10.0), climbing(10.0)
    assert diagnose(climbed).suggested_lr is not None
    searched.abandoned.append((0, 199))
    assert diagnose(searched).suggested_lr is None


def test_nothing_measured_is_said_so():
    said = str(diagnose(AlphaHistory()))
    assert said.startswith("unknown: Nothing has been measured yet")
    assert "nan" not in said


def climbing(end, samples=32):
    """A loss that falls while the rate climbs to 0.1, and rises beyond; the run goes on at the rate ``end``."""
    rng, filled = np.random.default_rng(0), AlphaHistory()
    rates = [1e-4 * 1.05**n for n in range(200)] + [end] * 100
    for n, rate in enumerate(rates):
        far = max(0.0, math.log(rate / 0.1)) if n < 200 else max(0.0, 0.01 * (n - 200))
        loss = 2.0 - 1.5 * min(1.0, n / 140) + far + 0.01 * rng.normal()
        ends = (Observation(samples, -1.0, 0.01, loss, 0.01), Observation(samples, 0.2, 0.01, loss, 0.01))
        filled.append(measure_alpha(n, 1.0, *ends, (rate,)))
    return filled


def test_a_suggestion_never_contradicts_the_verdict():
    high, low = diagnose(climbing(10.0)), diagnose(climbing(1e-5))
    assert high.verdict == low.verdict == "diverging"
    assert high.suggested_lr == pytest.approx(0.1, rel=0.5)
    assert "Lower the learning rate." in str(high)
    assert low.suggested_lr is None  # it lies far above
    assert "Lower the learning rate, to 1e-06 to begin with." in str(low)


def test_a_level_that_was_accepted_is_no_divergence():
    reasons = ("loss_rose", "loss_rose", "no_effect")
    events = [GuardEvent(n, why, 1.0, 9.0, restored=k == 1) for n in (50, 60, 70, 80) for k, why in enumerate(reasons)]
    assert diagnose(history(0.2), events).verdict != "diverging"


@pytest.mark.parametrize("lr", [0.1, 0.3])
def test_adam_at_a_rate_far_too_high_is_not_called_balanced(lr):
    run, _ = train_digits("adam", lr, 64, 0, lambda n: 1.0, 300)
    assert run.diagnose().verdict != "balanced"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("build", [lambda p: torch.optim.SGD(p, lr=1.0), lambda p: torch.optim.AdamW(p, lr=0.03)])
def test_a_run_that_learns_nothing_is_not_called_balanced(build, seed):
    """Labels that have nothing to do with the inputs, and a loss that begins where it is lowest, at chance."""
    torch.manual_seed(seed)
    model, loss_fn = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10)), nn.CrossEntropyLoss()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    guided = AlphaGuided(build(model.parameters()), model, loss_fn)
    for _ in range(200):
        guided.zero_grad()
        loss_fn(model(torch.randn(64, 20)), torch.randint(10, (64,))).backward()
        guided.step()
    assert guided.diagnose().verdict in ("unknown", "diverging", "overshooting")


def test_a_loss_that_is_not_finite_is_diverging():
    filled = history(0.2)
    filled.append(measure_alpha(100, 1.0, Observation(8, -1.0), Observation(8, math.nan), (0.1,)))
    advice = (
        "Look for nan and inf in the data and in the parameters. If there are none, lower the learning rate, to 0.01"
    )
    assert advice in str(diagnose(filled))
    assert diagnose(filled).verdict == "diverging"


def test_many_steps_taken_back_are_diverging():
    events = [GuardEvent(n, "loss_rose", 1.0, 9.0, restored=True, scale_factor=0.5) for n in (50, 60, 70, 80)]
    assert diagnose(history(0.2), events).verdict == "diverging"
    assert diagnose(history(0.2), events[:1]).verdict != "diverging"


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


def test_ends_of_trials_are_no_sign_of_divergence():
    """The guard ends a hopeless trial, and lowers no rate for it."""
    events = [GuardEvent(n, "loss_rose", 1.0, 2.0, restored=True) for n in (50, 60, 70, 80)]
    assert diagnose(history(0.2), events).verdict != "diverging"


def lowered(rates, alpha):
    """Alpha follows the rate as on a parabola whose best rate is reached at ``1 + alpha`` = 1."""
    rng, filled = np.random.default_rng(0), AlphaHistory()
    for n, rate in enumerate(rates):
        loss = 2.0 - 0.002 * n + 0.01 * rng.normal()
        end = Observation(64, (1.0 + alpha) * rate / max(rates) - 1.0 + 0.1 * rng.normal(), None, loss)
        filled.append(measure_alpha(n, 1.0, Observation(64, -1.0, None, loss), end, (rate,)))
    return filled


@pytest.mark.parametrize(("alpha", "verdict"), [(0.5, "balanced"), (-0.5, "undershooting"), (2.5, "overshooting")])
@pytest.mark.parametrize("kind", ["held, then linear", "cosine", "a tenth"])
def test_a_rate_that_was_annealed_is_judged_where_it_stood(alpha, verdict, kind):
    """Steps of a rate that a schedule has lowered fall short: that is no reason to raise it."""
    rates = {
        "held, then linear": [0.1] * 200 + [0.1 * (1 - k / 200) for k in range(200)],
        "cosine": [0.05 * (1 + math.cos(math.pi * k / 1000)) for k in range(1000)],
        "a tenth": [0.1] * 200 + [0.01] * 200,
    }[kind]
    said = diagnose(lowered(rates, alpha))
    assert said.verdict == verdict
    assert "was lowered further" in str(said)
    shares = {"held, then linear": (0.8, 1.0), "cosine": (0.8, 0.95), "a tenth": (1.0, 1.0)}[kind]
    low, high = ((1.0 + alpha) * share - 1.0 for share in shares)
    assert low - 0.1 < said.alpha < high + 0.1
    assert said.count == 100
    plain = diagnose(lowered(rates[: len(rates) // 2], alpha))  # not below half yet
    assert "lowered" not in str(plain)


def test_a_rate_that_was_lowered_long_ago_is_judged_as_it_is():
    """Steps at the present rate that do not fall short tell of it, whatever those before did."""
    filled = lowered([1.0] * 60 + [0.5 * 0.99] * 300, 1.5)  # alpha 1.5, then about 0.2
    said = diagnose(filled)
    assert said.alpha == pytest.approx(filled.windowed(100).alpha)
    assert said.verdict == "balanced"
    assert "lowered" not in str(said)


def test_measurements_without_a_rate_are_judged_as_they_are():
    filled, ends = history(-0.9), Observation(8, -1.0)
    filled.append(measure_alpha(100, 1.0, ends, ends, ()))
    assert diagnose(filled).verdict == "undershooting"


def test_a_rate_that_has_grown_since_is_judged_as_it_is():
    rates = [0.1] * 100 + [0.001] * 100 + [0.002] * 200
    said = diagnose(lowered(rates, 0.5))
    assert said.verdict == "undershooting"
    assert "lowered" not in str(said)


def test_trials_that_were_taken_back_are_not_looked_at():
    filled = history(-0.9)
    assert diagnose(filled).verdict == "undershooting"
    filled.abandoned = [(0, 94)]
    assert diagnose(filled).count == 5
    assert filled.windowed(100).count == 5
    assert filled.windowed(3).count == 3
    assert len(filled) == 100


BASES = {
    "sgd": (lambda params, lr: torch.optim.SGD(params, lr=lr), 1e-4),
    "momentum": (lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), 1e-5),
    "adam": (lambda params, lr: torch.optim.Adam(params, lr=lr), 1e-6),
}


def train_digits(kind, lr, batch, seed, factor, steps, wrapped=True):
    """Train a small network on the digits at rates ``lr * factor(n)``; its optimizer and its final loss."""
    data = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer, loss_fn = BASES[kind][0](model.parameters(), lr), nn.CrossEntropyLoss()
    if wrapped:
        optimizer = AlphaGuided(optimizer, model, loss_fn)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(data.y_train), (batch,), generator=generator)
        optimizer.zero_grad()
        loss = loss_fn(model(data.x_train[index]), data.y_train[index])
        if not torch.isfinite(loss):
            break
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return optimizer, float(loss_fn(model(data.x_train), data.y_train))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("batch", [2, 8, 32, 128])
def test_a_trial_run_with_a_growing_rate_suggests_one_as_good_as_the_best_of_a_grid(kind, batch):
    lowest, steps = BASES[kind][1], 300
    suggested = []
    for seed in (0, 1):
        trial, _ = train_digits(kind, lowest, batch, seed, lambda n: math.exp(n * math.log(1e6) / 300), 300)
        suggested.append(trial.diagnose().suggested_lr)
    known = [rate for rate in suggested if rate is not None]
    assert known or batch == 2  # whose noise may hide that the loss has fallen

    def decayed(lr):
        return train_digits(kind, lr, batch, 1, lambda n: 1.0 - n / steps, steps, wrapped=False)[1]

    grid = {rate: loss for k in range(9) if math.isfinite(loss := decayed(rate := 10 * lowest * 10 ** (k / 2)))}
    best = min(grid, key=grid.get)
    for rate in known:
        # Within 3 times the best of the grid; where the optimum is flat, as good as the rates next to it.
        neighbours = [loss for other, loss in grid.items() if best / 3.2 < other < 3.2 * best]
        assert best / 3 <= rate <= 3 * best or decayed(rate) <= 1.1 * max(neighbours)


def test_a_run_at_one_rate_suggests_none():
    run, _ = train_digits("adam", 1e-3, 32, 0, lambda n: 1.0, 100)
    assert run.diagnose().suggested_lr is None
    climb, _ = train_digits("adam", 1e-6, 32, 0, lambda n: 1.05**n, 150)  # the loss has not risen yet
    assert climb.diagnose().suggested_lr is None


@pytest.mark.parametrize(
    ("alpha", "samples", "spread", "cause"),
    [
        (-0.7, 64, 0.3, "Steps end short of the minimum along their direction: the learning rate can grow."),
        (1.5, 64, 0.3, "Steps end far beyond the minimum along their direction: lower the learning rate."),
        (-0.2, 64, 5.0, "Alpha is not known well enough to tell."),
        (-0.1, 64, 0.05, "Steps end a little short of the minimum along their direction, as they do at good"),
        (0.0, 8, 0.3, "Batches this small tell little: their alpha is near 0 at low and at good learning rates alike."),
    ],
)
def test_the_cause_is_told_in_these_words(alpha, samples, spread, cause):
    assert diagnose(history(alpha, samples=samples, spread=spread)).cause.startswith(cause)


def test_the_rate_that_has_been_lowered_since_is_the_highest_of_the_descent():
    """Rates within a fifth of that count as the same; the one after the highest is no measure."""
    rng, filled = np.random.default_rng(0), AlphaHistory()
    rates = [1.0] + [0.85] * 40 + [0.7] * 40 + [0.1] * 100
    for n, rate in enumerate(rates):
        start = Observation(64, -1.0, 0.01, 2.0 - 0.005 * n, 0.01)
        end = Observation(64, (0.2 if rate >= 0.8 else -0.6) + 0.1 * rng.normal(), 0.01, 2.0 - 0.005 * n, 0.01)
        filled.append(measure_alpha(n, 1.0, start, end, (rate,)))
    said = str(diagnose(filled))
    assert said.startswith("balanced: At learning rates from 1 to 0.85, up to iteration 40:")


def annealed(alphas, losses, noise=0.1):
    """A rate held for 200 steps and annealed in 200; ``alphas`` and ``losses`` by step."""
    rng, filled = np.random.default_rng(0), AlphaHistory()
    for n in range(400):
        loss = losses(n) + 0.01 * rng.normal()
        start, end = Observation(64, -1.0, None, loss), Observation(64, alphas(n) + noise * rng.normal(), None, loss)
        filled.append(measure_alpha(n, 1.0, start, end, (0.1 * min(1.0, (400 - n) / 200),)))
    return diagnose(filled)


def test_steps_that_do_not_fall_short_after_annealing_are_not_said_to():
    assert "fall short" not in str(annealed(lambda n: 0.6, lambda n: 2.0 - 0.002 * n))
    assert "which makes steps fall short" in str(
        annealed(lambda n: 0.6 if n < 200 else -0.5, lambda n: 2.0 - 0.002 * n)
    )


@pytest.mark.parametrize("alpha", [-0.42, 1.17])
def test_steps_that_lie_elsewhere_are_not_called_near_the_minimum_since_the_loss_has_fallen(alpha):
    said = annealed(lambda n: alpha, lambda n: 1.0 if n < 200 else 1.0 - 0.004 * (n - 200), noise=4.0)
    assert said.verdict != "balanced"


def test_a_rate_that_was_just_annealed_is_not_to_be_lowered():
    said = str(annealed(lambda n: 0.2, lambda n: 2.0 - 0.01 * min(n, 80)))
    assert "no longer fell, and the rate has been lowered" in said
    assert "Lower it" not in said


def test_without_losses_it_is_not_known_whether_a_model_whose_steps_fall_short_still_learns():
    assert "whether the model still learns is not known" in str(diagnose(history(-0.9)))
    assert "still learns" not in str(diagnose(history(-0.9, losses=lambda n: 2.0 - 0.01 * n)))
