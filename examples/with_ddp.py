"""DistributedDataParallel: a small language model on several processes, from a learning rate that is far too low.

Nothing is added to the usual loop but the two lines that a single process has, too. Alpha is that of the samples of all
processes, and all of them find the same learning rate, bit for bit.

    torchrun --nproc-per-node=2 -m examples.with_ddp
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.benchmarks.models import GPT
from examples.data import pieces, text

LENGTH, BATCH = 64, 16


def language_model(vocabulary: int) -> GPT:
    """A GPT of 170,000 parameters that predicts the next letter."""
    torch.manual_seed(0)
    model = GPT(vocabulary, LENGTH, width=80, layers=2)
    for table in (model.embedding, model.positions):
        nn.init.normal_(table.weight, std=0.02)
    return model


def say_progress(step: int, steps: int, optimizer: AlphaGuided) -> None:
    """Ten lines a run, by the first process."""
    if torch.distributed.get_rank() == 0 and (step + 1) % max(1, steps // 10) == 0:
        m = optimizer.alpha_history[-1]
        print(f"step {step + 1:4d}  loss of all {m.loss_end:.3f}  rate {m.lr[0]:.3g}  alpha {m.alpha:+.2f}")


def say_rates_and_leave(scheduler: AlphaScheduler) -> None:
    """Compare the last rates of all processes, and end together."""
    rank = torch.distributed.get_rank()
    rates: list[float] = [0.0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(rates, scheduler.get_last_lr()[0])
    print(f"rank {rank}: last rate {rates[rank]:.6g}, the same on all ranks: {len(set(rates)) == 1}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(1)
    codes, vocabulary = text()
    model = DistributedDataParallel(language_model(vocabulary))
    loss_fn = nn.CrossEntropyLoss()

    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-6), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=args.steps)
    for step in range(args.steps):
        x, y = pieces(codes, LENGTH, BATCH, seed=step * size + rank)  # every process its own
        optimizer.zero_grad()
        loss = loss_fn(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        say_progress(step, args.steps, optimizer)
    scheduler.finish()
    if rank == 0:
        m = optimizer.alpha_history[-1]
        print(f"{m.samples_end} samples a step, information: {m.information.value}")
    say_rates_and_leave(scheduler)


if __name__ == "__main__":
    main()
