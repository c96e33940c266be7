"""One process or many: rank, device and the calls that join them. torchrun sets the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """This process among those of a run."""

    rank: int  # its number over all machines; 0 writes files and speaks
    world: int  # how many there are
    device: torch.device  # where it computes

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0


def best_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def join_processes() -> Iterator[Process]:
    """Joins the processes that torchrun started, if it did; leaves them at the end."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Process(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
