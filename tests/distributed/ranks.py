"""Runs a function in several processes that can talk to each other (gloo, this machine only)."""

import datetime
import os
import pathlib
import tempfile

import torch
import torch.distributed
import torch.multiprocessing


def run(function, size, *args, seconds=60):
    """Call ``function(rank, *args)`` in processes of their own; returns what each returned, in the order of ranks."""
    # Every process imports torch anew, which is most of the time a test takes: ask for many things at once.
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (function, size, folder, seconds, args), nprocs=size)
        return [torch.load(pathlib.Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(size)]


def leave():
    """End this process when all have come here, without the interpreter's end: threads of gloo can abort that."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def _work(rank, function, size, folder, seconds, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo",
        init_method=pathlib.Path(folder, "store").as_uri(),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    result = function(rank, *args)
    torch.save(result, pathlib.Path(folder, f"{rank}.pt"))
    leave()
