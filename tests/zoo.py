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


class Products(nn.Module):
    """Attention written by hand, normalised by root mean squares."""

    def __init__(self, dim):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 3)

    def forward(self, x):
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.head((x + self.out(mixed)).mean(1))


class Encoder(nn.Module):
    """torch's own layer, whose attention uses parameters of a child without calling it."""

    def __init__(self, dim):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(dim, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Gap(nn.Module):
    """Token 0 is padding."""

    def __init__(self, dim):
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, dim, padding_idx=0), nn.Linear(dim, 3)
        with torch.no_grad():
            self.embedding.weight[0] = 1.0  # moved by weight decay, never by a gradient

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


class Outside(nn.Module):
    """Uses a layer's parameters without calling it."""

    def __init__(self, dim):
        super().__init__()
        self.inner, self.head = nn.Linear(dim, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(F.linear(x, self.inner.weight, self.inner.bias).tanh())


class TwoHeads(nn.Module):
    """Makes two predictions of six numbers."""

    def __init__(self, first, second):
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, first), nn.Linear(8, second)

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return self.one(hidden), self.two(hidden)


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


class Keywords(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self, dim):
        super().__init__()
        self.inner, self.conv, self.head = nn.Linear(dim, 6), nn.Conv1d(4, 2, 3), nn.Linear(8, 3)

    def forward(self, x):
        rows = self.conv(input=self.inner(input=x).tanh())
        return self.head(input=rows.flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind, dim, **options):
        super().__init__()
        self.cell = kind(dim, 5, batch_first=True, **options)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, 3)

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
        sequential(lambda: nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.Tanh, nn.Flatten, lambda: nn.Linear(64, 3)),
        IMAGE,
    ),
    "conv2d reflect": (
        sequential(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten, lambda: nn.Linear(72, 3)),
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
        sequential(lambda: nn.Conv2d(2, 4, 3), lambda: nn.GroupNorm(2, 4), nn.Flatten, lambda: nn.Linear(64, 3)),
        IMAGE,
    ),
    "bilinear prelu": (sequential(lambda: nn.Linear(6, 4), nn.PReLU, lambda: nn.Linear(4, 3)), VECTOR),
    "attention": (lambda: Attention(6), SEQUENCE),
    "bare parameters": (lambda: Tokens(6), (3, 6)),
    "called twice": (lambda: Twice(6), VECTOR),
    "lstm": (lambda: Recurrent(nn.LSTM, 6), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN, 6), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU, 6), SEQUENCE),
    "deep lstm": (lambda: Recurrent(nn.LSTM, 6, num_layers=2, bidirectional=True), SEQUENCE),
    "conv1d transpose, instance norm": (
        sequential(
            lambda: nn.ConvTranspose1d(4, 3, 3),
            lambda: nn.InstanceNorm1d(3, affine=True),
            nn.Tanh,
            nn.Flatten,
            lambda: nn.Linear(24, 3),
        ),
        SEQUENCE,
    ),
    "instance norm that counts": (
        sequential(
            lambda: nn.ConvTranspose1d(4, 3, 3),
            lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
            nn.Flatten,
            lambda: nn.Linear(24, 3),
        ),
        SEQUENCE,
    ),
    "layers called by keyword": (lambda: Keywords(6), SEQUENCE),
    "conv3d, layer norm over all": (
        sequential(
            lambda: nn.Unflatten(1, (1, 2)),
            lambda: nn.Conv3d(1, 2, (1, 3, 3)),
            lambda: nn.LayerNorm([2, 2, 4, 4]),
            nn.Flatten,
            lambda: nn.Linear(64, 3),
        ),
        IMAGE,
    ),
    "attention by hand": (lambda: Products(6), SEQUENCE),
    "transformer encoder": (lambda: Encoder(6), SEQUENCE),
    "padding": (lambda: Gap(4), "tokens"),
    "weight norm": (
        sequential(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), nn.Tanh, lambda: nn.Linear(3, 3)),
        VECTOR,
    ),
    "rows folded into dimension 0": (lambda: Flattened(6), SEQUENCE),
    "tied embedding": (lambda: Tied(3, 5), "tokens"),
}
NOT_CACHED = {"gru", "deep lstm", "weight norm", "instance norm that counts"}
"""Layers without a rule for vmap, that write to buffers, or whose parameters another module uses than owns them."""


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
