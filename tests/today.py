"""What people train today, small: how a model is built, a batch made, its loss computed, and what a sample's loss is.

Every case is a `Case`; ``loss(optimizer, model, loss_fn, batch)`` runs the loop's forward and backward pass in the way
the case is named after, ``of_samples(model, batch)`` gives the losses of the samples ``[N]`` with their graph, whose
mean is that loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

V, T, N = 17, 12, 6
IGNORED = -100


class Block(nn.Module):
    def __init__(self, width, dropout=0.0, mask=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.p = dropout
        if mask:
            self.register_buffer("mask", torch.full((T, T), -math.inf).triu(1), persistent=False)
        self.masked = mask

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        if self.masked:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + self.mask[:t, :t]
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(b, t, c)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Tied embedding and head, positions from ``arange``; may return its loss, as nanoGPT does."""

    def __init__(self, width=8, layers=2, dropout=0.0, checkpointed=False, mask=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, width), nn.Embedding(T, width)
        self.blocks = nn.ModuleList([Block(width, dropout, mask) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, V, bias=False)
        self.head.weight = self.wte.weight
        self.dropout, self.checkpointed = nn.Dropout(dropout), checkpointed

    def forward(self, x, targets=None):
        h = self.dropout(self.wte(x) + self.wpe(torch.arange(x.shape[1])))
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.checkpointed else block(h)
        logits = self.head(self.norm(h))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=IGNORED)


class SquareWithoutForwardRule(torch.autograd.Function):
    """A function that only a backward pass can differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2.0 * x * gradient


class Checkpointed(nn.Module):
    """A part of it is checkpointed, and has no forward derivative."""

    def __init__(self, reentrant):
        super().__init__()
        self.below, self.part, self.above = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x):
        def square(h):
            return SquareWithoutForwardRule.apply(torch.tanh(self.part(h)))

        return self.above(checkpoint(square, self.below(x), use_reentrant=self.reentrant))


class Normalised(nn.Module):
    """By numbers that are computed without gradients; with dropout no check could tell if they were differentiated."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.below, self.above, self.dropout = nn.Linear(6, 8), nn.Linear(8, 3), nn.Dropout(dropout)

    @torch.no_grad()
    def scale(self, h):
        return h.abs().mean(1, keepdim=True)

    def forward(self, x):
        h = self.below(x)
        h = h / (self.scale(h) + 0.1)
        with torch.no_grad():
            h.mul_(h > -1.0)  # seen by no backward pass
            shift = h.mean(1, keepdim=True)
        return self.above(self.dropout(torch.tanh(h + shift)))


class Bags(nn.Module):
    """A bag of words; texts of unlike lengths lie one after the other, or side by side."""

    def __init__(self, mode):
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(V, 8, mode=mode, padding_idx=0), nn.Linear(8, 3)

    def forward(self, x, offsets=None):
        return self.head(torch.tanh(self.embed(x, offsets)))


class Recurrent(nn.Module):
    """A language model that may be fed time first and carries its state over."""

    def __init__(self, kind, batch_first=True, width=8):
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.cell = kind(width, width, batch_first=batch_first)
        self.head = nn.Linear(width, V)

    def forward(self, x, state=None):
        h, state = self.cell(self.embed(x), state)
        return self.head(h), state


class Experts(nn.Module):
    """Tokens are routed to the better of three experts; the balance of the router may be penalised."""

    def __init__(self, width=8):
        super().__init__()
        self.embed, self.router = nn.Embedding(V, width), nn.Linear(width, 3)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.head = nn.Linear(width, V)
        self.balance = None

    def forward(self, x):
        h = self.embed(x).flatten(0, 1)
        gates = self.router(h).softmax(-1)
        best, where = gates.max(-1)
        routed = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.nonzero(where == number, as_tuple=True)
            if len(rows):
                routed = routed.index_add(0, rows, best[rows, None] * expert(h[rows]).tanh())
        self.balance = (gates.mean(0) * torch.bincount(where, minlength=3) / len(h)).sum()
        return self.head((h + routed).view(*x.shape, -1))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(10, 8), nn.Linear(4, 10)

    def forward(self, x):
        mean, log_variance = self.encode(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decode(z), mean, log_variance


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.down2 = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        skip = self.down1(x)
        return self.out(torch.cat([skip, self.up(self.down2(skip))], 1))


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, adjacency):
        return torch.sparse.mm(adjacency, self.second(torch.sparse.mm(adjacency, self.first(x)).relu()))


class Pooled(Graph):
    """Predicts one thing per graph; the graphs of a batch lie one after the other in its nodes."""

    def forward(self, x, adjacency, graph, count):
        nodes = super().forward(x, adjacency)
        return torch.zeros(count, 3, dtype=x.dtype).index_add(0, graph, nodes)


@dataclass
class Case:
    """A way of training."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, torch.dtype], Any]
    loss: Callable[[Any, nn.Module, Any, Any], Any]
    of_samples: Callable[[nn.Module, Any], torch.Tensor] | None
    loss_fn: Callable[[], nn.Module | None] = lambda: None
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = N
    lr: float = 0.02


def tokens(generator, dtype, samples=N, padded=False):
    x = torch.randint(0, V, (samples, T), generator=generator)
    y = torch.randint(0, V, (samples, T), generator=generator)
    if padded:
        lengths = torch.randint(2, T + 1, (samples, 1), generator=generator)
        y[torch.arange(T) >= lengths] = IGNORED
    return x, y


def rows_to_samples(rows, y):
    """Losses [N, T] of tokens, 0 where ignored -> those of samples; their mean is that over the tokens that count."""
    return rows.sum(1) * len(y) / (y != IGNORED).sum()


def language(model, batch):
    x, y = batch
    output = model(x)
    logits = output[0] if isinstance(output, tuple) else output
    rows = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="none")
    return rows_to_samples(rows.view(y.shape), y)


def flattened(optimizer, model, loss_fn, batch):
    x, y = batch
    output = model(x)
    logits = output[0] if isinstance(output, tuple) else output
    loss = loss_fn(logits.view(-1, V), y.view(-1))
    loss.backward()


def transposed(optimizer, model, loss_fn, batch):
    x, y = batch
    loss_fn(model(x).transpose(1, 2), y).backward()


def functional(optimizer, model, loss_fn, batch):
    x, y = batch
    losses = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    if hasattr(optimizer, "alpha_history"):
        optimizer.backward(losses)
    else:
        losses.mean().backward()


def recorded(optimizer, model, loss_fn, batch):
    x, y = batch
    losses = F.cross_entropy(model(x).view(-1, V), y.view(-1), reduction="none")
    losses.mean().backward()
    if hasattr(optimizer, "alpha_history"):
        optimizer.record_losses(losses.detach())


def returned(optimizer, model, loss_fn, batch):
    model(*batch)[1].backward()


def carried(optimizer, model, loss_fn, batch):
    x, y, state = batch
    logits, _ = model(x, state)
    loss_fn(logits.flatten(0, 1), y.flatten()).backward()


def carried_batch(kind, batch_first):
    def make(generator, dtype):
        shape = (N, T) if batch_first else (T, N)
        x, y = (torch.randint(0, V, shape, generator=generator) for _ in range(2))
        state = torch.randn(1, N, 8, generator=generator, dtype=torch.float64).to(dtype)
        return x, y, (state, state.tanh()) if kind is nn.LSTM else state

    return make


def carried_samples(batch_first):
    def of_samples(model, batch):
        x, y, state = batch
        logits, _ = model(x, state)
        rows = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        return rows.mean(1 if batch_first else 0)

    return of_samples


def vae_losses(model, x):
    decoded, mean, log_variance = model(x)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return (decoded - x).square().sum(1) + divergence


def vae_loop(optimizer, model, loss_fn, x):
    losses = vae_losses(model, x)
    optimizer.backward(losses) if hasattr(optimizer, "alpha_history") else losses.mean().backward()


def images(generator, dtype):
    x, y = (torch.randn(N, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, y


def image_loop(optimizer, model, loss_fn, batch):
    x, y = batch
    loss_fn(model(x), y).backward()


def adjacency(nodes, generator, dtype):
    dense = (torch.rand(nodes, nodes, generator=generator) < 0.3).to(dtype) + torch.eye(nodes, dtype=dtype)
    return (dense / dense.sum(1, keepdim=True)).to_sparse()


def graph(generator, dtype):
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x, adjacency(20, generator, dtype), torch.randint(0, 3, (20,), generator=generator)


def graph_loop(optimizer, model, loss_fn, batch):
    x, links, y = batch
    loss_fn(model(x, links), y).backward()


def graphs(generator, dtype):
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64).to(dtype)
    belongs = torch.arange(20) // 5
    return x, adjacency(20, generator, dtype), belongs, torch.randint(0, 3, (4,), generator=generator)


def graphs_loop(optimizer, model, loss_fn, batch):
    x, links, belongs, y = batch
    loss_fn(model(x, links, belongs, 4), y).backward()


def vectors(generator, dtype):
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (N,), generator=generator)


def vector_loop(optimizer, model, loss_fn, batch):
    x, y = batch
    loss_fn(model(x), y).backward()


def classes(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def normalised(norm):
    return lambda: nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


def bags(generator, dtype):
    return torch.randint(0, V, (N, T), generator=generator), torch.randint(0, 3, (N,), generator=generator)


def texts(generator, dtype):
    lengths = torch.randint(1, T, (N,), generator=generator)
    words = torch.randint(0, V, (int(lengths.sum()),), generator=generator)
    return words, lengths.cumsum(0) - lengths, torch.randint(0, 3, (N,), generator=generator)


def texts_loop(optimizer, model, loss_fn, batch):
    words, offsets, y = batch
    loss_fn(model(words, offsets), y).backward()


def padded(generator, dtype):
    return tokens(generator, dtype, padded=True)


CROSS = nn.CrossEntropyLoss
CASES = {
    "gpt, flattened": Case(GPT, tokens, flattened, language, CROSS),
    "gpt, transposed": Case(GPT, tokens, transposed, language, CROSS),
    "gpt, functional by backward": Case(GPT, tokens, functional, language),
    "gpt, functional, recorded": Case(GPT, tokens, recorded, language),
    "gpt, returns its loss": Case(GPT, tokens, returned, language),
    "gpt, returns its loss, padded": Case(GPT, padded, returned, language),
    "gpt, padded": Case(GPT, padded, flattened, language, CROSS),
    "gpt, sum over tokens": Case(
        GPT, padded, lambda o, m, f, b: (f(m(b[0]).view(-1, V), b[1].view(-1)) / (b[1] != IGNORED).sum()).backward(),
        language, lambda: CROSS(reduction="sum"),
    ),
    "gpt, dropout": Case(lambda: GPT(dropout=0.2), tokens, flattened, None, CROSS),
    "gpt, dropout, 24 samples": Case(
        lambda: GPT(dropout=0.2), lambda g, d: tokens(g, d, 24), flattened, None, CROSS, samples=24
    ),
    "gpt, checkpointed": Case(lambda: GPT(checkpointed=True), tokens, flattened, language, CROSS),
    "checkpointed, no forward rule": Case(lambda: Checkpointed(False), vectors, vector_loop, classes, CROSS),
    "checkpointed, reentrant": Case(lambda: Checkpointed(True), vectors, vector_loop, None, CROSS),
    "a part without gradients": Case(Normalised, vectors, vector_loop, classes, CROSS),
    "a part without gradients, dropout": Case(lambda: Normalised(0.3), vectors, vector_loop, classes, CROSS),
    "bags of words": Case(lambda: Bags("mean"), bags, vector_loop, classes, CROSS),
    "bags of words, one after the other": Case(
        lambda: Bags("sum"), texts, texts_loop,
        lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2], reduction="none"), CROSS,
    ),
    "gpt, mask as buffer": Case(lambda: GPT(mask=True), tokens, flattened, language, CROSS),
    "gpt, 24 samples": Case(GPT, lambda g, d: tokens(g, d, 24), flattened, language, CROSS, samples=24),
    "lstm": Case(lambda: Recurrent(nn.LSTM), tokens, flattened, language, CROSS),
    "gru": Case(lambda: Recurrent(nn.GRU), tokens, flattened, language, CROSS),
    "lstm, state carried over": Case(
        lambda: Recurrent(nn.LSTM), carried_batch(nn.LSTM, True), carried, carried_samples(True), CROSS
    ),
    "gru, time first, state carried over": Case(
        lambda: Recurrent(nn.GRU, False), carried_batch(nn.GRU, False), carried, carried_samples(False), CROSS,
        {"sample_dim": 1},
    ),
    "routed experts": Case(Experts, tokens, flattened, language, CROSS),
    "vae": Case(VAE, lambda g, d: torch.randn(N, 10, generator=g, dtype=torch.float64).to(d), vae_loop, None),
    "u-net": Case(
        UNet, images, image_loop, lambda m, b: (m(b[0]) - b[1]).square().flatten(1).mean(1), nn.MSELoss
    ),
    "graph": Case(
        Graph, graph, graph_loop, lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2], reduction="none"), CROSS,
        samples=20,
    ),
    "graphs, pooled": Case(
        Pooled, graphs, graphs_loop,
        lambda m, b: F.cross_entropy(m(b[0], b[1], b[2], 4), b[3], reduction="none"), CROSS, samples=4,
    ),
    "weight norm": Case(normalised(nn.utils.parametrizations.weight_norm), vectors, vector_loop, classes, CROSS),
    "spectral norm": Case(normalised(nn.utils.parametrizations.spectral_norm), vectors, vector_loop, None, CROSS),
}  # fmt: skip
