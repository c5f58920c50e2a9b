"""The processes that measure together: one by default, several under torchrun.

Every process runs the same program on the same data.  The processes share out the batches and, if there are fewer
batches than processes, also the probes of a batch.  Only this file uses torch.distributed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hawqfx.errors import WorkerError


@dataclass(frozen=True)
class Team:
    """The processes that share a batch.

    Args:
        member: number of this process in the team, from 0.
        size: number of processes in the team.
        group: their torch.distributed group; None for a team of one.
    """

    member: int
    size: int
    group: Any = None

    def total(self, table: Tensor) -> Tensor:
        """The sum of the tables of all members, which have the same shape."""
        return _sum_over(table, self.group) if self.size > 1 else table


@dataclass(frozen=True)
class Workers:
    """All processes of the run.

    Args:
        rank: number of this process, from 0.
        count: number of processes.
        device: the device of the tensors that they exchange.
    """

    rank: int
    count: int
    device: torch.device

    @staticmethod
    def current(device: torch.device) -> "Workers":
        """The processes of this run; a single one without torch.distributed.

        Args:
            device: where this process computes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return Workers(0, 1, device)
        nccl = dist.get_backend() == "nccl"
        return Workers(dist.get_rank(), dist.get_world_size(), device if nccl else torch.device("cpu"))

    def total(self, table: Tensor) -> Tensor:
        """The sum of the tables of all processes, which have the same shape, on the device of `table`."""
        return _sum_over(table.to(self.device)).to(table.device) if self.count > 1 else table

    def from_first(self, number: int) -> int:
        """The number of process 0, in every process."""
        mine = torch.tensor([number if self.rank == 0 else 0], dtype=torch.int64)
        return int(self.total(mine)[0])

    def require_same(self, digest: str) -> None:
        """Checks that all processes have the same digest, in hexadecimal digits.

        Raises:
            WorkerError: if they differ.
        """
        numbers = torch.zeros(self.count, dtype=torch.int64)
        numbers[self.rank] = int(digest[:12], 16)
        if len(set(self.total(numbers).tolist())) > 1:
            raise WorkerError(
                "the processes have different models, data, losses or seeds: load the same weights and the same "
                "batches in each, and leave the sharing to hawqfx"
            )

    def share(self, batches: Sequence[int]) -> tuple[list[int], Team]:
        """Shares the batches out.  Every process must call it, because it makes groups of processes.

        Args:
            batches: numbers of the batches, the same in every process.

        Returns:
            The batches of this process, and the team that shares each of them.
        """
        if not batches:
            return [], Team(0, 1)
        teams = min(self.count, len(batches))
        size = self.count // teams
        groups = [dist.new_group([team + teams * k for k in range(size)]) for team in range(teams)] if size > 1 else []
        team, member = self.rank % teams, self.rank // teams
        if member >= size:  # the processes that are left over after equal teams have no work
            return [], Team(0, 1)
        return list(batches[team::teams]), Team(member, size, groups[team] if groups else None)


def _sum_over(table: Tensor, group: Any = None) -> Tensor:
    table = table.clone()
    dist.all_reduce(table, group=group)
    return table


@contextmanager
def launched(device: torch.device) -> Iterator[int]:
    """Joins the processes that torchrun started; without torchrun it does nothing.

    Args:
        device: where this process computes.

    Yields:
        The rank of this process.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield 0
        return
    # Imported later, by torch.export, it would take the group into the default arguments of its functions.  The group
    # would outlive destroy_process_group, and a thread of it that still lets go of a tensor aborts Python's exit.
    import_module("torch.distributed.nn")
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A day, because the fastest process waits for the slowest.  A dead process is noticed at once, by its connection.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
