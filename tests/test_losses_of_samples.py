"""Where losses of single samples come from: the loss function, what is handed over, several terms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alpha_optim import AlphaGuided
from tests.loops import FIELDS, check_same, make_batches, make_model, plain_run, train, wrap


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("how", ["backward", "record then backward", "record detached", "record trailing"])
def test_functional_losses(kind, how):
    reference = plain_run(kind)
    model = make_model()
    guided = wrap(model, None, kind)
    for x, y in make_batches(6):
        guided.zero_grad()
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        if how == "backward":
            mean = guided.backward(losses)
            assert mean.item() == pytest.approx(losses.mean().item())
            assert not mean.requires_grad
        elif how == "record then backward":
            guided.record_losses(losses)
            losses.mean().backward()
        elif how == "record trailing":
            guided.record_losses(losses.detach().reshape(-1, 1).expand(-1, 3))
            losses.mean().backward()
        else:
            losses.mean().backward()
            guided.record_losses(losses.detach())
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history)
    assert {m.information for m in guided.alpha_history} == {"full"}


def test_losses_whose_pass_never_came_are_forgotten_whenever_others_are_recorded():
    model = make_model()
    guided = wrap(model, None, "adam")
    for x, y in make_batches(4):
        guided.zero_grad()
        guided.record_losses(torch.full((7,), 99.0))
        guided.zero_grad()
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        losses.mean().backward()
        guided.record_losses(losses.detach())  # after its pass: there are more losses than passes
        guided.step()
    check_same(guided.alpha_history, plain_run("adam", make_batches(4)).alpha_history)


def recorded_run(clear_first, parts, fails):
    """Losses recorded before or after `zero_grad`, of several micro-batches; perhaps first of a pass that breaks."""
    model = make_model()
    guided = wrap(model, None, "adam")
    for x, y in make_batches(6):
        if fails:
            guided.zero_grad()
            guided.record_losses(torch.full((7,), 99.0))  # and what its backward pass raises is caught by the loop
            guided.zero_grad()
        for number, (x_part, y_part) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            if clear_first and number == 0:
                guided.zero_grad()
            losses = nn.functional.cross_entropy(model(x_part), y_part, reduction="none")
            guided.record_losses(losses.detach())
            if not clear_first and number == 0:
                guided.zero_grad()
            (losses.mean() / parts).backward()
        guided.step()
    return guided.alpha_history


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clear_first", [True, False])
def test_recorded_losses_of_a_pass_that_broke_are_forgotten(clear_first, parts):
    expected = plain_run("adam").alpha_history
    fields = ("loss_start", "loss_end", "loss_variance_start", "samples_start", "samples_end")
    for fails in (False, True):
        check_same(recorded_run(clear_first, parts, fails), expected, fields)


def test_losses_of_reduction_none_also_handed_over_count_once():
    reference = plain_run("adam")
    model, loss_fn = make_model(), nn.CrossEntropyLoss(reduction="none")
    guided = wrap(model, loss_fn, "adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        guided.backward(loss_fn(model(x), y))
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history, (*FIELDS, "loss_start", "loss_variance_start"))


def test_a_recorded_mean_is_only_recorded():
    model = make_model()
    guided = wrap(model, None)
    for x, y in make_batches(4):
        guided.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        guided.record_losses(loss.detach())
        guided.step()
    for m in guided.alpha_history:
        assert m.information == "slopes+variances"
        assert math.isfinite(m.loss_start)
        assert math.isnan(m.loss_variance_start)


def test_a_penalty_is_in_the_slopes_but_not_in_the_losses():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, backend="gradients")
    points, gradients, losses = [], [], []
    for x, y in make_batches(4):
        guided.zero_grad()
        loss = loss_fn(model(x), y)
        (loss + 0.1 * model[0].weight.square().sum()).backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        points.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        guided.step()
    history = guided.alpha_history
    assert [m.loss_end for m in history] == pytest.approx(losses[1:])
    for n, m in enumerate(history):
        direction = (points[n + 1] - points[n]) / (points[n + 1] - points[n]).norm()
        assert m.slope_start == pytest.approx(float(direction @ gradients[n]))
        assert m.slope_end == pytest.approx(float(direction @ gradients[n + 1]))


def test_two_terms_of_one_loss_add_up():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    totals = []
    for x, y in make_batches(4):
        guided.zero_grad()
        output = model(x)
        loss = loss_fn(output, y) + 0.5 * loss_fn(-output, y)
        loss.backward()
        totals.append(loss.item())
        guided.step()
    assert [m.loss_start for m in guided.alpha_history] == pytest.approx(totals[:3])
    assert {m.information for m in guided.alpha_history} == {"full"}


def test_a_loss_without_losses_of_single_samples_is_recorded_and_said():
    class Opaque(nn.Module):
        def forward(self, output, y):
            return nn.functional.cross_entropy(output, y)

    model, loss_fn = make_model(), Opaque()
    guided = wrap(model, loss_fn)
    with pytest.warns(UserWarning, match="Opaque gives no losses of single samples"):
        train(guided, model, loss_fn, make_batches(4))
    assert {m.information for m in guided.alpha_history} == {"slopes+variances"}
    assert all(math.isfinite(m.loss_start) for m in guided.alpha_history)


def test_a_loss_function_that_draws_random_numbers_and_counts_its_calls_is_left_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduction = "mean"
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output, y):
            self.calls += 1
            losses = nn.functional.cross_entropy(output, y, reduction="none") * torch.rand(())
            return losses.mean() if self.reduction == "mean" else losses

    def run(wrapped):
        model, loss_fn = make_model(), Noisy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = AlphaGuided(optimizer, model, loss_fn) if wrapped else optimizer
        train(optimizer, model, loss_fn, make_batches(4))
        return torch.cat([p.detach().flatten() for p in model.parameters()]), float(loss_fn.calls)

    (bare, calls), (guided, same_calls) = run(False), run(True)
    assert torch.equal(bare, guided)
    assert calls == same_calls == 4.0


@pytest.mark.filterwarnings("ignore:no slopes of single samples")
def test_terms_that_a_model_returns_in_a_dict_are_the_loss_as_far_as_they_are_sent_backward():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.kinds, self.boxes = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x, y):
            seen = torch.tanh(self.body(x))
            return {
                "kind": F.cross_entropy(self.kinds(seen), y),
                "box": self.boxes(seen).square().mean(),
                "unused": self.boxes(seen).abs().mean(),
            }

    torch.manual_seed(0)
    model, sent = Detector(), []
    optimizer = AlphaGuided(torch.optim.Adam(model.parameters(), lr=0.01), model)
    for _ in range(6):
        optimizer.zero_grad()
        losses = model(torch.randn(8, 6), torch.randint(0, 3, (8,)))
        loss = losses["kind"] + 0.25 * losses["box"]
        loss.backward()
        optimizer.step()
        sent.append(loss.item())
    assert [m.loss_start for m in optimizer.alpha_history] == pytest.approx(sent[:-1])
    assert [m.loss_end for m in optimizer.alpha_history] == pytest.approx(sent[1:])
