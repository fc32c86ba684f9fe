"""Lightning callbacks: one logs alpha beside the module's own metrics, one makes a range test.

Everything else needs no adapter: `configure_optimizers` returns an `AlphaGuided` and, with
``"interval": "step"``, an `AlphaScheduler`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from alpha_optim.integrations.loggers import logged
from alpha_optim.optimizer import AlphaGuided
from alpha_optim.range_test import Finding, find_lr

LOG = logging.getLogger(__name__)


class AlphaLRFinder(Callback):
    """Makes a range test when ``fit`` begins, and leaves everything else as it was; see `alpha_optim.find_lr`.

    For a bare optimizer: what an `AlphaScheduler` steers needs no range test.

    Args:
        steps: Steps of the test, at least 40.
        attribute: Attribute of the module, or of its ``hparams``, from which ``configure_optimizers`` takes the
            learning rate: set to the one found, if there is one, and the optimizers are built anew. None: the rate
            is only said.

    Attributes:
        finding: What was found, a `alpha_optim.Finding`; None before.
    """

    def __init__(self, steps: int = 100, attribute: str | None = None) -> None:
        """Start with nothing found."""
        self.steps, self.attribute = steps, attribute
        self.finding: Finding | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the test.

        Args:
            trainer: The trainer.
            pl_module: The module in training.

        Raises:
            ValueError: If there are several optimizers, or the module has no such attribute.
        """
        count = len(trainer.optimizers)
        if count != 1:
            raise ValueError(f"a range test needs one optimizer, configure_optimizers returned {count}")
        holders = [holder for holder in (pl_module, pl_module.hparams) if self._has(holder)]
        if self.attribute is not None and not holders:
            raise ValueError(f"neither the module nor its hparams have an attribute {self.attribute!r}")
        trainer.fit_loop.setup_data()

        def loss_of_batch(_: Any, batch: Any) -> Tensor:
            # As Lightning's own loop has it.
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            output: Any = trainer.strategy.training_step(batch, 0)
            loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
            return loss

        quiet = {"log": _say_nothing, "log_dict": _say_nothing}  # there is no step to log to yet
        vars(pl_module).update(quiet)
        try:
            loader: Any = trainer.train_dataloader
            with warnings.catch_warnings():
                # A training step often calls parts of the module only; slopes of the gradients are enough here.
                warnings.filterwarnings("ignore", message="no slopes of single samples")
                self.finding = find_lr(
                    trainer.strategy.model or pl_module,
                    trainer.optimizers[0],
                    loader,
                    steps=self.steps,
                    loss_of_batch=loss_of_batch,
                )
        finally:
            for name in quiet:
                del vars(pl_module)[name]
        LOG.info("range test: %s", self.finding)
        if self.attribute is not None and self.finding.lr is not None:
            for holder in holders:
                if isinstance(holder, MutableMapping):
                    holder[self.attribute] = self.finding.lr
                else:
                    setattr(holder, self.attribute, self.finding.lr)
            trainer.strategy.setup_optimizers(trainer)

    def _has(self, holder: Any) -> bool:
        """Whether the attribute is there."""
        name = self.attribute
        return name is not None and (name in holder if isinstance(holder, Mapping) else hasattr(holder, name))


def _say_nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stands in for ``log``."""


class AlphaMonitor(Callback):
    """Logs ``alpha``, ``alpha_std``, ``step_length`` and ``lr`` to the trainer's loggers.

    Once the scheduler's guard has acted also ``batches_skipped`` and ``steps_taken_back``, counted so far, and once the
    learning rate is found ``found_lr``. Alpha is that of all steps since it was last logged.

    Args:
        every: Log at every so many optimizer steps, at least 1.
    """

    def __init__(self, every: int = 50) -> None:
        """Start with nothing logged.

        Raises:
            ValueError: If ``every`` is less than 1.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1 optimizer step, got {every}")
        self.every = every
        self._logged: dict[int, int] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if enough steps were made.

        Args:
            trainer: The trainer.
            pl_module: The module in training.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        for index, optimizer in enumerate(trainer.optimizers):
            if not isinstance(optimizer, AlphaGuided):
                continue
            last = self._logged.get(index, 0)
            if optimizer.iteration - last < self.every:
                continue
            self._logged[index] = optimizer.iteration
            name = "alpha_optim" if len(trainer.optimizers) == 1 else f"alpha_optim_{index}"
            # The newest measurement is that of the step before the last.
            found = logged(optimizer, optimizer.alpha_history.up_to(optimizer.iteration, after=last - 2))
            metrics = {f"{name}/{key}": value for key, value in found.items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
