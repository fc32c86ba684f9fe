"""Which backward passes an iteration has, put together from real ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from alpha_optim import AlphaGuided
from alpha_optim.observe.backward_passes import (
    BackwardPass,
    BackwardPasses,
    LossCall,
    gamma_of,
    loss_weight,
    scale_of,
    total_samples,
)


def call(mean=1.0, samples=4, gamma=1.0, **options):
    gamma = None if gamma is None else torch.tensor(gamma)
    individual = None if samples is None else torch.full((samples,), mean)
    return LossCall(torch.tensor(mean), individual, samples, gamma, **options)


def passes_of(*entries):
    made = []
    for calls, samples in entries:
        entry = BackwardPass(samples=samples, reached=True)
        for one in calls:
            entry.add(one)
        made.append(entry)
    return made


def test_the_loss_of_accumulated_passes_is_weighed_as_it_was_sent_backward():
    """Two micro-batches of 4 and 2 samples, each sent as half of its mean."""
    made = passes_of(([call(2.0, 4, 0.5)], 4), ([call(5.0, 2, 0.5)], 2))
    assert total_samples(made) == 6
    assert float(gamma_of(made)) == 1.0
    weights = [float(loss_weight(entry, made)) for entry in made]
    # Every sample's loss times its weight, averaged over all samples, is the mean of the two means.
    assert (weights[0] * 2.0 * 4 + weights[1] * 5.0 * 2) / 6 == pytest.approx(3.5)


def test_a_scaled_loss_is_scaled_back():
    made = passes_of(([call(2.0, 4, 1024.0)], 4))
    assert float(scale_of(made)) == pytest.approx(1 / 1024)
    assert scale_of(passes_of(([call(gamma=None)], 4))) == 1.0


def test_shares_of_one_mean_have_one_weight():
    made = passes_of(([call(2.0, 4, 1.0, share=True)], 4), ([call(5.0, 2, 1.0, share=True)], 2))
    assert float(gamma_of(made)) == 1.0


@pytest.mark.parametrize(
    ("weights", "gamma"), [((2.0, 0.5), 2.0), ((0.0, 0.5), 0.5), ((-2.0, 0.5), 2.0), ((0.0, 0.0), 1.0)]
)
def test_terms_of_a_loss_add_up_relative_to_the_largest_weight(weights, gamma):
    (made,) = passes_of(([call(3.0, 4, weights[0], order=2), call(1.0, 4, weights[1], order=1)], 4))
    mean, individual = made.losses()
    expected = (3.0 * weights[0] + 1.0 * weights[1]) / gamma
    assert float(mean) == pytest.approx(expected)
    assert individual.tolist() == pytest.approx([expected] * 4)
    assert float(made.gamma) == gamma


@pytest.mark.parametrize(
    ("weights", "gamma"), [((0.25, 0.75), 1.0), ((0.0, 1.0), 1.0), ((2.0, 0.5), 2.5), ((-1.0, 0.5), 1.0)]
)
def test_terms_of_one_prediction_are_one_loss_their_mean_by_weight(weights, gamma):
    node = object()
    terms = [call(value, 4, weight).judging(node) for value, weight in zip((3.0, 1.0), weights, strict=True)]
    (made,) = passes_of((terms, 4))
    assert float(made.gamma) == gamma
    assert float(made.losses()[0]) == pytest.approx((3.0 * weights[0] + 1.0 * weights[1]) / gamma)


def test_terms_over_other_samples_leave_no_losses_of_samples():
    (made,) = passes_of(([call(3.0, 4), call(1.0, 2, order=1)], 4))
    assert made.mixed
    assert made.losses()[1] is None


def test_losses_handed_over_replace_those_seen():
    (made,) = passes_of(([call(3.0), call(7.0, explicit=True), call(9.0)], 4))
    assert [float(one.mean) for one in made.calls] == [7.0]


def test_a_loss_that_the_model_returned_does_not_count_beside_what_it_was_made_from():
    (made,) = passes_of(([call(3.0), call(3.0, returned=True)], 4))
    assert len(made.calls) == 1
    assert not made.calls[0].returned


class Watched:
    """Real backward passes through one parameter, watched as the hooks do it."""

    def __init__(self, cleared=False, skipped=False):
        self.cleared, self.skipped, self.opened = cleared, skipped, 0
        self.passes = BackwardPasses(lambda: self.cleared, lambda: self.skipped, self._open)
        self.weight = nn.Parameter(torch.ones(3))
        self.weight.register_post_accumulate_grad_hook(lambda _: setattr(self.passes.current(), "reached", True))

    def _open(self):
        self.opened += 1

    def run(self, samples=4, anchored=True):
        self.passes.forward_started(samples)
        loss = self.weight.sum()
        if anchored:
            loss.register_hook(lambda _: self.passes.anchor(call(samples=samples)) and None)
        loss.backward()


def test_every_backward_pass_is_one():
    watched = Watched()
    watched.run(4)
    watched.run(2)
    assert watched.opened == 2
    assert [entry.samples for entry in watched.passes.reached] == [4, 2]
    assert watched.passes.forwards == [4, 2]


def test_a_pass_without_a_loss_seen_counts_once_it_reaches_a_parameter():
    watched = Watched()
    watched.run(anchored=False)
    (entry,) = watched.passes.reached
    assert entry.calls == []


def test_a_pass_that_reaches_no_parameter_does_not_count():
    watched = Watched()
    x = torch.ones(2, requires_grad=True)
    loss = x.sum()
    loss.register_hook(lambda _: watched.passes.anchor(call()) and None)
    torch.autograd.grad(loss, x)
    assert watched.passes.reached == []


@pytest.mark.parametrize("skipped", [False, True])
def test_gradients_that_were_thrown_away_begin_anew(skipped):
    """By a gradient scaler, whose step is told; or they were those of another network's loss, not one of ours."""
    watched = Watched(cleared=True, skipped=skipped)
    watched.run(4, anchored=False)
    watched.run(2)
    assert [entry.samples for entry in watched.passes.reached] == [2]
    assert watched.passes.skipped is skipped
    assert len(watched.passes.of_others) == (not skipped)


def test_recorded_losses_whose_pass_never_came_are_forgotten():
    watched = Watched()
    watched.passes.record(call(1.0))
    watched.passes.cleared()  # the backward pass raised
    watched.passes.record(call(2.0))
    assert [float(one.mean) for one in watched.passes.recorded] == [2.0]
    watched.run(4, anchored=False)
    watched.passes.record(call(3.0))  # of a second micro-batch
    assert [float(one.mean) for one in watched.passes.recorded] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("forwards", "rows", "samples"),
    [([4], 4, 4), ([4], 12, 4), ([4, 4], 4, 4), ([4, 2], 6, 6), ([5], 3, 5), ([], 7, 7), ([3, 4], 8, 4)],
)
def test_the_call_that_rows_of_losses_belong_to(forwards, rows, samples):
    watched = Watched()
    for count in forwards:
        watched.passes.forward_started(count)
    assert watched.passes.samples_for(rows) == samples


def test_the_first_error_is_kept():
    watched = Watched()
    watched.passes.failed(MemoryError("first"))
    watched.passes.failed(ValueError("second"))
    assert watched.passes.trouble == ("MemoryError", "first", True, False)


def _mean(logits, labels, _count):
    return functional.cross_entropy(logits, labels)


def _mean_in_16_bits(logits, labels, _count):
    return functional.cross_entropy(logits, labels).bfloat16().double()


def _sum_divided(logits, labels, count):
    return functional.cross_entropy(logits, labels, reduction="sum") / count


def _mean_times_share(logits, labels, count):
    return functional.cross_entropy(logits, labels) * (len(labels) / float(count))


def _written_by_hand(logits, labels, count):
    return -logits.log_softmax(1).gather(1, labels[:, None]).sum() / count


@pytest.mark.parametrize("loss_of", [_mean, _mean_in_16_bits, _sum_divided, _mean_times_share, _written_by_hand])
def test_a_model_is_asked_whether_it_divides_by_the_items_it_is_told(loss_of):
    """Many models of Transformers take ``num_items_in_batch`` and return the mean over the micro-batch all the same."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3).double()

        def forward(self, x, labels, num_items_in_batch=None):
            return {"loss": loss_of(self.head(x), labels, num_items_in_batch)}

    torch.manual_seed(0)
    model = Model()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, backend="gradients")
    expected = []
    for step in range(5):
        sizes = [4, 4, 4, 4] if step % 2 else [4, 4, 2]  # the last of an epoch are fewer, and smaller
        x, labels = torch.randn(sum(sizes), 5).double(), torch.randint(0, 3, (sum(sizes),))
        guided.zero_grad()
        micro = list(zip(x.split(sizes), labels.split(sizes), strict=True))
        with torch.no_grad():
            means = [float(functional.cross_entropy(model.head(a), b)) for a, b in micro]
        weights = [1] * len(sizes) if loss_of in (_mean, _mean_in_16_bits) else sizes
        expected.append(sum(w * mean for w, mean in zip(weights, means, strict=True)) / sum(weights))
        for a, b in micro:
            model(a, labels=b, num_items_in_batch=torch.tensor(len(x)))["loss"].backward()
        guided.step()
    rel = 1e-2 if loss_of is _mean_in_16_bits else 1e-12
    assert [m.loss_start for m in guided.alpha_history] == pytest.approx(expected[:4], rel=rel)
