"""What was measured, handed to any logger: TensorBoard, W&B, MLflow, a list."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any

import numpy as np

from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.history_file import ABANDONED, EVENT, NOTE, from_line, to_json, to_line, to_row
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.records import GuardEvent
from alpha_optim.alpha.window import window_alpha
from alpha_optim.optimizer import AlphaGuided
from alpha_optim.scheduler import AlphaScheduler

LOG = logging.getLogger(__name__)
Metrics = dict[str, float]
HISTOGRAM = 100
"""TensorBoard gets the distribution of so many alphas at a time."""


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


def events_of(optimizer: AlphaGuided) -> Metrics:
    """How often the scheduler's guard has acted so far, for a logger.

    Args:
        optimizer: The optimizer.

    Returns:
        ``batches_skipped`` and ``steps_taken_back``; empty if neither happened.
    """
    counts = optimizer.guard_counts
    names = ("batches_skipped", "steps_taken_back") if counts["events"] else ()
    return {name: float(counts[name]) for name in names}


def found_by(optimizer: AlphaGuided) -> Metrics:
    """The learning rate that the scheduler has found for the first param group, for a logger.

    Args:
        optimizer: The optimizer.

    Returns:
        ``found_lr``, the rate that is held once the search is over, or the one given where it was kept; empty while it
        is searched, and where the policy finds none.
    """
    steering = optimizer._session.supervision.steering
    found = getattr(None if steering is None else steering.policy, "found_lr", None)
    return {} if found is None else {"found_lr": float(found)}


def logged(optimizer: AlphaGuided, recent: Sequence[AlphaMeasurement]) -> Metrics:
    """All that loggers and callbacks get: `metrics_of` some measurements, `events_of` the guard, and `found_by`."""
    return {**metrics_of(recent), **events_of(optimizer), **found_by(optimizer)}


def postfix(optimizer: AlphaGuided, window: int = 50) -> dict[str, str]:
    """What a progress bar may show: ``bar.set_postfix(postfix(optimizer))`` of tqdm.

    Args:
        optimizer: The optimizer.
        window: Alpha is that of the last so many measurements.

    Returns:
        ``alpha`` with its standard error, ``lr`` of the first param group; the former only once it is known.
    """
    shown = {}
    recent = optimizer.alpha_history.windowed(window)
    if math.isfinite(recent.alpha):
        error = f" ± {recent.alpha_std:.2f}" if math.isfinite(recent.alpha_std) else ""
        shown["alpha"] = f"{recent.alpha:+.2f}{error}"
    return {**shown, "lr": f"{float(optimizer.param_groups[0]['lr']):.2g}"}


def log_measurements(
    optimizer: AlphaGuided,
    log: Callable[[Metrics, int], Any],
    *,
    every: int = 1,
    prefix: str = "alpha_optim/",
) -> Callable[[], None]:
    """Call ``log(metrics, step)`` while training runs.

    Each measurement is read when it is made; on an accelerator that waits for the device at every measured
    step. ``mlflow.log_metrics`` takes these two arguments as they are; for W&B there is `log_to_wandb`.

    Args:
        optimizer: The optimizer.
        log: Takes the metrics of `metrics_of`, `events_of` and `found_by`, and the iteration.
        every: Log at every so many measurements, with alpha over all since the last time.
        prefix: Put before the names.

    Returns:
        A function that ends the logging.

    Raises:
        ValueError: If ``every`` is less than 1.

    Examples:
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
            metrics = {prefix + name: value for name, value in logged(optimizer, history[-every:]).items()}
            log(metrics, measurement.iteration)

    return history.subscribe(measured)


def log_to_tensorboard(
    optimizer: AlphaGuided, writer: Any, *, every: int = 1, prefix: str = "alpha_optim/"
) -> Callable[[], None]:
    """Write to TensorBoard while training runs; see `log_measurements`.

    Beside the numbers there are histograms of alpha, and a page "Custom scalars" with alpha in its band of one standard
    error above the learning rates.

    Args:
        optimizer: The optimizer.
        writer: A `torch.utils.tensorboard.SummaryWriter`.
        every: Write at every so many measurements.
        prefix: Put before the names.

    Returns:
        A function that ends it.
    """
    names = [f"{prefix}{name}" for name in ("alpha", "alpha_low", "alpha_high")]
    groups = len(optimizer.param_groups)
    rates = ["lr", *(f"lr_{index}" for index in range(groups) if groups > 1)]
    charts = {"alpha": ["Margin", names], "learning rate": ["Multiline", [prefix + name for name in rates]]}
    writer.add_custom_scalars({"alpha_optim": charts})
    seen: list[float] = []

    def write(metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        alpha, error = metrics.get(names[0]), metrics.get(f"{prefix}alpha_std", 0.0)
        if alpha is None:
            return
        writer.add_scalar(names[1], alpha - error, step)
        writer.add_scalar(names[2], alpha + error, step)
        seen.append(alpha)
        if len(seen) == HISTOGRAM:
            writer.add_histogram(f"{prefix}alphas", np.array(seen), step)
            seen.clear()

    return log_measurements(optimizer, write, every=every, prefix=prefix)


def log_to_wandb(
    optimizer: AlphaGuided, run: Any, *, every: int = 1, prefix: str = "alpha_optim/"
) -> Callable[[], None]:
    """Log to Weights & Biases while training runs, beside what the loop logs; see `log_measurements`.

    W&B counts calls of ``log``, and throws away what comes with an earlier number. So the metrics have an axis of their
    own, the iteration, and go out with the loop's next call; where the loop does not call, they go out by themselves.

    Args:
        optimizer: The optimizer.
        run: What ``wandb.init()`` returned.
        every: Log at every so many measurements.
        prefix: Put before the names.

    Returns:
        A function that ends it.
    """
    axis = f"{prefix}iteration"
    run.define_metric(axis, hidden=True)
    run.define_metric(f"{prefix}*", step_metric=axis)
    waiting_for: int | None = None  # the number of the call that the last metrics are to go out with

    def send() -> None:
        if run.step == waiting_for:  # the loop has not called since
            run.log({}, commit=True)

    def write(metrics: Metrics, step: int) -> None:
        nonlocal waiting_for
        send()
        run.log({**metrics, axis: step}, commit=False)
        waiting_for = run.step

    unsubscribe = log_measurements(optimizer, write, every=every, prefix=prefix)

    def stop() -> None:
        unsubscribe()
        send()

    return stop


def record(
    optimizer: AlphaGuided, path: str | os.PathLike[str], scheduler: AlphaScheduler | None = None
) -> Callable[[], None]:
    """Write every measurement to a file when it is made, what the guard did, and what the scheduler says of the rate.

    ``python -m alpha_optim watch PATH`` shows the run while it trains, ``... report PATH`` afterwards, and
    `AlphaHistory.load` reads the measurements. After a resume the file is continued; call `record` once the state is
    loaded: what the file says of later iterations is cut off, since they are made again. Before the first step of a run
    a file that is there is of another one, and is kept as ``run.1.jsonl``, ``run.2.jsonl`` and so on. Every line is
    written at once. On several ranks only one should record.

    Args:
        optimizer: The optimizer.
        path: The file, JSON lines.
        scheduler: The scheduler, for what it says.

    Returns:
        A function that ends the recording; what came after the last measurement is written then.

    Raises:
        TypeError: If the optimizer is not wrapped.
        ValueError: If there is a file that is not one of a run.

    Examples:
        >>> import tempfile, torch
        >>> from alpha_optim import AlphaGuided, AlphaHistory
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AlphaGuided(torch.optim.SGD([weight], lr=0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stop = record(optimizer, f"{folder}/run.jsonl")
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         weight.square().sum().backward()
        ...         optimizer.step()
        ...     stop()
        ...     len(AlphaHistory.load(f"{folder}/run.jsonl"))
        2
    """
    if not isinstance(optimizer, AlphaGuided):
        raise TypeError(
            f"record(optimizer, path, scheduler) takes the optimizer that AlphaGuided wraps others as, got "
            f"{type(optimizer).__name__}"
        )
    return _Recorder(optimizer, path, scheduler).stop


class _Recorder:
    """Appends lines to the file of a run."""

    def __init__(self, optimizer: AlphaGuided, path: str | os.PathLike[str], scheduler: AlphaScheduler | None) -> None:
        """Begin a file, or continue one; see `record`."""
        self._optimizer, self._scheduler = optimizer, scheduler
        self._there: set[str] = set()  # rows that a run before it was resumed has written already
        if os.path.exists(path) and os.path.getsize(path):
            _mend_last_line(path)
            written = AlphaHistory.load(path)  # raises where lines of ours would not belong
            with open(path, "rb") as file:
                file.readline()
                begun = bool(file.readline())  # more than the header
            if optimizer.iteration == 0 and begun:
                _set_aside(path)
                written = AlphaHistory()
                written.save(path)
            known = optimizer.alpha_history
            last = known[-1].iteration if len(known) else optimizer.iteration - 1
            if optimizer.iteration and len(written) and written.iterations.max() > last:
                _cut_after(path, last)
            self._there = self._cut_what_was_not_told(path)
        else:
            AlphaHistory().save(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - stays open while training runs
        # What the guard did before is in the file already, if it was recorded.
        self._events, self._notes, self._phases = optimizer.guard_counts["events"], 0, 0
        self._abandoned: list[tuple[int, int]] = []
        self._unsubscribe = optimizer.alpha_history.subscribe(self._measured)

    def _cut_what_was_not_told(self, path: str | os.PathLike[str]) -> set[str]:
        """Cut off events and notes from after the checkpoint that the run goes on from; returns those that stay."""
        policy = getattr(self._scheduler, "policy", None)
        told = [_event_row(event) for event in self._optimizer.guard_events]
        told += _notes(getattr(policy, "phases", ()), getattr(policy, "story", ()))
        texts, there = set(map(json.dumps, told)), set()
        begins = tuple(f'{{"{name}"'.encode() for name in (EVENT, NOTE))
        with open(path, "rb+") as file:
            same, behind = 0, []  # bytes before the first line that goes, and the lines behind it that stay
            cut = False
            for line in file:
                if line.startswith(begins):
                    row = from_line(line)
                    text, entry = json.dumps(row), row.get(EVENT) or row.get(NOTE) or {}
                    if entry.get("iteration", -1) >= self._optimizer.iteration and text not in texts:
                        cut = True
                        continue
                    there.add(text)
                if cut:
                    behind.append(line)
                else:
                    same += len(line)
            file.truncate(same)
            file.seek(same)
            file.writelines(behind)
        return there

    def _measured(self, measurement: AlphaMeasurement) -> None:
        self._write([*self._told(), to_row(measurement)])

    def _told(self) -> list[dict[str, Any]]:
        """Rows of what the guard did and the policy said since this was asked last."""
        so_far = self._optimizer.guard_counts["events"]
        events = self._optimizer.guard_events[-(so_far - self._events) :] if so_far > self._events else ()
        policy = getattr(self._scheduler, "policy", None)
        notes, phases = getattr(policy, "story", ()), getattr(policy, "phases", ())
        rows = [_event_row(event) for event in events]
        rows += _notes(phases[self._phases :], notes[self._notes :])
        self._events, self._notes, self._phases = so_far, len(notes), len(phases)
        abandoned = self._optimizer.alpha_history.abandoned
        if abandoned != self._abandoned:
            rows.append({ABANDONED: [list(span) for span in abandoned]})
            self._abandoned = list(abandoned)
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._file.writelines(to_line(row) for row in rows if not self._there or json.dumps(row) not in self._there)
        self._file.flush()

    def stop(self) -> None:
        """Write what came after the last measurement, and close the file."""
        self._unsubscribe()
        if not self._file.closed:
            self._write(self._told())
            self._file.close()


def _event_row(event: GuardEvent) -> dict[str, Any]:
    return {EVENT: {name: to_json(value) for name, value in asdict(event).items()}}


def _notes(phases: Iterable[tuple[int, str]], story: Iterable[tuple[int, str]]) -> list[dict[str, Any]]:
    """Rows of the phases of a search and of what it tells."""
    rows = [{NOTE: {"iteration": n, "text": f"phase: {name}", "phase": name}} for n, name in phases]
    return [*rows, *({NOTE: {"iteration": n, "text": text}} for n, text in story)]


def _mend_last_line(path: str | os.PathLike[str]) -> None:
    """Cut off a last line that was not finished, as a killed run leaves it."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(0, size - 65536)
        file.seek(begin)
        tail = file.read()
        if not tail.endswith(b"\n") and b"\n" in tail:
            file.truncate(begin + tail.rindex(b"\n") + 1)


def _set_aside(path: str | os.PathLike[str]) -> None:
    """Rename the file of another run: ``run.jsonl`` becomes ``run.1.jsonl``, or the next number that is free."""
    root, suffix = os.path.splitext(os.fspath(path))
    free = next(name for n in count(1) if not os.path.exists(name := f"{root}.{n}{suffix}"))
    os.rename(path, free)
    LOG.warning(
        "%s held another run, which is kept as %s; to go on with it, load the states before record()",
        os.fspath(path),
        free,
    )


def _cut_after(path: str | os.PathLike[str], last: int) -> None:
    """Cut off a file behind an iteration: a resumed run makes those that follow again."""
    with open(path, "rb+") as file:
        place = 0
        for line in file:
            if from_line(line).get("iteration", -1) > last:
                break
            place += len(line)
        file.truncate(place)
