"""Something goes wrong at any line of the package, or at any operation that it makes: what is left of it?

`interrupted` sends Ctrl-C at the n-th line that runs; `starved` lets memory run out at the n-th operation of torch that
is not the user's own.
"""

import contextlib
import functools
import random
import signal
import sys
import warnings

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from alpha_optim import AlphaGuided, AlphaScheduler, CalibrateThenAnneal, Hold
from tests.test_transparency import equal_states

PACKAGE = "/alpha_optim/"
KINDS = ("sgd", "sgd, exact", "AdamW", "BatchNorm", "attention")
WARM_UP, STEPS = 3, 9
"""The first steps load what torch and the package load once."""


class Setup:
    """A small run: model, loss function, optimizer, and perhaps a scheduler."""

    def __init__(self, kind, policy=None, wrap=True):
        torch.manual_seed(0)
        if kind == "attention":
            layer = nn.TransformerEncoderLayer(2, 1, 4, 0.1, batch_first=True)
            self.model = nn.Sequential(nn.Unflatten(1, (3, 2)), layer, nn.Flatten(), nn.Linear(6, 3))
        elif kind == "BatchNorm":
            self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
        else:
            self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        params = self.model.parameters()
        self.loss_fn, self.scheduler = nn.CrossEntropyLoss(), None
        self.optimizer = torch.optim.SGD(params, 0.1) if kind.startswith("sgd") else torch.optim.AdamW(params, 0.01)
        self.attributes = self._attributes()
        if wrap:
            variance = "exact" if kind == "sgd, exact" else "sampled"
            self.optimizer = AlphaGuided(self.optimizer, self.model, self.loss_fn, variance=variance)
        if policy is not None:
            self.scheduler = AlphaScheduler(self.optimizer, policy)
        self.data = torch.Generator().manual_seed(1)
        torch.manual_seed(5)

    def _attributes(self):
        return [list(vars(module)) for module in self.model.modules()]

    def iteration(self):
        x, y = torch.randn(8, 6, generator=self.data), torch.randint(0, 3, (8,), generator=self.data)
        self.optimizer.zero_grad()
        self.loss_fn(self.model(x), y).backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def check_nothing_left(self):
        """After `detach` model and loss function are as if the package had never been there."""
        self.optimizer.detach()
        assert self._attributes() == self.attributes
        for module in (*self.model.modules(), self.loss_fn):
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            assert not any(hooks), module
        for param in self.model.parameters():
            assert isinstance(param, nn.Parameter)
            assert param.is_leaf
            assert not param._backward_hooks
            assert not param._post_accumulate_grad_hooks
            assert bool(torch.isfinite(param).all())


def settings_of_the_process():
    return (
        torch.is_grad_enabled(), torch.get_default_dtype(), len(warnings.filters), signal.getsignal(signal.SIGINT),
        torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(), torch.autograd.forward_ad._current_level,
        torch_checkpoint.CheckpointFunction.__name__, len(torch_module._global_forward_hooks),
    )  # fmt: skip


class _Lines:
    """Counts the lines of the package that run, and sends Ctrl-C at one of them."""

    def __init__(self, target):
        self.count, self.target, self.place = 0, target, None

    def __call__(self, frame, event, arg):
        return self._line if PACKAGE in frame.f_code.co_filename else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            if self.count == self.target:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self._line


def interrupted(kind, steered, target):
    """Send Ctrl-C at a line, go on with the next batch, and look; returns how many lines there were."""
    setup = Setup(kind, CalibrateThenAnneal(300) if steered else None)
    for _ in range(WARM_UP):
        setup.iteration()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin with it ignored
    lines, before, hits = _Lines(target), settings_of_the_process(), 0
    for _ in range(WARM_UP, STEPS):
        tracing = sys.gettrace()
        sys.settrace(lines)
        try:
            setup.iteration()
        except KeyboardInterrupt:
            hits += 1
        finally:
            sys.settrace(tracing)
        assert settings_of_the_process() == before, lines.place
    assert hits == (0 if lines.place is None else 1), lines.place
    assert len(setup.optimizer.alpha_history) > 2, lines.place
    setup.check_nothing_left()
    return lines.count


_COUNTS = {}


def _one(check, kind, steered, share):
    """Make a check at a share of the lines or operations that there are."""
    if (check, kind, steered) not in _COUNTS:
        _COUNTS[check, kind, steered] = check(kind, steered, -1)
    check(kind, steered, 1 + int(share * (_COUNTS[check, kind, steered] - 1)))


class _Starving(TorchDispatchMode):
    """Counts the operations that the package makes, and has no memory for one of them."""

    def __init__(self, target):
        super().__init__()
        self.count, self.target, self.place = 0, target, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        place = self._place()
        if place is not None:
            self.count += 1
            if self.count == self.target:
                self.place = place
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _place():
        """Where in the package an operation comes from; None if the user's own optimizer or loop makes it."""
        frame, place = sys._getframe(2), None
        while frame is not None:
            name = frame.f_code.co_filename
            if "/torch/optim/" in name or frame.f_code.co_name == "zero_grad":
                return None
            if place is None and PACKAGE in name:
                place = f"{name}:{frame.f_lineno}"
            frame = frame.f_back
        return place


def starved(kind, steered, target):
    """Let memory run out at one operation: training goes on bit for bit; returns how many operations there were."""
    bare, setup, starving = Setup(kind, wrap=False), Setup(kind, Hold() if steered else None), _Starving(target)
    for one in (bare, setup):
        torch.manual_seed(5)
        for step in range(STEPS):
            watched = starving if one is setup and step >= WARM_UP else contextlib.nullcontext()
            with watched, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one.iteration()
    assert equal_states(bare.model.state_dict(), setup.model.state_dict()), starving.place
    setup.check_nothing_left()
    return starving.count


def interrupt_checks(count, seed):
    """So many of the one kind at random places, as named checks."""
    return _checks(interrupted, count, seed)


def starve_checks(count, seed):
    """So many of the other."""
    return _checks(starved, count, seed)


def _checks(check, count, seed):
    dice, made = random.Random(seed), []
    for number in range(count):
        kind, steered, share = dice.choice(KINDS), dice.random() < 0.5, dice.random()
        name = f"{check.__name__} {number}: {kind}, {'steered' if steered else 'watched'}, at {share:.4f}"
        made.append((name, functools.partial(_one, check, kind, steered, share)))
    return made
