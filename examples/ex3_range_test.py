"""A range test beside the loop: one picture of loss and alpha over the rate, and everything is as it was before.

python -m examples.ex3_range_test
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from alpha_optim import find_lr
from examples.data import digits

PICTURE = Path("out/range_test.png")


def main() -> None:
    data = digits()
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    before = [param.clone() for param in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    finding = find_lr(model, optimizer, loader, nn.CrossEntropyLoss())
    print(finding)
    untouched = all(map(torch.equal, before, model.parameters()))
    print(f"parameters as before: {untouched}; the optimizer's rate is still {optimizer.param_groups[0]['lr']}")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    finding.plot().savefig(PICTURE, dpi=120)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    main()
