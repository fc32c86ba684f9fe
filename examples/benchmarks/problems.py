"""The problems of the study of learning rates: data, network, batch size, length."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.benchmarks.models import Transformer
from examples.data import Data, digits, load

VOCABULARY = 128


class Split(NamedTuple):
    """Data with a part kept apart on which rates are chosen; inputs and targets in dimension 0."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Problem(NamedTuple):
    """Something to train.

    Attributes:
        data: Loads the data.
        build: Makes the network.
        batch: Samples per mini-batch.
        steps: Optimizer steps of a run.
        accuracy: Whether the figure is test accuracy in %, else the test loss.
        loss: Losses ``[N]`` or their mean ``[]`` of model, inputs and targets; None if it is `loss_fn` of the output.
        clip: Norm to which gradients are clipped; None if they are not.
        bases: Optimizers that are tried; None if all are.
        peers: Other methods that are tried; None if all are.
    """

    data: Callable[[], Split]
    build: Callable[[], nn.Module]
    batch: int
    steps: int
    accuracy: bool
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    clip: float | None = None
    bases: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None

    def loss_fn(self) -> nn.Module:
        """Cross entropy for classes, else the mean squared error."""
        targets = self.data().train[1]
        return nn.MSELoss() if targets.is_floating_point() else nn.CrossEntropyLoss()


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1568, 10),
    )  # fmt: skip


def digits_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def digits_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


class RowsTransformer(nn.Module):
    """Attention over the eight rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.positions = nn.Linear(8, 32), nn.Parameter(0.02 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.rows(x.reshape(-1, 8, 8)) + self.positions).mean(1))
        return logits


class Recurrent(nn.Module):
    """Predicts the next character by a GRU or LSTM; the logits are ``[N, vocabulary, T]``."""

    def __init__(self, cell: type[nn.GRU | nn.LSTM], inner: int, outer: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, inner)
        self.cell, self.head = cell(inner, outer, batch_first=True), nn.Linear(outer, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cell(self.embedding(x))[0])
        return logits.transpose(1, 2)


@lru_cache(maxsize=1)
def fashion() -> Split:
    data = load()
    if data.name != "Fashion-MNIST":
        raise SystemExit(
            "the study needs Debian's package dataset-fashion-mnist: apt-get install dataset-fashion-mnist"
        )
    return apart(data, 10_000)


@lru_cache(maxsize=1)
def digit_images() -> Split:
    return apart(digits(), 240)


def apart(data: Data, kept: int) -> Split:
    """The last ``kept`` training samples for choosing rates."""
    x, y = data.x_train, data.y_train
    return Split((x[:-kept], y[:-kept]), (x[-kept:], y[-kept:]), (data.x_test, data.y_test))


@lru_cache(maxsize=1)
def friedman() -> Split:
    """Friedman's first function of ten inputs with noise, its values scaled to variance 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6000, 10, generator=generator)
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = (y + torch.randn(len(y), generator=generator) - y.mean()) / y.std()
    return in_three(x, y.unsqueeze(1), 1000)


@lru_cache(maxsize=1)
def ill_conditioned() -> Split:
    """Linear least squares whose curvatures span three decades, with noisy targets: a noisy quadratic."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1.5, 100)
    x = torch.randn(8000, 100, generator=generator) * scales
    weight = torch.randn(100, 1, generator=generator) / scales.sqrt().unsqueeze(1)
    y = x @ weight + torch.randn(8000, 1, generator=generator)
    return in_three(x, y, 2000)


@lru_cache(maxsize=1)
def text(length: int) -> Split:
    """Pieces of the source of Python's standard library, a character per token, next one as target."""
    folder = Path(json.__file__).parents[1]
    names = ("argparse", "ast", "datetime", "decimal", "difflib", "inspect", "pickle", "statistics", "typing")
    files = [folder / f"{name}.py" for name in names]
    source = b"".join(file.read_bytes() for file in files if file.exists())
    values = torch.frombuffer(bytearray(source), dtype=torch.uint8).long().clamp_max(VOCABULARY - 1)
    count = (len(values) - 1) // length
    x, y = (
        values[: count * length].reshape(count, length),
        values[1 : count * length + 1].reshape(count, length),
    )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return in_three(x[order], y[order], count // 10)


def in_three(x: Tensor, y: Tensor, kept: int) -> Split:
    """The last samples for testing, those before them for choosing rates."""
    first, second = len(x) - 2 * kept, len(x) - kept
    return Split((x[:first], y[:first]), (x[first:second], y[first:second]), (x[second:], y[second:]))


class ClassesSecond(Transformer):
    """Logits in the order that `nn.CrossEntropyLoss` asks for: ``[N, vocabulary, T]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


def transformer() -> nn.Module:
    return ClassesSecond(VOCABULARY, length=64, width=64, layers=2)


PROBLEMS = {
    "Fashion MLP": Problem(fashion, mlp, 128, 780, True),
    "Fashion MLP, batch 8": Problem(fashion, mlp, 8, 6250, True),
    "Fashion CNN": Problem(fashion, cnn, 128, 780, True),
    "digits MLP": Problem(digit_images, digits_mlp, 64, 600, True),
    "text transformer": Problem(lambda: text(64), transformer, 32, 600, False, bases=("AdamW", "Schedule-Free AdamW")),
    "regression": Problem(friedman, regression, 64, 1000, False),
    "noisy quadratic": Problem(ill_conditioned, lambda: nn.Linear(100, 1), 32, 800, False),
    "text GRU": Problem(lambda: text(64), lambda: Recurrent(nn.GRU, 32, 64), 32, 500, False),
}
UNSEEN = {
    "digits BatchNorm": Problem(digit_images, digits_batch_norm, 32, 600, True),
    "digits transformer": Problem(digit_images, RowsTransformer, 32, 800, True),
    "text transformer, 2,500 steps": PROBLEMS["text transformer"]._replace(steps=2500),
}
"""Kept out of most of the tuning of the policy; the last one, a language model over a longer run, out of all of it."""
SHORT = {
    "text transformer, 400 steps": PROBLEMS["text transformer"]._replace(steps=400, bases=("AdamW",)),
    "text GRU, 300 steps": PROBLEMS["text GRU"]._replace(steps=300, bases=("momentum", "AdamW")),
    "digits MLP, 300 steps": PROBLEMS["digits MLP"]._replace(steps=300, bases=("SGD", "AdamW")),
    "digits BatchNorm, 300 steps": UNSEEN["digits BatchNorm"]._replace(steps=300, bases=("momentum",)),
    "digits transformer, 400 steps": UNSEEN["digits transformer"]._replace(steps=400, bases=("SGD", "AdamW")),
    "Fashion CNN, 300 steps": PROBLEMS["Fashion CNN"]._replace(steps=300, bases=("momentum", "AdamW")),
    "regression, 400 steps": PROBLEMS["regression"]._replace(steps=400, bases=("AdamW",)),
}
"""Runs of which a search is a fifth and more, to choose on how it may be shorter; no other method is run on them."""
