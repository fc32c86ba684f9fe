"""Models of many kinds for the per-sample oracle: (model, loss module, loss of one sample, batches)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Tokens(nn.Module):
    """Owns bare parameters, like the tokens and positions of a vision transformer."""

    def __init__(self, dim):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 4, dim))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(x.tanh().mean(1))


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Tied(nn.Module):
    """Embedding and output head share their weight."""

    def __init__(self, vocabulary, dim):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.inner = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.inner(self.embedding(x)).tanh()).mean(1)


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x))))


class Recurrent(nn.Module):
    def __init__(self, kind, dim):
        super().__init__()
        self.cell = kind(dim, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Flattened(nn.Module):
    """Rows of a sample are folded into dimension 0 inside the model."""

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.Linear(dim, 6)
        self.conv = nn.Conv1d(1, 2, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        rows = self.layer(x.reshape(-1, x.shape[-1])).tanh()
        rows = self.conv(rows.unsqueeze(1)).flatten(1)
        return self.head(rows.reshape(len(x), -1, 8).sum(1))


def sequential(*layers):
    return lambda: nn.Sequential(*[layer() for layer in layers])


IMAGE, VECTOR, SEQUENCE = (2, 6, 6), (6,), (4, 6)
ZOO = {
    "in-place relu": (
        sequential(lambda: nn.Linear(6, 8), lambda: nn.ReLU(inplace=True), lambda: nn.Linear(8, 3)),
        VECTOR,
    ),
    "conv1d": (
        sequential(lambda: nn.Conv1d(4, 3, 2, stride=2, dilation=2), nn.Flatten, lambda: nn.Linear(6, 3)),
        SEQUENCE,
    ),
    "conv2d groups": (
        sequential(
            lambda: nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.Tanh, nn.Flatten, lambda: nn.Linear(64, 3)
        ),
        IMAGE,
    ),
    "conv2d reflect": (
        sequential(
            lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten, lambda: nn.Linear(72, 3)
        ),
        IMAGE,
    ),
    "conv2d same": (
        sequential(lambda: nn.Conv2d(2, 2, 3, padding="same"), nn.Flatten, lambda: nn.Linear(72, 3)),
        IMAGE,
    ),
    "conv transpose": (
        sequential(lambda: nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Flatten, lambda: nn.Linear(288, 3)),
        IMAGE,
    ),
    "linear of any rank": (
        sequential(lambda: nn.Linear(6, 5), nn.Tanh, nn.Flatten, lambda: nn.Linear(20, 3)),
        SEQUENCE,
    ),
    "group norm": (
        sequential(
            lambda: nn.Conv2d(2, 4, 3), lambda: nn.GroupNorm(2, 4), nn.Flatten, lambda: nn.Linear(64, 3)
        ),
        IMAGE,
    ),
    "bilinear prelu": (sequential(lambda: nn.Linear(6, 4), nn.PReLU, lambda: nn.Linear(4, 3)), VECTOR),
    "attention": (lambda: Attention(6), SEQUENCE),
    "bare parameters": (lambda: Tokens(6), (3, 6)),
    "called twice": (lambda: Twice(6), VECTOR),
    "lstm": (lambda: Recurrent(nn.LSTM, 6), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN, 6), SEQUENCE),
    "rows folded into dimension 0": (lambda: Flattened(6), SEQUENCE),
    "tied embedding": (lambda: Tied(3, 5), "tokens"),
}


def make(name, batch_sizes, dtype=torch.float64, seed=0):
    """Return a model and one batch per entry of ``batch_sizes``, three classes."""
    build, shape = ZOO[name]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed + 1)
    model = build().to(dtype)
    batches = []
    for size in batch_sizes:
        if shape == "tokens":
            x = torch.randint(0, 3, (size, 5), generator=generator)
        else:
            x = torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype)
        batches.append((x, torch.randint(0, 3, (size,), generator=generator)))
    return model, batches


def cross_entropy_of_one(output, y, _index):
    return F.cross_entropy(output, y)
