"""The memory that is free for this process."""

import os
from pathlib import Path

import torch

_GROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Free bytes for this process: of the GPU, or its share of what the machine has free and of what the container or
    the shell allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # `hawqfx.compile` loads without it

    free = min(psutil.virtual_memory().available, _free_in_group(), _free_address_space())
    return max(0, int(free)) // local_count()


def local_count() -> int:
    """The number of processes of the run on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_in_group() -> int | float:
    """What the control groups (version 2) of this process allow beyond what they use; files in the cache give way."""
    free = float("inf")
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
        inside = next((line[3:].lstrip("/") for line in own if line.startswith("0::")), "")
        for group in (_GROUPS / inside, *(_GROUPS / inside).parents):
            limit = group / "memory.max"
            if limit.is_file() and (text := limit.read_text().strip()) != "max":
                cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(cached["inactive_file"])
                free = min(free, int(text) - used)
    except (
        OSError,
        ValueError,
        KeyError,
    ):
        pass  # no such system, or none that may be read: then the machine's memory counts
    return free


def _free_address_space() -> int | float:
    """What `ulimit -v` leaves."""
    import psutil

    if not hasattr(psutil, "RLIMIT_AS"):  # on Linux alone
        return float("inf")
    process = psutil.Process()
    soft, _ = process.rlimit(psutil.RLIMIT_AS)
    return float("inf") if soft < 0 else soft - process.memory_info().vms
