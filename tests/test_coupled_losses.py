"""Loss functions of one's own that tell nothing of single samples: those that couple them give no variances."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alpha_optim import AlphaGuided
from tests.test_transparency import equal_states

N, CLASSES = 24, 4


class Own(nn.Module):
    """A loss module without ``reduction``."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def info_nce(one, other):
    similar = F.normalize(one, dim=1) @ F.normalize(other, dim=1).t() / 0.2
    labels = torch.arange(len(one))
    return (F.cross_entropy(similar, labels) + F.cross_entropy(similar.t(), labels)) / 2


def dice(logits, y):
    chosen, p = F.one_hot(y, CLASSES), logits.sigmoid()
    return 1.0 - (2.0 * (p * chosen).sum() + 1.0) / (p.sum() + chosen.sum() + 1.0)


def focal(logits, y):
    p = logits.softmax(1).gather(1, y[:, None]).squeeze(1)
    return (-((1.0 - p) ** 2) * p.log()).mean()


def masked(logits, y):
    mask = (y != 0).to(logits.dtype)
    return (F.cross_entropy(logits, y, reduction="none") * mask).sum() / mask.sum()


def decorrelated(one, other):
    """As in Barlow Twins: statistics over the batch."""
    one, other = ((z - z.mean(0)) / (z.std(0) + 1e-3) for z in (one, other))
    return (one.t() @ other / len(one) - torch.eye(one.shape[1])).square().sum()


COUPLED = {
    "InfoNCE of two calls": (info_nce, "two calls"),
    "Barlow Twins": (decorrelated, "two calls"),
    "root of a mean": (lambda out, y: (out - F.one_hot(y, CLASSES)).square().mean().sqrt(), "targets"),
    "Dice": (dice, "targets"),
    "variance of outputs": (lambda out, y: out.var(0).sum() + F.cross_entropy(out, y), "targets"),
}
APART = {
    "cross entropy": (F.cross_entropy, "targets"),
    "focal": (focal, "targets"),
    "masked mean": (masked, "targets"),
    "squares": (lambda out, y: (out - F.one_hot(y, CLASSES)).square().sum(1).mean(), "targets"),
    "absolute values": (lambda out, y: (out - F.one_hot(y, CLASSES)).abs().mean(), "targets"),
    "a pair of calls": (lambda one, other: (one - other).square().mean() + one.exp().mean(), "two calls"),
    "a triplet": (lambda one, other: F.triplet_margin_loss(one, other, other.flip(1), 1.0), "two calls"),
}


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES)).to(dtype)


def train(function, kind, wrapped, build=torch.optim.AdamW, **options):
    model, loss_fn = model_of(), Own(function)
    optimizer = build(model.parameters(), lr=1e-2)
    if wrapped:
        optimizer = AlphaGuided(optimizer, model, loss_fn, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        x, y = torch.randn(N, 6, generator=generator), torch.randint(CLASSES, (N,), generator=generator)
        optimizer.zero_grad()
        other = y if kind == "targets" else model(x + 0.1 * torch.randn(N, 6, generator=generator))
        loss_fn(model(x), other).backward()
        optimizer.step()
    return model, optimizer, torch.rand(1, generator=generator)


def watched(function, kind, build, variance):
    """The wrapped optimizer of a run that ends as the bare one does, and the one warning that it gave."""
    bare, _, _ = train(function, kind, False, build)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, guided, _ = train(function, kind, True, build, variance=variance)
    assert equal_states(bare.state_dict(), model.state_dict())
    (said,) = [str(warning.message) for warning in caught]
    return guided, said


@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("variance", ["sampled", "exact"])
@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_a_loss_couples_have_no_variance_and_one_warning_says_so(name, variance, build):
    guided, said = watched(*COUPLED[name], build, variance)
    assert "samples interact" in said
    assert {m.information for m in guided.alpha_history} == {"slopes"}


@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("variance", ["sampled", "exact"])
@pytest.mark.parametrize("name", APART)
def test_sums_over_samples_keep_the_variances_of_their_slopes(name, variance, build):
    guided, said = watched(*APART[name], build, variance)
    assert "gives no losses of single samples" in said
    assert "slopes only" not in said
    assert guided.alpha_history[-1].information == "slopes+variances"


def test_a_loss_that_cannot_be_differentiated_twice_is_taken_at_its_word():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            ctx.save_for_backward(out)
            return out.square().mean()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            (out,) = ctx.saved_tensors
            return gradient * 2.0 * out / out.numel()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, guided, _ = train(lambda out, y: Once.apply(out), "targets", True)
    bare, _, _ = train(lambda out, y: Once.apply(out), "targets", False)
    assert guided.alpha_history[-1].information == "slopes+variances"
    assert equal_states(bare.state_dict(), model.state_dict())


def test_a_language_model_with_a_loss_module_of_its_own_is_a_sum_over_its_sequences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12))
    loss_fn = Own(lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-2), model, loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6):
            tokens = torch.randint(12, (10, 9))
            guided.zero_grad()
            loss_fn(model(tokens[:, :-1]), tokens[:, 1:]).backward()
            guided.step()
    assert guided.alpha_history[-1].information == "slopes+variances"
