"""Models that return their loss, made in many ways of torch's loss functions, against one backward pass per sample."""

import copy
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alpha_optim import AlphaGuided
from alpha_optim.slopes.stand_ins import without_dropout
from tests.parity import QUANTITIES
from tests.reference.losses_of_samples import observe
from tests.reference.per_sample_loop import observe_run
from tests.test_per_sample_oracle import check

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
N, CLASSES = 6, 3


def cross(output, y, **options):
    return F.cross_entropy(output, y, reduction="none", **options)


def kl(output, target):
    return F.kl_div(output.log_softmax(1), target.softmax(1), reduction="none").sum(1)


def masked(losses, mask):
    return (losses * mask).sum() / mask.sum()


def added(loss, output, target):
    loss /= 2.0
    loss += 0.3 * (F.mse_loss(output, target) if loss.dim() == 0 else (output - target).square().mean(1))
    return loss


def beside(output, y, target, metric):
    assert metric.dim() == 0
    return F.cross_entropy(output, y)


WAYS = {
    "mean": (lambda o, y, t: F.cross_entropy(o, y), lambda o, y, t: cross(o, y)),
    "sum": (lambda o, y, t: F.cross_entropy(o, y, reduction="sum"), lambda o, y, t: N * cross(o, y)),
    "sum divided": (lambda o, y, t: F.cross_entropy(o, y, reduction="sum") / N, lambda o, y, t: cross(o, y)),
    "weighted": (
        lambda o, y, t: F.cross_entropy(o, y, WEIGHT),
        lambda o, y, t: cross(o, y, weight=WEIGHT) * N / WEIGHT[y].sum(),
    ),
    "ignored": (
        lambda o, y, t: F.cross_entropy(o, y, ignore_index=1),
        lambda o, y, t: cross(o, y, ignore_index=1) * N / (y != 1).sum(),
    ),
    "smoothed": (
        lambda o, y, t: F.cross_entropy(o, y, label_smoothing=0.2),
        lambda o, y, t: cross(o, y, label_smoothing=0.2),
    ),
    "nll": (lambda o, y, t: F.nll_loss(o.log_softmax(1), y), lambda o, y, t: cross(o, y)),
    "mse": (lambda o, y, t: F.mse_loss(o, t), lambda o, y, t: (o - t).square().mean(1)),
    "mse, summed": (lambda o, y, t: F.mse_loss(o, t, reduction="sum"), lambda o, y, t: N * (o - t).square().sum(1)),
    "l1": (lambda o, y, t: F.l1_loss(o, t), lambda o, y, t: (o - t).abs().mean(1)),
    "bce": (
        lambda o, y, t: F.binary_cross_entropy_with_logits(o, t.sigmoid()),
        lambda o, y, t: F.binary_cross_entropy_with_logits(o, t.sigmoid(), reduction="none").mean(1),
    ),
    "kl": (lambda o, y, t: F.kl_div(o.log_softmax(1), t.softmax(1), reduction="batchmean"), lambda o, y, t: kl(o, t)),
    "kl, mean": (lambda o, y, t: F.kl_div(o.log_softmax(1), t.softmax(1)), lambda o, y, t: kl(o, t) / CLASSES),
    "two": (
        lambda o, y, t: F.cross_entropy(o, y) + F.mse_loss(o, t),
        lambda o, y, t: cross(o, y) + (o - t).square().mean(1),
    ),
    "scaled": (lambda o, y, t: 3.0 * F.cross_entropy(o, y), lambda o, y, t: 3.0 * cross(o, y)),
    "two with other weights": (
        lambda o, y, t: F.cross_entropy(o, y) + 0.3 * F.mse_loss(o, t),
        lambda o, y, t: cross(o, y) + 0.3 * (o - t).square().mean(1),
    ),
    "two sums, divided": (
        lambda o, y, t: (F.cross_entropy(o, y, reduction="sum") - 0.3 * F.mse_loss(o, t, reduction="sum")) / N,
        lambda o, y, t: cross(o, y) - 0.3 * (o - t).square().sum(1),
    ),
    "not reduced": (lambda o, y, t: cross(o, y).mean(), lambda o, y, t: cross(o, y)),
    "masked by hand": (
        lambda o, y, t: masked(cross(o, y), y != 1),
        lambda o, y, t: cross(o, y) * (y != 1) * N / (y != 1).sum(),
    ),
    "masked elements, and a mean": (
        lambda o, y, t: (
            0.2 * F.cross_entropy(o, y) + (F.l1_loss(o, t, reduction="none") * (t > 0)).sum() / (t > 0).sum()
        ),
        lambda o, y, t: 0.2 * cross(o, y) + ((o - t).abs() * (t > 0)).sum(1) * N / (t > 0).sum(),
    ),
    "changed in place": (lambda o, y, t: added(F.cross_entropy(o, y), o, t), lambda o, y, t: added(cross(o, y), o, t)),
    "beside a metric": (lambda o, y, t: beside(o, y, t, F.l1_loss(o, t)), lambda o, y, t: cross(o, y)),
    "beside a metric, detached": (
        lambda o, y, t: beside(o, y, t, F.l1_loss(o.detach(), t)),
        lambda o, y, t: cross(o, y),
    ),
    "beside a metric without gradients": (
        lambda o, y, t: beside(o, y, t, torch.no_grad()(F.l1_loss)(o, t)),
        lambda o, y, t: cross(o, y),
    ),
}


class Returns(nn.Module):
    """Returns its output and its loss."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x, y, target):
        output = self.second(torch.tanh(self.first(x)))
        return output, self.loss(output, y, target)


def batches(count, samples=N):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x, target = (torch.randn(samples, width, generator=generator, dtype=torch.float64) for width in (4, CLASSES))
        yield x, torch.randint(0, CLASSES, (samples,), generator=generator), target


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.02)


def train(model, count=4, samples=N, base=adamw, **options):
    guided = AlphaGuided(base(model), model, **options)
    for batch in batches(count, samples):
        guided.zero_grad()
        model(*batch)[1].backward()
        guided.step()
    return list(guided.alpha_history)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("base", [adamw, sgd])
@pytest.mark.parametrize("name", WAYS)
def test_samples_of_the_loss_inside_are_those_of_one_backward_pass_each(name, base):
    loss, each = WAYS[name]
    torch.manual_seed(0)
    model = Returns(loss).double()
    twin = copy.deepcopy(model)

    def losses_of_samples(batch):
        return each(twin(*batch)[0], *batch[1:])

    expected = observe(losses_of_samples, base(twin), batches(4))
    assert set(QUANTITIES) >= {"slope_variance_start", "loss_variance_start", "slope_variance_end", "loss_variance_end"}
    seen = train(model, base=base, variance="exact")
    # Plain SGD begins on its fast path, which sees no losses inside the model, and leaves it after one step.
    late = base is sgd
    assert [m.information for m in seen[:late]] == ["slopes+variances"] * late
    check(seen[late:], expected[late:])


def variances(loss, **options):
    torch.manual_seed(0)
    return [m.slope_variance_start for m in train(Returns(loss).double(), 6, samples=64, **options)]


@pytest.mark.parametrize(
    "total",
    [
        lambda o, y, t: F.cross_entropy(o, y, reduction="sum") / 64,
        lambda o, y, t: 2.5 * F.nll_loss(o.log_softmax(1), y, reduction="sum") / 160,
        lambda o, y, t: 0.3 * F.cross_entropy(o, y) + 0.7 * F.cross_entropy(o, y),
    ],
)
def test_a_sum_of_which_some_samples_have_a_share_has_the_variances_of_the_mean(total):
    """Later on 16 of 64 samples are run, whose sum is a quarter of the whole."""
    of_mean = variances(lambda o, y, t: F.cross_entropy(o, y), variance="sampled")
    assert of_mean[3] != pytest.approx(variances(lambda o, y, t: F.cross_entropy(o, y), variance="exact")[3], rel=1e-3)
    assert variances(total, variance="sampled") == pytest.approx(of_mean, rel=1e-8)


@pytest.mark.parametrize("name", ["mse, summed", "bce"])
def test_sampled_variances_are_those_of_all_samples_but_for_chance(name):
    loss = WAYS[name][0]
    sampled, exact = variances(loss, variance="sampled")[2:], variances(loss, variance="exact")[2:]
    assert sum(sampled) == pytest.approx(sum(exact), rel=0.7)  # of 16 samples, with heavy tails
    assert sampled != pytest.approx(exact, rel=1e-3)


def test_a_batch_part_in_which_nothing_counts_is_no_sign_that_samples_interact():
    """Of the samples that are run by themselves none has a target; the next batch tells."""
    torch.manual_seed(0)
    model = Returns(lambda o, y, t: F.cross_entropy(o, y, ignore_index=1)).double()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.02), model)
    for n, (x, _, target) in enumerate(batches(6, samples=8)):
        y = torch.tensor([0, 1, 2, 1, 0, 1, 2, 1]) if n == 0 else torch.arange(8) % 3
        guided.zero_grad()
        model(x, y, target)[1].backward()
        guided.step()
    assert {m.information for m in guided.alpha_history} == {"full"}


OTHERS = {
    "a term of the output": lambda o, y, t: F.cross_entropy(o, y) + 0.1 * o.logsumexp(1).square().mean(),
    "a small one": lambda o, y, t: F.cross_entropy(o, y) + 0.02 * o.logsumexp(1).square().mean(),
    "a power": lambda o, y, t: F.cross_entropy(o, y) ** 2,
    "not all rows": lambda o, y, t: F.cross_entropy(o[:-2], y[:-2]),
}


@pytest.mark.parametrize("variance", ["exact", "sampled"])
@pytest.mark.parametrize("name", OTHERS)
def test_terms_beside_the_loss_inside_are_told_and_never_taken_for_it(name, variance):
    torch.manual_seed(0)
    model = Returns(OTHERS[name]).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured = train(model, 6, variance=variance)
    assert {m.information for m in measured} == {"slopes"}
    said = [str(warning.message) for warning in caught]
    assert len(said) == 1, said
    assert "not all of the loss" in said[0] or "neither the samples" in said[0], said


@pytest.mark.parametrize("named", [True, False])
def test_attention_without_dropout_is_the_same_attention(named):
    """Whatever else it was called with."""
    q, k, v = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    args = (q, k, v) if named else (q, k, v, None, 0.5)
    kwargs = {"is_causal": True} | ({"dropout_p": 0.5} if named else {})
    args, kwargs = without_dropout(F.scaled_dot_product_attention, args, kwargs)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(F.scaled_dot_product_attention(*args, **kwargs), expected)


class Answer:
    """Anything with attributes; it leads back to itself."""

    def __init__(self, output, loss):
        self.output, self.loss, self.itself = output, loss, self


@pytest.mark.parametrize("build", [Answer, lambda output, loss: types.SimpleNamespace(output=output, loss=loss)])
def test_a_loss_in_an_object_of_any_class_is_seen(build):
    class InAnObject(Returns):
        def forward(self, x, y, target):
            return build(*super().forward(x, y, target))

    histories = []
    for kind in (Returns, InAnObject):
        torch.manual_seed(0)
        model = kind(lambda output, y, target: F.cross_entropy(output, y)).double()
        guided = AlphaGuided(adamw(model), model, variance="exact")
        for batch in batches(4):
            guided.zero_grad()
            answer = model(*batch)
            (answer[1] if kind is Returns else answer.loss).backward()
            guided.step()
        histories.append(guided.alpha_history.to_dict())
    assert set(histories[1]["information"]) == {"full"}
    assert histories[0] == histories[1]


@pytest.mark.parametrize("variance", ["sampled", "exact"])
def test_a_model_that_returns_a_distribution(variance):
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Linear(4, 6)

        def forward(self, x):
            mean, deviation = self.trunk(x).chunk(2, dim=1)
            return torch.distributions.Normal(mean, deviation.exp())

    torch.manual_seed(0)
    model = Gaussian().double()
    twin = copy.deepcopy(model)
    given = [(x, target[:, :3]) for x, _, target in batches(4)]
    mean_loss = lambda dist, y: -dist.log_prob(y).sum(1).mean()  # noqa: E731
    of_one = lambda dist, y, _: -dist.log_prob(y).sum()  # noqa: E731
    expected = observe_run(twin, of_one, mean_loss, adamw(twin), given)
    guided = AlphaGuided(adamw(model), model, variance=variance)
    for x, y in given:
        guided.zero_grad()
        guided.backward(-model(x).log_prob(y).sum(1))
        guided.step()
    assert {m.information for m in guided.alpha_history} == {"full"}
    for m, row in zip(guided.alpha_history, expected, strict=True):
        for name, value in row.items():
            if variance == "exact" or "variance" not in name:
                assert getattr(m, name) == pytest.approx(value, rel=1e-9), name
