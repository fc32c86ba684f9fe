"""Passes beside the one that is measured, and several in one iteration: micro-batches, clipping, gradient scaling."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided
from alpha_optim.slopes.choose import BACKENDS
from alpha_optim.slopes.layerwise import LayerwiseBackend
from tests.loops import FIELDS, KINDS, check_same, make_batches, make_model, plain_run, wrap


@pytest.mark.compatibility("Loops", "evaluation in between, inference_mode, gradients of inputs")
@pytest.mark.parametrize("kind", KINDS)
def test_other_passes_do_not_disturb(kind):
    reference = plain_run(kind)
    model, loss_fn, other = make_model(), nn.CrossEntropyLoss(), make_model(9)
    guided = wrap(model, loss_fn, kind)
    for x, y in make_batches(6):
        guided.zero_grad()
        loss = loss_fn(model(x), y)
        with torch.no_grad():
            loss_fn(model(x[:5]), y[:5])  # evaluation
        with torch.inference_mode():
            loss_fn(model(x[:5]), y[:5])
        loss_fn(model(x * 2), y)  # a forward pass that nobody differentiates
        loss_fn(other(x), y).backward()  # another model on the same loss function
        torch.autograd.grad(loss_fn(model(x.clone().requires_grad_()), y), model[2].bias)
        loss.backward()
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history)


@pytest.mark.compatibility("Loops", "gradient accumulation")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("backend", ["layerwise", "cached"])  # backpack has the gradient only after the last
def test_accumulation_over_micro_batches_measures_the_whole_batch(kind, parts, backend):
    reference = plain_run(kind)
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind, backend=backend)
    for x, y in make_batches(6):
        guided.zero_grad()
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss_fn(model(xs), ys) / parts).backward()
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history, (*FIELDS, "loss_start", "loss_variance_start"))
    assert {m.samples_start for m in guided.alpha_history} == {12}


def test_accumulation_in_micro_batches_of_different_size():
    reference = plain_run("adam")
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        for part in (slice(0, 7), slice(7, 12)):
            (loss_fn(model(x[part]), y[part]) * (len(y[part]) / 12)).backward()
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history, (*FIELDS, "loss_start", "loss_variance_start"))


def test_plain_sgd_under_accumulation_goes_from_the_fast_path_to_one_that_can():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    assert guided.backend == "backpack"
    for x, y in make_batches(6):
        guided.zero_grad()
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            (loss_fn(model(xs), ys) / 2).backward()
        guided.step()
    assert guided.backend == "layerwise"
    assert "several backward passes" in repr(guided)
    reference = plain_run()
    assert [m.information for m in guided.alpha_history] == ["slopes", "full", "full", "full", "full"]
    check_same(guided.alpha_history[1:], reference.alpha_history[1:])
    assert guided.alpha_history[0].slope_end == pytest.approx(reference.alpha_history[0].slope_end)


def test_the_fast_path_alone_says_what_accumulation_costs_it():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, backend="backpack")
    with pytest.warns(UserWarning, match="several backward passes per step; backend='layerwise' can"):
        for x, y in make_batches(3):
            guided.zero_grad()
            for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
                (loss_fn(model(xs), ys) / 2).backward()
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes"}


@pytest.mark.compatibility("Loops", "clip_grad_norm_, clip_grad_value_")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_slopes_are_those_of_the_loss_also_under_clipping(kind, clip):
    def run(backend):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = wrap(model, loss_fn, kind, backend=backend)
        true = []
        for x, y in make_batches(7):
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            before = [p.detach().clone() for p in model.parameters()]
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
            guided.step()
            d = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).detach()
            true.append((float(d.norm()), float(gradient @ d / d.norm())))
        return guided, true

    for backend in ("auto", "layerwise", "cached", "gradients"):
        guided, true = run(backend)
        # Clipping by norm is one factor, which is found; clipping by value costs the first pair.
        assert guided.alpha_history.dropped == ({} if clip == "norm" else {"gradients_modified": 1})
        assert guided.alpha_history.iterations.tolist() == [0, 1, 2, 3, 4, 5][clip == "value" :]
        assert guided._session.pairing.habits.keep_copies == (clip == "value")
        for m in guided.alpha_history:
            assert m.step_length == pytest.approx(true[m.iteration][0], rel=1e-6)
            assert m.slope_start == pytest.approx(true[m.iteration][1], rel=1e-6)
        if backend != "gradients":
            assert {m.information for m in guided.alpha_history} == {"full"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.125, 65536.0])
def test_a_loss_scale_is_divided_out(kind, scale):
    reference = plain_run(kind)
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    for x, y in make_batches(7):
        guided.zero_grad()
        (loss_fn(model(x), y) * scale).backward()
        for p in model.parameters():
            p.grad.div_(scale)
        guided.step()
    # Scaling and unscaling by a power of two loses nothing, so the run is the same.
    check_same(list(guided.alpha_history)[:5], list(reference.alpha_history), tolerance=1e-8)


@pytest.mark.compatibility("Precision", "steps that a GradScaler skips")
@pytest.mark.parametrize("clear", ["wrapper", "model", "in place"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_step_skipped_by_a_scaler_keeps_the_iteration_and_drops_the_pairs_that_touch_it(kind, clear):
    model, loss_fn = make_model().float(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k, (x, y) in enumerate(make_batches(9)):
        if clear == "wrapper":
            guided.zero_grad()
        else:
            model.zero_grad(set_to_none=clear == "model")
        scaler.scale(loss_fn(model(x.float() * (math.inf if k == 4 else 1.0)), y)).backward()
        scaler.step(guided)
        scaler.update()
    assert guided.iteration == 8
    assert guided.alpha_history.dropped == {"step_skipped": 2}
    assert guided.alpha_history.iterations.tolist() == [0, 1, 2, 5, 6]


@pytest.mark.compatibility("Precision", "GradScaler: bit for bit the bare loop")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_scaler_changes_nothing(kind, clip):
    reference = plain_run(kind, make_batches(7))
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    for x, y in make_batches(7):
        guided.zero_grad()
        scaler.scale(loss_fn(model(x), y)).backward()
        if clip:
            scaler.unscale_(guided)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # never clips, but multiplies by one
        scaler.step(guided)
        scaler.update()
    assert guided.alpha_history.dropped == {}
    check_same(guided.alpha_history, reference.alpha_history, tolerance=1e-7)


@pytest.mark.parametrize("where", ["begin", "end_slopes", "start_slopes", "check_due", "cost", "accumulated"])
def test_what_a_backend_of_the_users_own_raises_costs_measurements_only(where, monkeypatch):
    calls = []

    def breaks(self, *args):
        calls.append(where)
        if len(calls) == 2:
            raise RuntimeError("boom")
        return getattr(LayerwiseBackend, where)(self, *args)

    monkeypatch.setitem(BACKENDS, "own", type("Own", (LayerwiseBackend,), {where: breaks}))
    bare, model, loss_fn = make_model(), make_model(), nn.CrossEntropyLoss()
    plain, base = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (bare, model))
    guided = AlphaGuided(base, model, loss_fn, backend="own")
    with pytest.warns(UserWarning, match="RuntimeError was raised while it was looked at") as told:
        for x, y in make_batches(8):
            for each, optimizer in ((bare, plain), (model, guided)):
                optimizer.zero_grad()
                loss_fn(each(x), y).backward()
                optimizer.step()
    assert len(told) == 1
    assert guided.iteration == 8
    assert len(guided.alpha_history) + sum(guided.alpha_history.dropped.values()) == 7
    assert guided.alpha_history[-1].information == "full"
    assert all(torch.equal(one, other) for one, other in zip(bare.parameters(), model.parameters(), strict=True))
