"""A training run that saves itself now and then; run as a program by `test_kill`, which kills it.

    python -m tests.killed_run FOLDER KIND BACKEND PRECISION STEPS

It goes on from the checkpoint in FOLDER, if there is one, and at the end writes everything that must not depend
on having been killed. The steps are the first ones of a run in which a rate is searched. With RANK, WORLD_SIZE and
STORE in the environment it is one of several processes that train one model: each has checkpoints of its own, and they
go on from the newest that all of them have.
"""

import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alpha_optim import AlphaGuided, AlphaScheduler
from tests.distributed.ranks import leave

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def batch(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(24, 6, generator=generator), torch.randint(0, 3, (24,), generator=generator)


LONGER = 10
"""By so much the run is longer than the steps that are made of it."""


def main(folder, kind, backend, precision, steps):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        store = Path(os.environ["STORE"]).as_uri()
        timeout = datetime.timedelta(seconds=30)
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    if backend in ("backpack", "cached"):
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
    loss_fn = nn.CrossEntropyLoss()
    net = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = AlphaGuided(OPTIMIZERS[kind](model.parameters()), net, loss_fn, backend=backend)
    scheduler = AlphaScheduler(optimizer, total_steps=LONGER * steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=7, enabled=precision == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    done, both = 0, [{int(file.stem.split()[1]) for file in folder.glob(f"{r} *.pt")} for r in range(ranks)]
    if set.intersection(*both):
        state = torch.load(folder / f"{rank} {max(set.intersection(*both))}.pt", weights_only=True)
        done = state.pop("done")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    for n in range(done, steps):
        x, y = (part[rank::ranks] for part in batch(n))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=precision != "fp32"):
            loss = loss_fn(net(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if n % 4 == 3:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"done": n + 1, **state}, folder / f"new {rank}")
            os.replace(folder / f"new {rank}", folder / f"{rank} {n + 1}.pt")
        print(n, flush=True)
    if rank == 0:
        history = optimizer.alpha_history
        weights = {name: value.tolist() for name, value in model.state_dict().items()}
        result = [weights, list(history), history.dropped, scheduler.get_last_lr(), optimizer.guard_events]
        (folder / "result.txt").write_text(repr(result))
    if ranks > 1:
        leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]))
