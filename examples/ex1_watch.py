"""The two-line change: wrap the optimizer, train as before, and see whether the rate is too low or too high.

python -m examples.ex1_watch
"""

from __future__ import annotations

import torch
from torch import nn

from alpha_optim import AlphaGuided
from examples.data import digits, shuffled_batches

STEPS, BATCH = 200, 64


def main() -> None:
    data, loss_fn = digits(), nn.CrossEntropyLoss()
    for lr in (1e-4, 1e-2, 0.3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=lr), model, loss_fn)  # was: SGD(...)
        for index in shuffled_batches(data, BATCH, STEPS, seed=0):
            optimizer.zero_grad()
            loss_fn(model(data.x_train[index]), data.y_train[index]).backward()
            optimizer.step()
        window = optimizer.alpha_history.windowed(100)
        loss = optimizer.alpha_history[-1].loss_end
        print(f"lr {lr:g}: alpha {window.alpha:+.2f} ± {window.alpha_std:.2f}, last loss {loss:.2f}")
        print(f"    {optimizer.diagnose()}")


if __name__ == "__main__":
    main()
