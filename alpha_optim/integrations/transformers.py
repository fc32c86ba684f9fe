"""A callback for the Trainer of Transformers that puts alpha into its logs.

Everything else needs no adapter: ``Trainer(optimizers=(optimizer, scheduler))`` with an `AlphaGuided` and an
`AlphaScheduler`.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from alpha_optim.integrations.loggers import logged
from alpha_optim.optimizer import AlphaGuided


class AlphaCallback(TrainerCallback):
    """Adds ``alpha``, ``alpha_std`` and ``step_length`` to what the Trainer logs.

    Once the scheduler's guard has acted also ``batches_skipped`` and ``steps_taken_back``, counted so far, and once the
    learning rate is found ``found_lr``. They appear on the console, in ``trainer.state.log_history`` and with every
    reporter (``report_to``).

    Args:
        optimizer: The optimizer that was given to the Trainer, which hands callbacks a wrapper of it.
    """

    def __init__(self, optimizer: AlphaGuided) -> None:
        """Read from ``optimizer``."""
        self._optimizer = optimizer
        self._logged = 0

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Step in front of the reporters.

        Args:
            *args: Not used.
            **kwargs: Not used.
        """
        self._step_forward(sys._getframe(1))

    on_train_begin = on_init_end  # for one that was added later

    def _step_forward(self, frame: FrameType | None) -> None:
        """Be called first: what is added to the logs has to be there when reporters read them.

        A Trainer asks its own callbacks first, reporters among them, and tells a callback nothing of the others; who
        calls it can be seen on the stack only.
        """
        for _ in range(4):
            handler = None if frame is None else frame.f_locals.get("self")
            callbacks = getattr(handler, "callbacks", None)
            if isinstance(handler, CallbackHandler) and isinstance(callbacks, list) and self in callbacks:
                callbacks.remove(self)
                callbacks.insert(0, self)
                return
            frame = None if frame is None else frame.f_back

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add alpha over the steps since the last time to the logs of a training step.

        Args:
            args: Not used.
            state: Holds the history of logs.
            control: Not used.
            logs: What is being logged.
            **kwargs: Not used.
        """
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        now, last = self._optimizer.iteration, self._logged
        self._logged = now
        # The newest measurement is that of the step before the last.
        metrics = logged(self._optimizer, self._optimizer.alpha_history.up_to(now, after=last - 2))
        extra = {name: value for name, value in metrics.items() if not name.startswith("lr")}  # the Trainer logs those
        logs.update(extra)
        state.log_history[-1].update(extra)
