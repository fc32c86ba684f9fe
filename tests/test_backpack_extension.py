"""The BackPACK extension, used as BackPACK's own are, against a loop over samples."""

import pytest
import torch
from backpack import backpack, extend
from torch import nn

from alpha_optim.slopes.backpack_extension import SlopesAlong

NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (7, 6)),
    "wide": (lambda: nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 3, bias=False)), (4, 60)),
    "rows": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)), (7, 4, 6)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
        (5, 2, 6, 6),
    ),
    "circular": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)
        ),
        (4, 2, 5, 5),
    ),
    "same": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        (4, 2, 6),
    ),
    "transposed in groups": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, groups=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(256, 3),
        ),
        (4, 4, 3, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(28, 3)),
        (5, 2, 5),
    ),
}


def one_by_one(model, loss_fn, x, y):
    """Gradient of every sample's share of the mean loss."""
    shares = []
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1]) / len(x)
        shares.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(column) for column in zip(*shares, strict=True)]


@pytest.mark.parametrize("own", [False, True], ids=["given changes", "own gradient"])
@pytest.mark.parametrize("name", NETS)
def test_equals_the_loop_over_samples(name, own):
    torch.manual_seed(0)
    build, shape = NETS[name]
    model, loss_fn = build().double(), nn.CrossEntropyLoss()
    x, y = torch.randn(shape, dtype=torch.float64), torch.randint(3, shape[:1])
    x.requires_grad_()  # torch warns of BackPACK's hooks otherwise
    gradients = one_by_one(model, loss_fn, x, y)
    params = list(model.parameters())
    changes = [g.sum(0) for g in gradients] if own else [torch.randn_like(param) for param in params]

    extend(model)
    with backpack(SlopesAlong(None if own else dict(zip(params, changes, strict=True)))):
        extend(loss_fn)(model(x), y).backward()

    for param, gradient, change in zip(params, gradients, changes, strict=True):
        expected = (gradient.flatten(1) @ change.flatten()).double()
        torch.testing.assert_close(param.slopes_along, expected, rtol=1e-10, atol=1e-12)
        assert param.slopes_along.shape == (len(x),)
        torch.testing.assert_close(param.slopes_along.sum(), (param.grad * change).sum())


def test_a_parameter_without_a_change_does_not_move():
    model, loss_fn = extend(nn.Sequential(nn.Linear(4, 3))), extend(nn.CrossEntropyLoss())
    with backpack(SlopesAlong({model[0].bias: torch.ones(3)})):
        loss_fn(model(torch.randn(5, 4, requires_grad=True)), torch.randint(3, (5,))).backward()
    assert torch.equal(model[0].weight.slopes_along, torch.zeros(5, dtype=torch.float64))
    assert model[0].bias.slopes_along.abs().sum() > 0


def test_layers_without_a_rule_are_named():
    model, loss_fn = extend(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))), extend(nn.CrossEntropyLoss())
    with backpack(SlopesAlong()), pytest.warns(UserWarning, match="LayerNorm"):
        loss_fn(model(torch.randn(5, 4, requires_grad=True)), torch.randint(3, (5,))).backward()
