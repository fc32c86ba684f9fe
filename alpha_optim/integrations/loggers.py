"""What was measured, handed to any logger: TensorBoard, W&B, MLflow, a list."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.window import window_alpha
from alpha_optim.optimizer import AlphaGuided

Metrics = dict[str, float]


def metrics_of(recent: Sequence[AlphaMeasurement]) -> Metrics:
    """Alpha over some measurements and the learning rates of the last step, for a logger.

    Args:
        recent: The measurements, oldest first.

    Returns:
        ``alpha`` and ``alpha_std`` (pure numbers), ``step_length`` (parameter distance), ``lr`` (``lr_0``,
        ``lr_1``, ... where param groups differ); what is not finite is left out.
    """
    if not recent:
        return {}
    newest, window = recent[-1], window_alpha(recent)
    # Of a single step its own alpha, with the conventions of its status.
    alpha = newest.alpha if len(recent) == 1 else window.alpha
    metrics = {"alpha": alpha, "alpha_std": window.alpha_std, "step_length": newest.step_length}
    if len(set(newest.lr)) == 1:
        metrics["lr"] = newest.lr[0]
    else:
        metrics |= {f"lr_{index}": rate for index, rate in enumerate(newest.lr)}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def log_measurements(
    optimizer: AlphaGuided,
    log: Callable[[Metrics, int], Any],
    *,
    every: int = 1,
    prefix: str = "alpha_optim/",
) -> Callable[[], None]:
    """Call ``log(metrics, step)`` while training runs.

    Each measurement is read when it is made; on an accelerator that waits for the device at every measured
    step. ``wandb.log`` and ``mlflow.log_metrics`` take these two arguments as they are.

    Args:
        optimizer: The optimizer.
        log: Takes the metrics of `metrics_of` and the iteration.
        every: Log at every so many measurements, with alpha over all since the last time.
        prefix: Put before the names.

    Returns:
        A function that ends the logging.

    Raises:
        ValueError: If ``every`` is less than 1.

    Example:
        >>> import torch
        >>> from alpha_optim import AlphaGuided
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AlphaGuided(torch.optim.SGD([weight], lr=0.1))
        >>> stop = log_measurements(optimizer, lambda metrics, step: print(step, sorted(metrics)))
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        0 ['alpha_optim/alpha', 'alpha_optim/lr', 'alpha_optim/step_length']
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 measurement, got {every}")
    history, waiting = optimizer.alpha_history, 0

    def measured(measurement: AlphaMeasurement) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == every:
            waiting = 0
            metrics = {prefix + name: value for name, value in metrics_of(history[-every:]).items()}
            log(metrics, measurement.iteration)

    return history.subscribe(measured)


def log_to_tensorboard(
    optimizer: AlphaGuided, writer: Any, *, every: int = 1, prefix: str = "alpha_optim/"
) -> Callable[[], None]:
    """Write to TensorBoard while training runs; see `log_measurements`.

    Args:
        optimizer: The optimizer.
        writer: A `torch.utils.tensorboard.SummaryWriter`.
        every: Write at every so many measurements.
        prefix: Put before the names.

    Returns:
        A function that ends it.
    """

    def write(metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return log_measurements(optimizer, write, every=every, prefix=prefix)
