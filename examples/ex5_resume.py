"""Stop in the middle of a search and go on from the checkpoint: the resumed run ends bit for bit where the other does.

python -m examples.ex5_resume
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.data import Data, digits, shuffled_batches

STEPS, STOP, BATCH = 300, 60, 64
LOSS = nn.CrossEntropyLoss()


def build() -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-6), model, LOSS)
    return [model, optimizer, AlphaScheduler(optimizer, total_steps=STEPS)]


def train(parts: list[Any], data: Data, first: int, last: int) -> None:
    model, optimizer, scheduler = parts
    for index in shuffled_batches(data, BATCH, STEPS, seed=0)[first:last]:
        optimizer.zero_grad()
        LOSS(model(data.x_train[index]), data.y_train[index]).backward()
        optimizer.step()
        scheduler.step()


def main() -> None:
    data = digits()
    whole = build()
    train(whole, data, 0, STEPS)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        first = build()
        train(first, data, 0, STOP)
        print(f"stopped at step {STOP}: {first[2].policy}")
        torch.save([part.state_dict() for part in first], checkpoint)  # model, optimizer, scheduler
        resumed = build()
        for part, state in zip(resumed, torch.load(checkpoint, weights_only=True), strict=True):
            part.load_state_dict(state)
    train(resumed, data, STOP, STEPS)

    same = all(map(torch.equal, whole[0].parameters(), resumed[0].parameters()))
    print(f"the run without a stop: {whole[2].policy}")
    print(f"parameters of both are equal, bit for bit: {same}")


if __name__ == "__main__":
    main()
