"""One line more: the scheduler finds the rate, from any initial one, and says what it did.

python -m examples.ex2_find_the_rate
"""

from __future__ import annotations

import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.data import digits, shuffled_batches

STEPS, BATCH = 600, 64


def main() -> None:
    data, loss_fn = digits(), nn.CrossEntropyLoss()
    for lr in (1e-6, 1e-3, 10.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=lr), model, loss_fn)
        scheduler = AlphaScheduler(optimizer, total_steps=STEPS)
        for index in shuffled_batches(data, BATCH, STEPS, seed=0):
            optimizer.zero_grad()
            loss_fn(model(data.x_train[index]), data.y_train[index]).backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            accuracy = float((model(data.x_test).argmax(1) == data.y_test).float().mean())
        print(f"from lr {lr:g}: test accuracy {accuracy:.1%}")
        for iteration, text in scheduler.policy.story:
            print(f"    step {iteration}: {text}")


if __name__ == "__main__":
    main()
