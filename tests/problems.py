"""Small problems with readable names: models, optimizers, batches. Everything is seeded."""

from __future__ import annotations

import torch
from torch import nn

MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 4)), (12,), "class"),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)
        ),
        (2, 6, 6),
        "class",
    ),
    "deep_linear": (
        lambda: nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(4)], nn.Linear(6, 3)),
        (6,),
        "regression",
    ),
}

OPTIMIZERS = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "nesterov_decay": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr),
    "rmsprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr),
}


def for_matrices(params, lr=0.02):
    """Muon, which torch has from 2.9 on; before that SGD with momentum."""
    matrices = [param for param in params if param.dim() == 2]
    muon = getattr(torch.optim, "Muon", None)
    return torch.optim.SGD(matrices, lr=lr, momentum=0.9) if muon is None else muon(matrices, lr=lr)


def make_problem(name, batch_sizes, dtype=torch.float64, seed=0):
    """Return a model, its loss function and one batch per entry of ``batch_sizes``."""
    build, shape, kind = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model = build().to(dtype)
    batches = []
    for size in batch_sizes:
        x = torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype)
        if kind == "class":
            y = torch.randint(0, 4, (size,), generator=generator)
        else:
            y = (x[:, :3] * 2 + torch.randn(size, 3, generator=generator, dtype=torch.float64)).to(dtype)
        batches.append((x, y))
    loss_fn = nn.CrossEntropyLoss() if kind == "class" else nn.MSELoss()
    return model, loss_fn, batches
