"""A range test beside the training loop: which learning rate, before training begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alpha_optim.alpha.diagnosis import rate_from_climbs
from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.distributed import local
from alpha_optim.observe.hooks import map_tensors
from alpha_optim.observe.interrupts import uninterrupted
from alpha_optim.observe.model_calls import returned_loss
from alpha_optim.observe.random_state import untouched
from alpha_optim.observe.snapshot import Snapshot, other_random_numbers_untouched, put_back
from alpha_optim.observe.step_direction import parameters_of
from alpha_optim.optimizer import AlphaGuided
from alpha_optim.scheduler import AlphaScheduler
from alpha_optim.steer.point import copy_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST, HIGHEST = 1e-8, 10.0
"""The rates that are tried: at the lower no network moves in 100 steps, at the higher hardly one survives."""
FEWEST = 40
"""So few steps over nine decades leave no two at rates alike."""
SMALL, MOST_PARTS = 1000, 100
"""What a loader or data set holds of so many elements at most may be its state; samplers and data sets looked at."""
CALM = 5
"""So many losses are averaged to see whether the loss has doubled: what follows tells nothing new."""


@dataclass(frozen=True)
class Finding:
    """What a range test has found.

    Attributes:
        lr: Learning rate of the first param group to begin a decay with; None if the test cannot tell.
        history: Alpha, loss and rate of every step of the test.
        reason: How it was told, or why it cannot be, in a sentence.
    """

    lr: float | None
    history: AlphaHistory
    reason: str

    def __str__(self) -> str:
        """One line: the rate, and how it was told."""
        found = "no learning rate found" if self.lr is None else f"learning rate {self.lr:.2g}"
        return f"{found}: {self.reason}"

    def plot(self) -> Figure:
        """Draw loss and alpha against the learning rate, the one found marked (needs matplotlib).

        Returns:
            A matplotlib figure; save it with ``figure.savefig(path)``.
        """
        from alpha_optim.report.plots import plot_rates

        return plot_rates(self.history, self.lr)


def find_lr(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    steps: int = 100,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    loss_of_batch: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Finding:
    """Train for some steps while the learning rate climbs, and say at which rate to begin a decay.

    It is a look at untrained weights: of the rates that it told in the study six of seven lie within a factor of three
    of the tuned one, some of the others ten times above (docs/benchmarks.md, range tests). For a long run of a
    transformer take it for an upper bound; `AlphaScheduler` looks further.

    Everything is put back afterwards, bit for bit, also after an exception or Ctrl-C: parameters, buffers, gradients,
    attributes of modules, state and groups of the optimizer, random numbers; of the loader, its samplers and its data
    set the attributes with their generators and positions, or what its ``state_dict()`` says. (An open file's position
    is none of these.)

    Args:
        model: The model.
        optimizer: Its optimizer, not wrapped. Rates of param groups keep their ratios.
        loader: Gives batches, as often as it is asked: pairs ``(input, target)`` if there is a loss function, else what
            the model is called with (a mapping: by keyword). They are moved to the device of the model.
        loss_fn: Called as ``loss_fn(model(input), target)``; returns the mean loss or one loss per sample. None: the
            model returns its loss.
        steps: Number of steps, at least 40.
        lowest: Learning rate of the first group at the first step.
        highest: And at the last; the test ends earlier if the loss has risen far.
        loss_of_batch: Called as ``loss_of_batch(model, batch)`` instead, whatever batches look like; returns the mean
            loss or one loss per sample.

    Returns:
        What was found.

    Raises:
        TypeError: If an argument is something else, the optimizer is wrapped, the loader can be used only once, or a
            batch or loss is of no use.
        ValueError: If there are no batches, too few steps, or rates that do not climb.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> data = [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(10)]
        >>> finding = find_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), data, torch.nn.MSELoss())
        >>> len(finding.history) > 20
        True
    """
    if loss_fn is not None and loss_of_batch is not None:
        raise ValueError("give find_lr loss_fn or loss_of_batch, not both")
    _check(model, optimizer, loader, steps, lowest, highest)
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(_left_as_found(model, optimizer, loader))
        model.train()
        for param in model.parameters():
            param.grad = None
        guided = stack.enter_context(AlphaGuided(optimizer, model, loss_fn if isinstance(loss_fn, nn.Module) else None))
        first = float(optimizer.param_groups[0]["lr"])
        scheduler = AlphaScheduler(guided, _Climb(lowest / first, highest / first, steps), guard=False)
        losses: list[float] = []
        for batch in _batches(loader, steps, device):
            guided.zero_grad()
            losses.append(_backward(model, guided, loss_fn, loss_of_batch, batch))
            guided.step()
            scheduler.step()
            if guided._session.processes.ranks is not None:  # all of them have to stop at the same step
                losses = [measurement.loss_end for measurement in guided.alpha_history]
            if losses and _diverged(losses):
                break
        history = AlphaHistory()
        for measurement in guided.alpha_history:
            history.append(measurement)
    lr = rate_from_climbs(history)
    return Finding(lr, history, _reason(lr, losses, history))


class _Climb:
    """A policy under which rates grow by the same factor at every step."""

    def __init__(self, lowest: float, highest: float, steps: int) -> None:
        self._lowest, self._growth, self._steps = lowest, math.log(highest / lowest), steps

    def __call__(self, measurement: AlphaMeasurement) -> float:
        return 1.0

    def envelope(self, iteration: int) -> float:
        return self._lowest * math.exp(self._growth * min(1.0, iteration / (self._steps - 1)))


def _check(
    model: nn.Module, optimizer: Optimizer, loader: Iterable[Any], steps: int, lowest: float, highest: float
) -> None:
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"the order is find_lr(model, optimizer, loader, loss_fn), got {type(model).__name__} and "
            f"{type(optimizer).__name__} as model and optimizer"
        )
    if isinstance(optimizer, AlphaGuided):
        raise TypeError(
            "find_lr takes the bare optimizer, since it wraps it for the time of the test: find_lr(model, "
            "optimizer.optimizer, loader, ...), before it is wrapped for training"
        )
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} evaluates a closure several times per step and looks for its own step length; "
            "a range test makes plain steps: take another optimizer"
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"the loader ({type(loader).__name__}) can be used only once, and its batches would be missing in "
            "training; pass something that begins anew with every for loop, a DataLoader or a list of batches"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < FEWEST:
        raise ValueError(f"find_lr needs at least {FEWEST} steps to tell rates apart, got {steps!r}; 100 are usual")
    if not 0.0 < lowest < highest < math.inf:
        raise ValueError(f"rates must climb from lowest > 0 to highest, got {lowest!r} to {highest!r}")
    if not all(float(group.get("lr") or 0.0) > 0.0 for group in optimizer.param_groups):
        raise ValueError(
            "every param group needs a learning rate above 0, whose ratios the test keeps; build the optimizer with "
            "any, lr=1e-3 say"
        )


def _batches(loader: Iterable[Any], steps: int, device: torch.device) -> Iterator[Any]:
    """So many batches, from the beginning again where the loader ends; with a progress bar in a terminal.

    Raises:
        ValueError: If there are none.
    """
    count, shown = 0, _progress(steps)
    try:
        while count < steps:
            before = count
            for batch in loader:
                yield map_tensors(lambda tensor: tensor.to(device), batch)
                count += 1
                shown(1)
                if count == steps:
                    return
            if count == before:
                raise ValueError("the loader gave no batch")
    finally:
        shown(0)


def _progress(steps: int) -> Callable[[int], None]:
    """Shows progress if tqdm is installed and somebody looks; called with 0 at the end."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped] # - it has no types
    except ImportError:
        return lambda made: None
    bar = tqdm(total=steps, desc="find_lr", leave=False, disable=None)

    def shown(made: int) -> None:
        bar.update(made) if made else bar.close()

    return shown


def _backward(
    model: nn.Module,
    guided: AlphaGuided,
    loss_fn: Callable[..., Tensor] | None,
    loss_of_batch: Callable[..., Tensor] | None,
    batch: Any,
) -> float:
    """One forward and backward pass; returns the mean loss.

    Raises:
        TypeError: If batch or loss are of no use.
    """
    if loss_of_batch is not None:
        loss = loss_of_batch(model, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_of_batch has to return a tensor, got {type(loss).__name__}")
    elif loss_fn is None:
        output = model(**batch) if isinstance(batch, Mapping) else model(*batch) if _several(batch) else model(batch)
        found = returned_loss(output)
        if found is None:
            raise TypeError(
                "find_lr was given no loss_fn, and the model returned no loss (an output with .loss or key 'loss', "
                "or a tuple with one number that requires grad); pass loss_fn"
            )
        loss = found[0]
    else:
        if not _several(batch) or len(batch) < 2:
            raise TypeError(
                f"with a loss_fn, batches have to be pairs (input, target), got {type(batch).__name__}; of others say "
                "how their loss is computed: find_lr(..., loss_of_batch=lambda model, batch: ...)"
            )
        *inputs, target = batch
        loss = loss_fn(model(*inputs), target)
    if loss.dim() > 0:
        return float(guided.backward(loss))
    if loss_of_batch is not None or (loss_fn is not None and not isinstance(loss_fn, nn.Module)):
        guided.record_losses(loss)
    loss.backward()
    return float(loss.detach())


def _several(batch: Any) -> bool:
    return isinstance(batch, (tuple, list))


def _diverged(losses: list[float]) -> bool:
    """Whether the loss has risen so far that higher rates tell nothing new."""
    if not math.isfinite(losses[-1]):
        return True
    first, now = (math.fsum(part) / len(part) for part in (losses[:CALM], losses[-CALM:]))
    return now - first > abs(first)


def _reason(lr: float | None, losses: list[float], history: AlphaHistory) -> str:
    if lr is not None:
        return "the loss fell and rose again while the rate climbed, and this lies where it was lowest"
    if len(history) < FEWEST // 2:
        return "too few steps could be measured (the loss was not finite, or pairs were dropped)"
    if not math.isfinite(losses[-1]) or _diverged(losses):
        return "the loss rose, but before that it did not surely fall: another batch size or more steps may tell"
    return "the loss did not surely fall and rise again: more steps, or other bounds of the rate, may tell"


@contextmanager
def _left_as_found(model: nn.Module, optimizer: Optimizer, loader: Any) -> Iterator[None]:
    """Put model, optimizer, random numbers and the loader's generators back."""
    every = [*model.parameters(), *model.buffers(), *parameters_of(optimizer)]
    tensors = list({id(tensor): tensor for tensor in every}.values())
    devices = {tensor.device for tensor in tensors}
    copies = [local(tensor).detach().clone() for tensor in tensors]
    gradients = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
    groups = [dict(group) for group in optimizer.param_groups]
    # Rates that are tensors are written in place, and torch has the same one among the defaults.
    options = [value for group in groups for value in group.values() if isinstance(value, Tensor)]
    values = [option.clone() for option in options]
    state = optimizer.state
    snapshot = Snapshot()
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    containers = [(dict(module._parameters), dict(module._buffers)) for module in modules]
    for module, held in zip(modules, attributes, strict=True):
        snapshot._seen.add(id(module))
        for name, value in held.items():
            if not name.startswith("_") and not isinstance(value, Tensor):
                snapshot.keep(value)
    with untouched(devices), other_random_numbers_untouched():  # it may draw some
        loader_state = _state_of(loader)
    of_loader = Snapshot(SMALL)
    for part in _parts_of(loader):
        of_loader.keep_attributes(part)
    optimizer.state = type(state)(dict) if hasattr(state, "default_factory") else type(state)()
    for key, value in state.items():
        optimizer.state[key] = copy_of(value)

    @uninterrupted()
    def put_all_back() -> None:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                local(tensor).copy_(copy)
        for leaf, gradient in gradients:
            leaf.grad = gradient
        for module, held, (parameters, buffers) in zip(modules, attributes, containers, strict=True):
            put_back(module.__dict__, held)
            put_back(module._parameters, parameters)
            put_back(module._buffers, buffers)
        snapshot.restore()
        optimizer.state = state
        for group, kept in zip(optimizer.param_groups, groups, strict=False):
            put_back(group, kept)
        for option, value in zip(options, values, strict=True):
            option.copy_(value)
        of_loader.restore()
        if loader_state is not None:
            with untouched(devices), other_random_numbers_untouched():
                loader.load_state_dict(loader_state)

    try:
        with untouched(devices), other_random_numbers_untouched():
            yield
    finally:
        put_all_back()


def _state_of(loader: Any) -> Any:
    """What a loader that can be resumed, as torchdata's, says of where it is; None of others."""
    if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
        return None
    try:
        return loader.state_dict()
    except Exception:  # Accelerate's has it, and the loader inside has not
        return None


def _parts_of(loader: Any) -> list[Any]:
    """A loader, its samplers, and its data set with those inside it."""
    parts: list[Any] = []
    waiting = [loader]
    while waiting and len(parts) < MOST_PARTS:
        part = waiting.pop()
        if part is None or any(part is known for known in parts):
            continue
        parts.append(part)
        waiting += [getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset")]
        waiting += [entry for entry in getattr(part, "datasets", ()) or () if hasattr(entry, "__dict__")]
    return parts
