"""Losses that say less than all: checkpoints, penalties, losses of the user's own, two batches at once."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from tests.loops import check_same, make_batches, make_model, plain_run, train, wrap


@pytest.mark.compatibility("Loops", "torch.utils.checkpoint, reentrant and not")
def test_gradient_checkpointing_measures_the_same():
    from torch.utils.checkpoint import checkpoint

    reference = plain_run("adam")
    for reentrant in (True, False):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = wrap(model, loss_fn, "adam")
        for x, y in make_batches(6):
            guided.zero_grad()
            output = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
            loss_fn(output, y).backward()
            guided.step()
        check_same(guided.alpha_history, reference.alpha_history)


@pytest.mark.parametrize("style", ["getattr", "dictionary", "assertion"])
def test_a_loss_that_knows_no_none_is_recorded_and_said(style):
    class Custom(nn.Module):
        reduction = "mean"

        def forward(self, output, y):
            losses = nn.functional.cross_entropy(output, y, reduction="none")
            if style == "getattr":
                return getattr(losses, self.reduction)()
            if style == "dictionary":
                return {"mean": torch.mean}[self.reduction](losses)
            assert self.reduction == "mean"
            return losses.mean()

    model, loss_fn = make_model(), Custom()
    guided = wrap(model, loss_fn)
    with pytest.warns(UserWarning, match="Custom gives no losses of single samples"):
        train(guided, model, loss_fn, make_batches(3))
    assert {m.information for m in guided.alpha_history} == {"slopes+variances"}


def test_a_loss_of_the_users_own_whose_graph_holds_its_buffers():
    class Weighted(nn.CrossEntropyLoss):
        pass

    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    runs = []
    for loss_fn in (Weighted(weight=weight), nn.CrossEntropyLoss(weight=weight)):
        model = make_model()
        guided = wrap(model, loss_fn)
        for x, y in make_batches(4):
            guided.zero_grad()
            loss_fn(model(x), target=y).backward()
            guided.step()
        runs.append(guided.alpha_history)
    check_same(*runs, ("alpha", "loss_start", "loss_variance_start"))


@pytest.mark.parametrize("sizes", [(8, 12), (8, 16), (16, 8)])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_two_batches_of_different_size_in_one_backward_pass_have_slopes_only(kind, sizes):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    with pytest.warns(UserWarning, match="several losses with different numbers of samples"):
        for first, second in zip(make_batches(3, sizes[0]), make_batches(3, sizes[1], seed=1), strict=True):
            guided.zero_grad()
            sum(loss_fn(model(x), y) for x, y in (first, second)).backward()
            guided.step()
    assert [m.information for m in guided.alpha_history] == ["slopes"] * 2


@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_two_backward_passes_through_one_call_are_of_the_same_samples(kind, handed_over):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = make_model(), make_model(1)

        def forward(self, x):
            return self.first(x), self.second(x)

    def train_by(passes):
        torch.manual_seed(0)
        model, loss_fn = Heads(), nn.CrossEntropyLoss()
        guided = wrap(model, None if handed_over else loss_fn, kind)
        for x, y in make_batches(6):
            guided.zero_grad()
            terms = [functional.cross_entropy(output, y, reduction="none") for output in model(x)]
            if handed_over and passes == 1:
                guided.backward(sum(terms))
            elif handed_over:
                for losses in terms:
                    guided.backward(losses)
            elif passes == 1:
                sum(loss_fn(output, y) for output in model(x)).backward()
            else:
                for loss in [loss_fn(output, y) for output in model(x)]:
                    loss.backward(retain_graph=True)
            guided.step()
        return guided.alpha_history

    together = train_by(1)
    with pytest.warns(UserWarning, match="go through one call of the model"):
        apart = train_by(2)
    assert {(m.information, m.samples_start) for m in together} == {("full", 12)}
    assert {(m.information, m.samples_start) for m in apart} == {("slopes", 12)}
    for one, both in zip(apart, together, strict=True):  # the mean of the two, as of two batches
        assert 2.0 * one.slope_start == pytest.approx(both.slope_start, rel=1e-9)
        assert 2.0 * one.loss_start == pytest.approx(both.loss_start, rel=1e-9)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("way", ["mean", "sum", "none", "recorded", "running total"])
def test_a_loss_that_is_changed_in_place_is_the_one_that_was_seen(kind, way):
    """Divided for an accumulation, or used as a running total; how it was sent backward is another matter."""
    runs = []
    for in_place in (True, False):
        model = make_model()
        reduction = "none" if way in ("none", "recorded") else "sum" if way == "sum" else "mean"
        loss_fn = nn.CrossEntropyLoss(reduction=reduction)
        guided = wrap(model, None if way == "recorded" else loss_fn, kind)
        for x, y in make_batches(5):
            guided.zero_grad()
            loss = loss_fn(model(x), y)
            if way == "recorded":
                guided.record_losses(loss)
            if in_place and way != "running total":
                loss /= 4
            sent = loss if in_place and way != "running total" else loss / 4
            sent.mean().backward()
            if in_place:
                loss.detach().add_(100.0)
            guided.step()
        assert {m.information for m in guided.alpha_history} == {"full"}
        runs.append(guided.alpha_history)
    fields = ("alpha", "loss_start", "loss_end", "loss_variance_start", "slope_start", "slope_variance_start")
    check_same(*runs, fields)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("first", ["seen", "not seen"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_second_loss_that_is_not_seen_leaves_the_slopes(kind, first, passes):
    """In a pass of its own, or in the same one, of a call of the model that was made after the loss that is seen."""
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    with pytest.warns(UserWarning, match="not all of the loss that is sent backward"):
        for (x, y), (other, _) in zip(make_batches(4), make_batches(4, seed=1), strict=True):
            guided.zero_grad()

            def seen(x=x, y=y):
                return loss_fn(model(x), y)

            def unseen(other=other):
                return functional.mse_loss(model(other), torch.ones(12, 3).double())

            terms = [term() for term in (seen, unseen)[:: 1 if first == "seen" else -1]]
            for loss in terms if passes == 2 else [sum(terms)]:
                loss.backward()
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes"}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_targets_that_do_not_count_and_weights_of_classes_with_losses_of_every_row(kind, weights):
    """However many of a batch count; the losses, their scatter and all else as with reduction "mean"."""
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    runs = []
    for reduction in ("none", "mean"):
        model, loss_fn = make_model(), nn.CrossEntropyLoss(weights, ignore_index=-1, reduction=reduction)
        guided = wrap(model, loss_fn, kind)
        for n, (x, y) in enumerate(make_batches(5)):
            y[: n + 1] = -1
            counts = (y >= 0).double() if weights is None else weights[y.clamp_min(0)] * (y >= 0)
            guided.zero_grad()
            loss = loss_fn(model(x), y)
            (loss if reduction == "mean" else loss.sum() / counts.sum()).backward()
            guided.step()
        runs.append(guided.alpha_history)
    fields = ("alpha", "loss_start", "loss_end", "loss_variance_start", "slope_start", "slope_end")
    check_same(*runs, (*fields, "slope_variance_start"))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_batch_of_which_no_target_counts_is_used_where_the_loss_is_a_sum(kind, whole):
    """Its loss is 0 and so is its gradient; a guard that calls it nan would keep back what the bare loop does."""
    results = []
    for wrapped in (False, True):
        model, loss_fn = make_model(), nn.CrossEntropyLoss(ignore_index=-1, reduction="sum")
        guided = wrap(model, loss_fn, kind)
        optimizer = guided if wrapped else guided.optimizer
        if not wrapped:
            guided.detach()
        scheduler = AlphaScheduler(guided, Hold()) if wrapped else None
        for n, (x, y) in enumerate(make_batches(6)):
            if n % 2:
                y[0 if whole else 6 :] = -1
            optimizer.zero_grad()
            for part in (slice(0, 6), slice(6, 12)):
                (loss_fn(model(x[part]), y[part]) / 12).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        results.append([param.detach().clone() for param in model.parameters()])
    assert guided.iteration == 6
    assert not guided.guard_events
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    measured = [m for m in guided.alpha_history if m.status != "not_finite"]
    assert len(measured) == (0 if whole else 5)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_factor_that_nobody_has_seen_leaves_losses_without_a_graph_alone(kind):
    """A gradient scaler's: losses and slopes would be of different functions."""
    found = {}
    for recorded in ("detached", "with graph"):
        model = make_model()
        guided = wrap(model, None, kind)
        for x, y in make_batches(4):
            guided.zero_grad()
            losses = functional.cross_entropy(model(x), y, reduction="none")
            guided.record_losses(losses.detach() if recorded == "detached" else losses)
            (1024.0 * losses.mean()).backward()
            for param in model.parameters():
                param.grad.div_(1024.0)
            guided.step()
        found[recorded] = {m.information for m in guided.alpha_history}
    assert found == {"detached": {"slopes+variances"}, "with graph": {"full"}}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_losses_handed_over_are_weighed_as_they_were_sent_backward(kind):
    """Micro-batches of 8 and 4 samples, whose means are averaged."""
    runs = []
    for recorded in (True, False):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = wrap(model, None if recorded else loss_fn, kind)
        for x, y in make_batches(5):
            guided.zero_grad()
            for part in (slice(0, 8), slice(8, 12)):
                output = model(x[part])
                if recorded:
                    losses = functional.cross_entropy(output, y[part], reduction="none")
                    guided.record_losses(losses)
                    (losses.mean() / 2).backward()
                else:
                    (loss_fn(output, y[part]) / 2).backward()
            guided.step()
        runs.append(guided.alpha_history)
    fields = ("alpha", "loss_start", "loss_end", "loss_variance_start", "slope_start", "slope_end")
    check_same(runs[0][1:], runs[1][1:], fields)  # the first pair under plain SGD has slopes only


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_layers_that_are_frozen_after_the_step_have_no_slope_at_its_end(kind):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, kind)
    for n, (x, y) in enumerate(make_batches(8)):
        model[0].requires_grad_(n < 3 or n >= 6)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert guided.alpha_history.dropped == {"parameters_changed": 1}
    assert [m.iteration for m in guided.alpha_history] == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("way", ["a patched step", "a hook for all optimizers"])
def test_a_step_that_does_more_than_plain_sgd_is_looked_at(way):
    def clamp(*_):
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.3, 0.3)

    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    base = torch.optim.SGD(model.parameters(), lr=0.2)
    handle = None
    from torch.optim.optimizer import register_optimizer_step_post_hook

    if way == "a patched step":
        step = base.step
        base.step = lambda closure=None: (step(closure), clamp())[0]
    else:
        handle = register_optimizer_step_post_hook(clamp)
    try:
        guided = AlphaGuided(base, model, loss_fn, variance="exact")
        lengths = []
        for x, y in make_batches(5):
            before = torch.cat([param.detach().flatten() for param in model.parameters()])
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
            after = torch.cat([param.detach().flatten() for param in model.parameters()])
            lengths.append(float((after - before).norm()))
    finally:
        if handle is not None:
            handle.remove()
    assert [m.step_length for m in guided.alpha_history] == pytest.approx(lengths[:4], rel=1e-9)


@pytest.mark.parametrize("returned", ["probabilities", "a view", "a temperature", "a temperature in use"])
def test_a_loss_that_is_returned_beside_what_its_logits_were_made_into(returned):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.temperature = make_model(), nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x, y=None):
            logits = self.net(x)
            if returned.startswith("a temperature"):
                scale = self.temperature.exp()
                return (logits * scale, scale if returned.endswith("in use") else self.temperature.exp())
            loss = functional.cross_entropy(logits, y)
            return (logits.softmax(1) if returned == "probabilities" else logits.view(-1), loss)

    torch.manual_seed(0)
    model = Returns()
    guided = AlphaGuided(torch.optim.Adam(model.parameters(), lr=0.01), model, variance="exact")
    expected = []
    for x, y in make_batches(4):
        guided.zero_grad()
        output = model(x, y)
        loss = functional.cross_entropy(output[0], y) if returned.startswith("a temperature") else output[1]
        expected.append(loss.item())
        loss.backward()
        guided.step()
    losses = [m.loss_start for m in guided.alpha_history]
    if returned.startswith("a temperature"):
        assert all(math.isnan(loss) for loss in losses)
    else:
        assert losses == pytest.approx(expected[:3])


@pytest.mark.compatibility("Loops", "gradient penalties (create_graph): slopes only, named in a warning")
def test_a_gradient_penalty_has_slopes_only_and_says_so():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    with pytest.warns(UserWarning, match="derivatives of the model were taken"):
        for x, y in make_batches(3):
            x.requires_grad_()
            guided.zero_grad()
            output = model(x)
            (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
            (loss_fn(output, y) + slope.square().sum(1).mean()).backward()
            guided.step()
    assert [m.information for m in guided.alpha_history] == ["slopes"] * 2


def test_samples_that_do_not_add_up_are_told_and_the_mean_slope_is_the_same_without_them():
    runs = []
    for variance in ("exact", "sampled"):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = wrap(model, loss_fn, "adam", backend="cached", variance=variance)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for x, y in make_batches(4, 40):
                guided.zero_grad()
                for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
                    penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
                    ((loss_fn(model(xs), ys) + penalty) / 2).backward()
                guided.step()
        runs.append(guided.alpha_history)
        told = ["not all of the loss that is sent backward" in str(entry.message) for entry in caught]
        assert told == [True]  # though some of 40 samples need not add up to all of them: the model as a whole is asked
        assert {m.information for m in guided.alpha_history} == {"slopes"}
    check_same(*runs, ("slope_start", "slope_end"))


@pytest.mark.parametrize("variance", ["sampled", "exact"])
def test_a_penalty_on_the_parameters_is_noticed(variance):
    """The loss seen is not all that is sent backward: losses and slopes belong to different functions."""
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam", variance=variance)
    gradients = []
    with pytest.warns(UserWarning, match="not all of the loss that is sent backward") as caught:
        for x, y in make_batches(6):
            guided.zero_grad()
            (loss_fn(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            guided.step()
            d = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
            gradients[-1] = float(gradients[-1] @ d / d.norm())
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 500
    assert {m.information for m in guided.alpha_history} == {"slopes"}
    assert [m.slope_start for m in guided.alpha_history] == pytest.approx(gradients[:5])


def test_an_earlier_forward_pass_of_another_size_does_not_confuse_the_count():
    reference = plain_run("adam")
    model = make_model()
    guided = wrap(model, None, "adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        model(x[:4])
        loss.backward()
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history, ("samples_start", "slope_variance_start"))


@pytest.mark.parametrize("options", [{"variance": "sampled"}, {"variance": "exact"}], ids=str)
def test_losses_of_two_forward_passes_together(options):
    histories = []
    for together in (True, False):
        model = make_model()
        guided = wrap(model, None, "adam", **({"backend": "cached"} if together else options))
        (x, y), (u, v) = make_batches(1, 12)[0], make_batches(1, 7)[0]
        for _ in range(3):
            guided.zero_grad()
            if together:
                losses = nn.functional.cross_entropy(model(torch.cat([x, u])), torch.cat([y, v]), reduction="none")
            else:
                both = [nn.functional.cross_entropy(model(a), b, reduction="none") for a, b in ((x, y), (u, v))]
                losses = torch.cat(both)
            guided.backward(losses)
            guided.step()
        histories.append(guided.alpha_history)
    assert [m.samples_start for m in histories[1]] == [19, 19]
    first = 1 if options["variance"] == "exact" else 0  # the rules of layers do not fit, as is seen then
    check_same(*(history[first:] for history in histories))


def test_the_factor_of_a_recorded_mean_is_divided_out():
    slopes = []
    for scale in (1.0, 1024.0):
        model = make_model()
        guided = wrap(model, None, "adam")
        for x, y in make_batches(3):
            guided.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            guided.record_losses(loss)
            (loss * scale).backward()
            guided.step()
        slopes.append(guided.alpha_history[0].slope_start)
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-5)


def test_a_stray_backward_before_a_closure_does_not_count():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn)
    reference = plain_run()
    stray = make_batches(1, seed=9)[0]
    for x, y in make_batches(6):
        loss_fn(model(stray[0]), stray[1]).backward()

        def closure(x=x, y=y):
            guided.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        guided.step(closure)
    check_same(guided.alpha_history, reference.alpha_history)


def test_a_loss_function_that_is_never_called_is_noticed_once():
    model = make_model()
    guided = wrap(model, nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="none of its calls was seen in the backward pass") as caught:
        for x, y in make_batches(5):
            guided.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            guided.step()
    assert len(caught) == 1


def test_a_recorded_mean_does_not_replace_what_loss_fn_says():
    reference = plain_run("adam")
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam")
    for x, y in make_batches(6):
        guided.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        guided.record_losses(loss.detach())
        guided.step()
    check_same(guided.alpha_history, reference.alpha_history)
    assert {m.information for m in guided.alpha_history} == {"full"}


@pytest.mark.filterwarnings("ignore:loss_fn")
def test_a_batch_without_a_target_that_counts_raises_nothing():
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    for target in (0, -100, 1):
        guided.zero_grad()
        loss_fn(model(torch.randn(5, 4)), torch.full((5,), target)).backward()
        guided.step()
    assert {m.status.value for m in guided.alpha_history} == {"not_finite"}


def test_steps_at_rate_zero_without_a_gradient_count():
    model = nn.Linear(3, 1)
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.0), model, every=3)
    for step in range(6):
        optimizer.zero_grad()
        (model(torch.ones(2, 3)).sum() * 0.0).backward()
        optimizer.step()
        assert optimizer.iteration == step + 1


def test_what_is_known_of_the_noise_stands_where_a_batch_is_called_otherwise():
    """A batch of as many samples as its inputs are wide could be cut along either dimension, and is checked anew."""
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, "adam", variance="sampled")
    for size in (8, 8, 6, 8, 8, 8):
        ((x, y),) = make_batches(1, size)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert [m.information for m in guided.alpha_history] == ["full"] * 5


@pytest.mark.parametrize("given", ["all", "nothing"])
def test_gradients_that_are_written_to_between_micro_batches_are_not_those_of_the_loss(given):
    """Clipped after every backward pass; once they are no longer, all is measured again."""
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    guided = AlphaGuided(base, *((model, loss_fn) if given == "all" else ()), variance="exact")
    for n, (x, y) in enumerate(make_batches(8)):
        guided.zero_grad()
        for part in (slice(0, 6), slice(6, 12)):
            (loss_fn(model(x[part]), y[part]) / 2).backward()
            if n < 3 or part.start:  # after the last one it is a factor, which is seen
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        guided.step()
    assert guided.alpha_history.dropped == {"gradients_modified": 3}
    assert [m.iteration for m in guided.alpha_history] == [3, 4, 5, 6]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("given", ["all", "the model", "nothing"])
def test_gradients_that_are_exchanged_for_new_ones_are_not_added_to_the_old(given):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    guided = AlphaGuided(base, *{"all": (model, loss_fn), "the model": (model,), "nothing": ()}[given])
    for x, y in make_batches(6):
        params = list(model.parameters())
        for param, gradient in zip(params, torch.autograd.grad(loss_fn(model(x), y), params), strict=True):
            param.grad = gradient
        guided.step()
    assert [m.information for m in guided.alpha_history] == ["slopes"] * 5


@pytest.mark.parametrize("variance", ["sampled", "exact"])
def test_an_input_that_is_written_to_before_the_step_is_told(variance):
    """A static buffer into which the next batch is copied: the call of the model cannot be repeated."""
    model, loss_fn, buffer = make_model(), nn.CrossEntropyLoss(), torch.zeros(12, 6).double()
    guided = wrap(model, loss_fn, "adam", variance=variance)
    batches = make_batches(30)
    with pytest.warns(UserWarning, match="the input of the model is written to between its call and the step"):
        for (x, y), (following, _) in zip(batches, [*batches[1:], batches[0]], strict=True):
            buffer.copy_(x)
            guided.zero_grad()
            loss_fn(model(buffer), y).backward()
            buffer.copy_(following)
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes"}
