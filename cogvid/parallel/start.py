"""Begin and end the group of the processes that torchrun started."""

from __future__ import annotations

import functools
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store

from cogvid.weights.parallel_option import rank, world_size

TIMEOUT = timedelta(minutes=30)  # that a process waits for the others in one exchange; then it raises
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def begin(timeout: timedelta = TIMEOUT) -> None:
    """Begin the process group, once in a process: gloo for tensors on a CPU, NCCL for those on a GPU.

    Where the program has begun one, nothing happens. timeout: of each exchange.

    Raises:
        ValueError: the environment is not that of torchrun.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=connect(), rank=rank(), world_size=world_size(), timeout=timeout)


def leave() -> None:
    """End the process group, if there is one, after a run without errors: all processes must do it."""
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def connect() -> Store:
    """Return the store of torchrun, through which the processes find each other; it waits until it is there."""
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise ValueError(f"{missing[0]}: got none in the environment of {world_size()} processes, want torchrun's")
    return next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
