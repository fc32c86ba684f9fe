"""FSDP2 (`fully_shard`): the same language model, its parameters spread over the processes; saved in the middle.

Alpha comes from the slopes here (`information="slopes"`): those are certain, whatever is spread where. The state of
optimizer and search goes through `torch.distributed.checkpoint`.

    torchrun --nproc-per-node=2 -m examples.with_fsdp
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.data import pieces, text
from examples.with_ddp import BATCH, LENGTH, language_model, say_progress, say_rates_and_leave


def build(vocabulary: int, steps: int) -> tuple[nn.Module, nn.Module, AlphaGuided, AlphaScheduler]:
    """Model, loss function, optimizer and scheduler; first the model is spread, then the optimizer is made."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = language_model(vocabulary)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-6), model, loss_fn)
    return model, loss_fn, optimizer, AlphaScheduler(optimizer, total_steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(1)
    codes, vocabulary = text()
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    half = args.steps // 2
    for begin, end in ((0, half), (half, args.steps)):
        model, loss_fn, optimizer, scheduler = build(vocabulary, args.steps)
        if begin:  # go on from what was saved
            of_model, of_optimizer = get_state_dict(model, optimizer)
            state = {"model": of_model, "optimizer": of_optimizer, "scheduler": scheduler.state_dict()}
            dcp.load(state, checkpoint_id=folder[0])
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
        for step in range(begin, end):
            x, y = pieces(codes, LENGTH, BATCH, seed=step * size + rank)
            optimizer.zero_grad()
            loss_fn(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
            scheduler.step()
            say_progress(step, args.steps, optimizer)
        if not begin:
            of_model, of_optimizer = get_state_dict(model, optimizer)
            state = {"model": of_model, "optimizer": of_optimizer, "scheduler": scheduler.state_dict()}
            dcp.save(state, checkpoint_id=folder[0])
    if rank == 0:
        print(f"{optimizer.iteration} steps, {len(optimizer.alpha_history)} measured over both halves")
    say_rates_and_leave(scheduler)


if __name__ == "__main__":
    main()
