"""Real data for the examples: scikit-learn's digits, or Fashion-MNIST if it is installed."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


class Data(NamedTuple):
    """Training and test set; inputs ``[N, 1, H, W]`` with mean 0 and variance 1, targets ``[N]``."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load(path: str | None = None) -> Data:
    """Load Fashion-MNIST from ``path`` or Debian's place if it is there, else (or for "digits") the digits."""
    if path == "digits":
        return digits()
    folder = Path(path) if path else DEBIAN
    if path and not folder.is_dir():
        raise SystemExit(f"--data {path}: no such folder; expected one with the four Fashion-MNIST files")
    return fashion_mnist(folder) if folder.is_dir() else digits()


def digits() -> Data:
    """1,797 images of 8 x 8 pixels that come with scikit-learn; every fifth one is for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    test = torch.arange(len(y)) % 5 == 0
    return _normalised("digits", x[~test], y[~test], x[test], y[test])


def fashion_mnist(folder: Path) -> Data:
    """60,000 + 10,000 images of 28 x 28 pixels from the four IDX files of the data set."""

    def read(stem: str) -> Tensor:
        found = sorted(folder.glob(f"{stem}*"))
        if not found:
            raise SystemExit(f"{folder}: no file {stem}*; expected the four Fashion-MNIST files")
        opener = gzip.open if found[0].suffix == ".gz" else open
        with opener(found[0], "rb") as file:
            raw = file.read()
        shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())

    x_train, y_train = read("train-images").float().unsqueeze(1), read("train-labels").long()
    x_test, y_test = read("t10k-images").float().unsqueeze(1), read("t10k-labels").long()
    return _normalised("Fashion-MNIST", x_train, y_train, x_test, y_test)


def _normalised(name: str, x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> Data:
    mean, std = x_train.mean(), x_train.std()
    return Data(name, (x_train - mean) / std, y_train, (x_test - mean) / std, y_test)


def shuffled_batches(data: Data, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Return the indices of ``steps`` mini-batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(len(data.y_train), generator=generator)
        batches += [order[k : k + batch_size] for k in range(0, len(order) - batch_size + 1, batch_size)]
    return batches[:steps]


def text() -> tuple[Tensor, int]:
    """The English of Python's own help pages as character codes ``[400,000 or more]``, and how many codes there are."""
    from pydoc_data.topics import topics

    letters = "\n".join(topics[name] for name in sorted(topics))
    codes = {letter: code for code, letter in enumerate(sorted(set(letters)))}
    return torch.tensor([codes[letter] for letter in letters]), len(codes)


def pieces(codes: Tensor, length: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pieces of a text and the same one letter on, ``[count, length]`` each."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(codes) - length - 1, (count, 1), generator=generator)
    places = starts + torch.arange(length)
    return codes[places], codes[places + 1]
