"""Lightning: `configure_optimizers` returns the wrapped optimizer and the scheduler, nothing else changes.

The scheduler is stepped once per optimizer step, hence ``"interval": "step"``. Losses are seen because
`training_step` calls the very loss function that the optimizer was given. Needs ``pip install lightning``.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alpha_optim import AlphaGuided, AlphaScheduler
from alpha_optim.integrations.lightning import AlphaMonitor
from examples.data import digits


class Classifier(lightning.LightningModule):
    """A small network on scikit-learn's digits, from a learning rate that is far too low."""

    def __init__(self, lr: float = 1e-6) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.loss_fn = nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss: Tensor = self.loss_fn(self.net(x), y)
        return loss

    def configure_optimizers(self) -> Any:
        base = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        optimizer = AlphaGuided(base, self.net, self.loss_fn)
        scheduler = AlphaScheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    data = digits()
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True)
    module = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AlphaMonitor()],
    )
    trainer.fit(module, loader)
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, AlphaGuided)
    with torch.no_grad():
        accuracy = float((module.net(data.x_test).argmax(1) == data.y_test).float().mean())
    rates = [measurement.lr[0] for measurement in optimizer.alpha_history]
    print(f"from a learning rate of {module.lr:g} to at most {max(rates):.2g}: test accuracy {accuracy:.1%}")
    print(optimizer.diagnose())


if __name__ == "__main__":
    main()
