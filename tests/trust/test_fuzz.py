"""Wrapped and bare runs of the same random case, side by side; `python -m tests.trust` tries more of them."""

import copy
import dataclasses
import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from alpha_optim import (
    AlphaGuided,
    AlphaScheduler,
    AlphaStatus,
    Bounded,
    CalibrateThenAnneal,
    OvershootBackoff,
    TargetAlpha,
    WithWarmup,
)
from tests.parity import QUANTITIES
from tests.reference.per_sample_loop import observe_run
from tests.test_transparency import equal_states
from tests.trust.cases import cases, run

CASES = 150
QUICK = settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
)  # fmt: skip


def loss_module(case):
    return nn.CrossEntropyLoss(reduction="sum" if case.loss == "sum" and case.family != "sequence" else "mean")


def schedule_of(case, optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if case.schedule else None


def wrap(case, model, loss_fn, **options):
    """The case's optimizer, wrapped; with another backend where its own is impossible, which has to say so."""
    given_things = (model, loss_fn)[: case.given]
    base = case.base(model)
    try:
        return AlphaGuided(base, *given_things, backend=case.backend, variance=case.variance, **options)
    except ValueError as error:
        refused = str(error)
    assert case.backend != "auto", refused
    assert "these work" in refused.lower()
    return AlphaGuided(base, *given_things, variance=case.variance, **options)


def bare(case):
    model, loss_fn = case.model(), loss_module(case)
    optimizer = case.base(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        following = run(case, model, optimizer, loss_fn, schedule_of(case, optimizer))
    return model, optimizer, following


def check_watched(case):
    """Parameters, buffers, state and random numbers bit for bit; numbers right, or said to be less; nothing left."""
    model, optimizer, following = bare(case)
    watched, loss_fn = case.model(), loss_module(case)
    attributes = [sorted(vars(m)) for m in watched.modules()]
    guided = wrap(case, watched, loss_fn, every=case.every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(run(case, watched, guided, loss_fn, schedule_of(case, guided)), following)
    for ours, theirs in ((watched, model), (guided.optimizer, optimizer)):
        assert equal_states(ours.state_dict(), theirs.state_dict())
    assert equal_states(dict(watched.named_buffers()), dict(model.named_buffers()))  # those that are not saved, too
    for m in guided.alpha_history:
        assert m.information in ("slopes", "slopes+variances", "full")
        finite = math.isfinite(m.alpha)
        assert finite == (m.status not in (AlphaStatus.NOT_FINITE, AlphaStatus.DEGENERATE)), m
    if case.oracle:
        check_numbers(case, guided)
    guided.detach()
    assert [sorted(vars(m)) for m in watched.modules()] == attributes
    for module in (*watched.modules(), loss_fn):
        assert [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks] == [{}, {}, {}], module
    for p in watched.parameters():
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks


def check_numbers(case, guided):
    """Against one backward pass per sample."""
    model = case.model()

    model = model.inner if case.loss == "returned" else model

    def mean_loss(output, y):
        return F.cross_entropy(output.transpose(1, -1), y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = observe_run(
            model,
            lambda output, y, _: mean_loss(output, y),
            mean_loss,
            case.base(model, frozen=False),
            list(case.batches()),
        )
    # That an optimizer writes to the gradients (Schedule-Free) is noticed at its first step, and they are copied then.
    assert guided.alpha_history.dropped in ({}, {"gradients_modified": 1})
    lost = "gradients_modified" in guided.alpha_history.dropped
    assert guided.alpha_history.iterations.tolist() == list(range(lost, len(expected)))
    sampled = case.variance == "sampled"
    for m, row in zip(guided.alpha_history, expected[lost:], strict=True):
        # In the first iterations it is found out how the model is differentiated, and anew when it is called otherwise.
        known = m.iteration >= 2 and len(set(case.sizes)) == 1 and case.sizes[0] > 1
        if known and case.backend in ("auto", "layerwise") and math.isfinite(m.alpha):
            assert m.information == "full", m
        for name in QUANTITIES:
            if (
                math.isnan(row[name])
                or not math.isfinite(getattr(m, name) or math.nan)
                or (sampled and "variance" in name)
            ):
                continue
            scale = max(abs(row["slope_start"]), abs(row["slope_end"]), 1e-12) if "slope" in name else 1.0
            assert getattr(m, name) == pytest.approx(row[name], rel=1e-6, abs=1e-8 * scale), (name, m)


def check_steered(case):
    """With a scheduler nothing crashes, and nothing but what the bare run has as well is not finite."""
    model, _, _ = bare(case)
    sane = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    case = dataclasses.replace(case, sizes=LONGER * case.sizes, mistakes=LONGER * case.mistakes)
    for policy in (lambda: TargetAlpha(0.1), lambda: CalibrateThenAnneal(120)):
        steered, loss_fn = case.model(), loss_module(case)
        guided = wrap(case, steered, loss_fn, every=case.every)
        scheduler = AlphaScheduler(guided, policy(), schedule=schedule_of(case, guided) if case.schedule else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(case, steered, guided, loss_fn, scheduler)
            state = copy.deepcopy([guided.state_dict(), scheduler.state_dict()])
            scheduler.finish()  # no batch judges the point that the last step reached
        assert all(math.isfinite(rate) and rate >= 0.0 for rate in scheduler.get_last_lr())
        assert state[0]["alpha_guided"]
        if sane:
            assert all(bool(torch.isfinite(p).all()) for p in steered.parameters())


LONGER = 4
"""By so much the runs are longer that are resumed, so that a search has begun."""


def steered(case, guided):
    """One of several ways to steer."""
    kinds = (
        lambda: AlphaScheduler(guided, total_steps=300),
        lambda: AlphaScheduler(guided, CalibrateThenAnneal(300, around=True), guard="cpu"),
        lambda: AlphaScheduler(guided, TargetAlpha(0.1), schedule=schedule_of(case, guided), guard=False),
        lambda: AlphaScheduler(guided, WithWarmup(Bounded(OvershootBackoff(), 0.1, 10.0), 5), max_lr=1.0),
    )
    return kinds[case.seed % len(kinds)]()


def check_resumed(case, place):
    """A run that is saved somewhere and goes on from there ends bit for bit as one that is not saved.

    It goes on in two ways: with everything built anew, and with what has been trained to the end, and is taken back.

    Args:
        case: The case.
        place: Where it is saved, as a share of the run.
    """
    mistakes = list(LONGER * case.mistakes)
    saved = round(place * len(mistakes))
    if case.seed % 3 == 0:  # up to three batches that are not finite, somewhere around
        begin = max(0, saved - case.seed % 4)
        for at in range(begin, min(len(mistakes), begin + 1 + case.seed % 5 // 2)):
            mistakes[at] = "not finite"
    case = dataclasses.replace(case, sizes=LONGER * case.sizes, mistakes=tuple(mistakes), scaled=False)
    if case.mistakes[saved : saved + 1] == ("no zero_grad",):
        return  # gradients are in no checkpoint

    def build():
        model, loss_fn = case.model(), loss_module(case)
        guided = wrap(case, model, loss_fn, every=None if case.every > 1 else 1)  # as its policy asks, or always
        return model, loss_fn, guided, steered(case, guided)

    def end(model, loss_fn, guided, scheduler):
        following = run(case, model, guided, loss_fn, scheduler, first=saved)
        told = [list(guided.alpha_history), guided.alpha_history.dropped, guided.guard_events, scheduler.get_last_lr()]
        return copy.deepcopy([model.state_dict(), guided.optimizer.state_dict(), following]), repr(told)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = build()
        model, loss_fn, guided, scheduler = trained
        run(case, model, guided, loss_fn, scheduler, last=saved)
        states = copy.deepcopy([part.state_dict() for part in (model, guided, scheduler)])
        drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        base = copy.deepcopy(guided.optimizer.state_dict())
        ends = [end(*trained)]
        for parts in (build(), trained):
            model, _, guided, scheduler = parts
            for part, state in zip((model, guided, scheduler), copy.deepcopy(states), strict=True):
                part.load_state_dict(state)
            torch.set_rng_state(drawn[0])
            random.setstate(drawn[1])
            np.random.set_state(drawn[2])  # noqa: NPY002
            if not equal_states(guided.optimizer.state_dict(), base):
                return  # torch itself loads something else (ASGD in float64)
            ends.append(end(*parts))
    for weights, told in ends[1:]:
        assert told == ends[0][1]
        assert equal_states(weights, ends[0][0])


@QUICK
@given(cases(), st.floats(0.0, 1.0))
def test_a_run_that_is_resumed_ends_as_if_it_had_not_been(case, place):
    check_resumed(case, place)


@QUICK
@given(cases())
def test_watching_changes_nothing_and_tells_the_truth(case):
    check_watched(case)


@QUICK
@given(cases())
def test_steering_never_crashes_and_never_ends_in_nan(case):
    check_steered(case)
