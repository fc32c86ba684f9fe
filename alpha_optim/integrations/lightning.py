"""A Lightning callback that logs alpha beside the module's own metrics.

Everything else needs no adapter: `configure_optimizers` returns an `AlphaGuided` and, with
``"interval": "step"``, an `AlphaScheduler`.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from alpha_optim.integrations.loggers import logged
from alpha_optim.optimizer import AlphaGuided


class AlphaMonitor(Callback):
    """Logs ``alpha``, ``alpha_std``, ``step_length`` and ``lr`` to the trainer's loggers.

    Once the scheduler's guard has acted also ``batches_skipped`` and ``steps_taken_back``, counted so far. Alpha is
    that of all steps since it was last logged.
    """

    def __init__(self, every: int = 50) -> None:
        """Start with nothing logged.

        Args:
            every: Log at every so many optimizer steps, at least 1.

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
