"""Started by torchrun: rank 1 dies in the middle; the second attempt goes on from the last checkpoint."""

import datetime
import os
import pathlib
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alpha_optim import AlphaGuided, AlphaScheduler
from alpha_optim.policies import Hold
from tests.distributed import setups
from tests.distributed.ranks import leave


def main(folder):
    torch.set_num_threads(1)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    # A store of its own for every attempt: gloo would look for the first one's addresses.
    store = (folder / f"store {attempt}").as_uri()
    timeout = datetime.timedelta(seconds=20)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    model, loss_fn = setups.mlp(), nn.CrossEntropyLoss()
    net = DistributedDataParallel(model)
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.01), net, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    file, began = folder / "checkpoint.pt", 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        guided.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        began = guided.iteration
    rates = []
    for step in range(began, 40):
        x, y = setups.of_rank(step, rank, 2)
        guided.zero_grad()
        loss_fn(net(x), y).backward()
        if attempt == 0 and rank == 1 and step == 25:
            os._exit(1)
        guided.step()
        scheduler.step()
        rates.append(guided.param_groups[0]["lr"])
        if rank == 0 and guided.iteration % 10 == 0 and guided.iteration < 40:
            state = {"model": model.state_dict(), "optimizer": guided.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save(state, folder / "new.pt")
            os.replace(folder / "new.pt", file)
    history = guided.alpha_history.alphas.tolist()
    end = {"attempt": attempt, "began": began, "iteration": guided.iteration, "rates": rates, "history": history}
    torch.save(end, folder / f"end {rank}.pt")
    leave()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
