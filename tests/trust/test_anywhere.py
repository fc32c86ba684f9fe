"""Ctrl-C at any line, no memory at any operation, a fork at any moment."""

import gc
import os
import random
import signal
import threading
import weakref

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, Hold
from alpha_optim.observe.backward_passes import BackwardPasses
from alpha_optim.observe.hooks import harmless
from alpha_optim.observe.interrupts import uninterrupted
from alpha_optim.steer.readings import Readings
from tests.trust import anywhere

pytestmark = pytest.mark.filterwarnings("ignore:memory ran out:UserWarning")


def at_some_places(check, kind, steered, at_least):
    """Make a check at a few of its places, of which there are more than so many."""
    dice, places = random.Random(f"{kind} {steered}"), check(kind, steered, -1)
    assert places > at_least
    for _ in range(8):
        check(kind, steered, dice.randrange(1, places))


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("kind", anywhere.KINDS)
def test_a_run_goes_on_after_ctrl_c_at_any_line(kind, steered):
    at_some_places(anywhere.interrupted, kind, steered, 5000)


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("kind", anywhere.KINDS)
def test_memory_that_runs_out_at_any_operation_costs_measurements_only(kind, steered):
    at_some_places(anywhere.starved, kind, steered, 300)


def test_ctrl_c_waits_once():
    """A second one does not wait: somebody insists."""
    done = []

    @uninterrupted()
    def block(times):
        with uninterrupted():  # inside another one
            for _ in range(times):
                os.kill(os.getpid(), 2)
                done.append(times)

    for times in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            block(times)
    assert done == [1, 3]
    block(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_another_thread_measures_can_measure():
    """Its copy of the lock would be held by a thread that it does not have."""

    def train(steps, seed):
        generator = torch.Generator().manual_seed(seed)
        model, loss_fn = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
        optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.01), model, loss_fn, variance="exact")
        for _ in range(steps):
            x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        return len(optimizer.alpha_history)

    stop = threading.Event()

    def keep_training():
        while not stop.is_set():
            train(5, 1)

    thread = threading.Thread(target=keep_training)
    thread.start()
    try:
        children = []
        for _ in range(12):
            child = os.fork()
            if child == 0:
                os._exit(0 if train(4, 2) == 3 else 1)
            children.append(child)
        answers = []
        for child in children:
            timer = threading.Timer(60.0, os.kill, (child, 9))  # one that hangs
            timer.start()
            answers.append(os.waitpid(child, 0)[1])
            timer.cancel()
        assert answers == [0] * len(children)
    finally:
        stop.set()
        thread.join()


class TimeLimitError(Exception):
    """What the user's handler of a signal raises."""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this system has no SIGALRM")
@pytest.mark.parametrize("number", ["SIGINT", "SIGALRM"])
def test_what_the_users_own_handler_raises_is_not_taken_for_a_failed_measurement(number, monkeypatch):
    number = getattr(signal, number)
    before = signal.getsignal(number)

    def handler(*_):
        raise TimeLimitError

    def slow(*args, **kwargs):
        signal.raise_signal(number)
        return None

    setup = anywhere.Setup("AdamW")
    setup.iteration()
    signal.signal(number, handler)
    try:
        monkeypatch.setattr(type(setup.optimizer._session.pairing.losses), "_seen", slow)
        setup.optimizer._session.pairing.losses.detach()
        setup.optimizer._session.pairing.losses.attach()
        with pytest.raises(TimeLimitError):
            setup.iteration()
    finally:
        signal.signal(number, before)
    monkeypatch.undo()
    setup.optimizer._session.pairing.losses.detach()
    setup.optimizer._session.pairing.losses.attach()
    for _ in range(4):
        setup.iteration()
    assert len(setup.optimizer.alpha_history) > 1


def test_a_handler_that_is_set_within_a_block_stays():
    before = signal.getsignal(signal.SIGINT)

    def mine(*_):
        """Does nothing."""

    try:
        with uninterrupted():
            signal.signal(signal.SIGINT, mine)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_is_forked_within_a_block_hears_of_ctrl_c():
    with uninterrupted():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(1)
            except KeyboardInterrupt:
                os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_what_a_hook_raised_is_not_kept():
    """Its frames hold tensors of the hook and of the user."""
    passes = BackwardPasses(lambda: False, lambda: False, lambda: None)

    def look():
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise RuntimeError("a bug")

    kept = []
    gc.disable()
    try:
        harmless(look, passes.failed)()
        assert kept[0]() is None
    finally:
        gc.enable()
    assert (passes.trouble.kind, passes.trouble.text) == ("RuntimeError", "a bug")


def test_a_batch_that_is_not_finite_is_not_used_where_there_is_no_memory_to_judge_it(monkeypatch):
    setup = anywhere.Setup("AdamW", Hold())
    for _ in range(3):
        setup.iteration()
    before = [param.detach().clone() for param in setup.model.parameters()]

    def hungry(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    monkeypatch.setattr(Readings, "read", hungry)
    setup.optimizer.zero_grad()
    (setup.loss_fn(setup.model(torch.randn(8, 6)), torch.zeros(8, dtype=torch.long)) * float("nan")).backward()
    setup.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))
    setup.iteration()  # one that is finite is used
    assert not all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))
