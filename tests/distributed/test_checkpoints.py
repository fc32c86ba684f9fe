"""Saved on two ranks, resumed on two and on four; and a process that dies."""

import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from alpha_optim import AlphaGuided, AlphaScheduler
from tests.distributed import setups
from tests.distributed.ranks import run

ROOT = pathlib.Path(__file__).parents[2]
TOTAL = 120
SAVED = {"found": 80, "searching": 20}
KINDS = ("ddp", *(("fsdp",) if setups.FSDP_ON_CPU else ()), "zero", "full")


def build(kind):
    model, loss_fn = setups.mlp(), nn.CrossEntropyLoss()
    if kind == "fsdp":
        for layer in (model[0], model[2]):
            fully_shard(layer)
        net = fully_shard(model)
    else:
        net = DistributedDataParallel(model)
    params, bare = list(model.parameters()), torch.optim.AdamW(model.parameters(), lr=1e-4)
    if kind == "zero":
        with warnings.catch_warnings():  # importing it scripts something, which PyTorch has deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.distributed.optim import ZeroRedundancyOptimizer

        bare = ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=1e-4)
    guided = AlphaGuided(bare, net, loss_fn)
    return model, net, loss_fn, guided, AlphaScheduler(guided, total_steps=TOTAL)


def train(net, loss_fn, guided, scheduler, rank, size, steps):
    rates = []
    for step in steps:
        x, y = setups.of_rank(step, rank, size, total=48)
        guided.zero_grad()
        loss_fn(net(x), y).backward()
        guided.step()
        scheduler.step()
        rates.append(guided.param_groups[0]["lr"])
    return rates


OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(rank, size, folder):
    found = {}
    for kind in KINDS:
        for when, steps in SAVED.items():
            model, net, loss_fn, guided, scheduler = build(kind)
            train(net, loss_fn, guided, scheduler, rank, size, range(steps))
            path = f"{folder}/{kind} {when}"
            if kind == "zero":
                guided.consolidate_state_dict(to=0)
                if rank == 0:
                    torch.save([model.state_dict(), guided.state_dict(), scheduler.state_dict()], path)
            elif kind == "full":
                states = get_state_dict(model, guided, options=OPTIONS)
                if rank == 0:
                    torch.save([*states, scheduler.state_dict()], path)
            else:
                of_model, of_optimizer = get_state_dict(model, guided)
                state = {"model": of_model, "optimizer": of_optimizer, "scheduler": scheduler.state_dict()}
                dcp.save(state, checkpoint_id=path)
            count, iteration = len(guided.alpha_history), guided.iteration
            rates = train(net, loss_fn, guided, scheduler, rank, size, range(steps, steps + 10))
            found[kind, when] = count, iteration, rates
    return found


def resume(rank, size, folder):
    found = {}
    for kind in KINDS:
        for when, steps in SAVED.items():
            model, net, loss_fn, guided, scheduler = build(kind)
            path = f"{folder}/{kind} {when}"
            if kind == "zero":
                of_model, of_optimizer, of_scheduler = torch.load(path, weights_only=True)
                model.load_state_dict(of_model)
                guided.load_state_dict(of_optimizer)
            else:
                if kind == "full":
                    of_model, of_optimizer, of_scheduler = torch.load(path, weights_only=True)
                    options = OPTIONS
                else:
                    of_model, of_optimizer = get_state_dict(model, guided)  # steps at rate 0 to fill an empty state
                    assert guided.iteration == 0
                    assert len(guided.alpha_history) == 0
                    state = {"model": of_model, "optimizer": of_optimizer, "scheduler": scheduler.state_dict()}
                    dcp.load(state, checkpoint_id=path)
                    of_model, of_optimizer, of_scheduler, options = *state.values(), None
                set_state_dict(model, guided, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
            scheduler.load_state_dict(of_scheduler)
            assert "alpha_guided" not in guided.param_groups[0]
            count, iteration = len(guided.alpha_history), guided.iteration
            rates = train(net, loss_fn, guided, scheduler, rank, size, range(steps, steps + 10))
            after = list(guided.alpha_history.iterations)
            rates += train(net, loss_fn, guided, scheduler, rank, size, range(steps + 10, TOTAL))
            found[kind, when] = count, iteration, rates, after
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, run(save, 2, 2, folder)


@pytest.mark.compatibility("Process", "torch.distributed.checkpoint, ZeroRedundancyOptimizer: saved on 2, resumed on 4")
@pytest.mark.parametrize("size", [2, 4])
def test_rates_and_history_continue(saved, size):
    folder, before = saved
    ranks = run(resume, size, size, folder)
    for (kind, when), (count, iteration, rates) in before[0].items():
        found = [rank[kind, when] for rank in ranks]
        assert all(repr(other) == repr(found[0]) for other in found[1:])
        counted, at, following, after = found[0]
        assert (counted, at) == (count, iteration)
        assert len(after) >= count + 8  # the pair that was on its way is lost
        if when == "found":  # the rest is planned
            assert following[:10] == pytest.approx(rates, rel=1e-9)
        assert 0.0 < max(following[-20:]) < 1.0
        assert following[-1] < 0.2 * max(following[-20:])


def test_a_bare_optimizer_in_between():
    """What it is given goes with it; that it has moved on is noticed."""
    for text_in_plain_state, rate_goes_along, after, moved_on in run(both_ways, 2, 2):
        assert not text_in_plain_state
        assert rate_goes_along
        assert after == (5, 4)
        assert moved_on == (0, 0)


def both_ways(rank, size):
    model, net, loss_fn, guided, scheduler = build("ddp")
    train(net, loss_fn, guided, scheduler, rank, size, range(5))
    plain = any("alpha_guided" in group for group in guided.state_dict()["param_groups"])
    _, state = get_state_dict(model, guided)
    bare = torch.optim.AdamW(model.parameters())
    set_state_dict(model, bare, model_state_dict=model.state_dict(), optim_state_dict=state)
    alike = bare.param_groups[0]["lr"] == guided.param_groups[0]["lr"]
    again = AlphaGuided(torch.optim.AdamW(model.parameters()), net, loss_fn)
    again.load_state_dict(bare.state_dict())
    after = again.iteration, len(again.alpha_history)
    loss_fn(net(setups.batch(0)[0]), setups.batch(0)[1]).backward()
    bare.step()
    again.load_state_dict(bare.state_dict())
    return plain, alike, after, (again.iteration, len(again.alpha_history))


@pytest.mark.compatibility("Process", "a rank that dies: a clear error, and torchrun --max-restarts goes on")
def test_a_rank_dies_and_the_run_goes_on(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        "--monitor-interval=5",  # else the other rank may be stopped before it has noticed
        "-m", "tests.distributed.dying_run", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "did not get an answer from all others" in result.stderr
    first, second = (torch.load(tmp_path / f"end {rank}.pt") for rank in range(2))
    assert first["attempt"] == second["attempt"] == 1
    assert first["began"] == 20
    assert first["iteration"] == 40
    assert first["rates"] == second["rates"]
    assert len(first["history"]) >= 37
    assert first["history"] == second["history"]
