"""The models whose training steps are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field writes it so


class Positions(nn.Module):
    """Adds a learned position to every token."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class Block(nn.Module):
    """Attention and two linear layers, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(samples, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(samples, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next token; the logits are ``[N, T, vocabulary]``."""

    def __init__(self, vocabulary: int = 128, length: int = 64, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), Positions(length, width)
        self.blocks = nn.Sequential(*[Block(width, width // 64) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.positions(self.embedding(x)))))
        return logits


class GPT(nn.Module):
    """Ten million parameters; embedding and head are tied, positions are looked up, logits ``[N, T, vocabulary]``."""

    def __init__(
        self, vocabulary: int = 8192, length: int = 128, width: int = 320, layers: int = 6, heads: int = 5
    ) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(h)))
        return logits


class ViT(nn.Module):
    """Patches of an image behind a class token, both with bare positions."""

    def __init__(self, width: int = 192, layers: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        layer = nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        logits: Tensor = self.head(self.blocks(h)[:, 0])
        return logits


class Residual(nn.Module):
    """Two convolutions with BatchNorm around a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def mlp_1500_700() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1500), nn.ReLU(), nn.Linear(1500, 700), nn.ReLU(), nn.Linear(700, 10))


def half_a_millisecond() -> nn.Module:
    """What a step takes with SGD at batch 64, or with AdamW at 32."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def small() -> nn.Module:
    """A step of a fifth of a millisecond, all of it Python and calls of the library."""
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def resnet(width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


class Case(NamedTuple):
    """A model, what goes in and how many classes come out."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    tokens: bool = False

    def batch(self, samples: int) -> tuple[Tensor, Tensor]:
        """Random data; the cost does not depend on them."""
        generator = torch.Generator().manual_seed(0)
        if self.tokens:
            x = torch.randint(0, self.classes, (samples, *self.shape), generator=generator)
            return x, torch.randint(0, self.classes, (samples, *self.shape), generator=generator)
        x = torch.randn(samples, *self.shape, generator=generator)
        return x, torch.randint(0, self.classes, (samples,), generator=generator)


MODELS = {
    "MLP": Case(mlp, (784,), 10),
    "CNN": Case(cnn, (1, 28, 28), 10),
    "ResNet": Case(resnet, (3, 32, 32), 10),
    "transformer": Case(Transformer, (64,), 128, tokens=True),
    "MLP 1500-700": Case(mlp_1500_700, (784,), 10),
    "GPT": Case(GPT, (128,), 8192, tokens=True),
    "ViT": Case(ViT, (3, 32, 32), 10),
    "small": Case(small, (20,), 10),
    "0.5 ms": Case(half_a_millisecond, (64,), 10),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}
