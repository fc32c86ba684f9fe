"""Ctrl-C at any line, no memory at any operation, a fork at any moment."""

import os
import random
import threading

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided
from alpha_optim.observe.interrupts import uninterrupted
from tests.trust import anywhere

pytestmark = pytest.mark.filterwarnings("ignore:memory ran out:UserWarning")


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("kind", anywhere.KINDS)
def test_a_run_goes_on_after_ctrl_c_at_any_line(kind, steered):
    dice, lines = random.Random(f"{kind} {steered}"), anywhere.interrupted(kind, steered, -1)
    assert lines > 5000
    for _ in range(8):
        anywhere.interrupted(kind, steered, dice.randrange(1, lines))


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("kind", anywhere.KINDS)
def test_memory_that_runs_out_at_any_operation_costs_measurements_only(kind, steered):
    dice, operations = random.Random(f"{kind} {steered}"), anywhere.starved(kind, steered, -1)
    assert operations > 300
    for _ in range(8):
        anywhere.starved(kind, steered, dice.randrange(1, operations))


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
