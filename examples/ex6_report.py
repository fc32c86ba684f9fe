"""A run that writes itself to a file, and a page for the browser made of it, as the command line makes it.

python -m examples.ex6_report
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler
from alpha_optim.integrations.loggers import record
from alpha_optim.report.command_line import main as command_line
from examples.data import digits, shuffled_batches

STEPS, BATCH = 400, 64
FOLDER = Path("out")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    run, page = FOLDER / "run.jsonl", FOLDER / "run.html"
    run.unlink(missing_ok=True)
    data, loss_fn = digits(), nn.CrossEntropyLoss()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-6), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=STEPS)
    # Meanwhile, in another terminal: python -m alpha_optim watch out/run.jsonl
    stop = record(optimizer, run, scheduler)
    for index in shuffled_batches(data, BATCH, STEPS, seed=0):
        optimizer.zero_grad()
        loss_fn(model(data.x_train[index]), data.y_train[index]).backward()
        optimizer.step()
        scheduler.step()
    stop()
    command_line(["diagnose", str(run)])
    command_line(["report", str(run), "-o", str(page)])


if __name__ == "__main__":
    main()
