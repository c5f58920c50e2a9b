"""The processes that measure together: one by default, several under torchrun.

Every process runs the same program on the same data; batches are shared out, and where there are more processes than
batches, the probes of a batch too.  Only this file speaks to torch.distributed.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hawqfx.errors import WorkerError


@dataclass(frozen=True)
class Team:
    """The processes that share a batch: `member` of `size`.  `group` is None for a team of one."""

    member: int
    size: int
    group: Any = None

    def total(self, table: Tensor) -> Tensor:
        """The sum of everybody's `table`."""
        return _total(table, self.group) if self.size > 1 else table


@dataclass(frozen=True)
class Workers:
    """All processes: this one is `rank` of `count`.  `device` is where their messages live."""

    rank: int
    count: int
    device: torch.device

    @staticmethod
    def here(device: torch.device) -> "Workers":
        if not (dist.is_available() and dist.is_initialized()):
            return Workers(0, 1, device)
        nccl = dist.get_backend() == "nccl"
        return Workers(dist.get_rank(), dist.get_world_size(), device if nccl else torch.device("cpu"))

    def total(self, table: Tensor) -> Tensor:
        """The sum of everybody's `table`."""
        return _total(table.to(self.device)).to(table.device) if self.count > 1 else table

    def from_first(self, number: int) -> int:
        """The number that process 0 has."""
        mine = torch.tensor([number if self.rank == 0 else 0], dtype=torch.int64)
        return int(self.total(mine)[0])

    def agree(self, digest: str) -> None:
        """Raises WorkerError if the processes measure different things."""
        number = int(digest[:12], 16)
        seen = torch.zeros(self.count, dtype=torch.int64)
        seen[self.rank] = number
        if len(set(self.total(seen).tolist())) > 1:
            raise WorkerError(
                "the processes have different models, data, losses or seeds: load the same weights and the same "
                "batches in each, and leave the sharing to hawqfx"
            )

    def share(self, batches: Sequence[int]) -> tuple[list[int], Team]:
        """The batches that this process works on, and with whom.  Collective: every process must call it."""
        if not batches:
            return [], Team(0, 1)
        teams = min(self.count, len(batches))
        size = self.count // teams
        groups = [dist.new_group([team + teams * k for k in range(size)]) for team in range(teams)] if size > 1 else []
        team, member = self.rank % teams, self.rank // teams
        if member >= size:  # more processes than can be shared out evenly
            return [], Team(0, 1)
        return list(batches[team::teams]), Team(member, size, groups[team] if groups else None)


def _total(table: Tensor, group: Any = None) -> Tensor:
    table = table.clone()
    dist.all_reduce(table, group=group)
    return table


@contextmanager
def launched(device: torch.device) -> Iterator[int]:
    """Join the processes that torchrun started, if it did; gives this one's rank."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield 0
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # a day: the fastest process waits for the slowest; one that dies is noticed at once, by its closed connection
    dist.init_process_group(backend, timeout=timedelta(days=1))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def local_count() -> int:
    """Processes of the run that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
