"""Accelerate: prepare the wrapped optimizer and the scheduler like any others.

Give `AlphaGuided` the bare model and the loss function before `prepare`; read alpha from your own `optimizer`,
not from what `prepare` returns. Needs ``pip install accelerate``.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.data import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    args = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.accumulate)
    data = digits()
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    loss_fn = nn.CrossEntropyLoss()
    steps = args.epochs * -(-len(loader) // args.accumulate)
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-6), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=steps)

    prepared, stepper, batches, rates = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(args.epochs):
        for x, y in batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_fn(prepared(x), y))
                stepper.step()
                rates.step()
                stepper.zero_grad()

    with torch.no_grad():
        accuracy = float((model(data.x_test).argmax(1) == data.y_test).float().mean())
    highest = max(measurement.lr[0] for measurement in optimizer.alpha_history)
    print(f"from a learning rate of 1e-06 to at most {highest:.2g}: test accuracy {accuracy:.1%}")
    print(optimizer.diagnose())


if __name__ == "__main__":
    main()
