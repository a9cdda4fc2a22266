"""
How much memory there is. A container, or a job of a scheduler, has a limit of its own: that of its control group, which
psutil does not know. On a CPU, the kernel kills what goes beyond it, and nothing is said.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def total_memory(device_type: str = "cpu") -> int:
    """Bytes of a GPU, or that the processes of this machine or container can have, with what is swapped out."""
    if device_type == "cuda":
        return of_gpu()[1]
    machine = psutil.virtual_memory().total
    return min([machine, *(group.limit for group in control_groups())]) + psutil.swap_memory().total


def free_memory(device_type: str = "cpu") -> int:
    """Bytes of a GPU that nothing uses, or that the processes of this machine or container can still have."""
    if device_type == "cuda":
        return of_gpu()[0]
    return min([psutil.virtual_memory().available, *(group.limit - group.used for group in control_groups())])


def of_gpu() -> tuple[int, int]:
    """Free bytes of the current GPU, and all of its bytes."""
    import torch

    return torch.cuda.mem_get_info()


@dataclass
class ControlGroup:
    """Processes that share a limit, in bytes."""

    limit: int
    used: int


def control_groups() -> Iterator[ControlGroup]:
    """Those of this process that have a limit, of version 2 and 1."""
    try:
        groups = OWN_GROUPS.read_text()
    except OSError:  # another system than Linux
        return
    for line in groups.splitlines():
        _, controllers, group = line.split(":", 2)
        folder, limit, used, file_pages = CONTROL_GROUPS, "memory.max", "memory.current", "inactive_file"
        if controllers:
            folder, limit, used = CONTROL_GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            file_pages = "total_inactive_file"
            if "memory" not in controllers.split(","):
                continue
        for path in (Path(group), *Path(group).parents):  # a limit of a group is one of those within it
            of_group = folder / path.relative_to("/")
            try:
                statistics = dict(line.split() for line in (of_group / "memory.stat").read_text().splitlines())
                # What was read from files and is not used any more gives way to what asks for memory.
                in_use = int((of_group / used).read_text()) - int(statistics.get(file_pages, 0))
                yield ControlGroup(int((of_group / limit).read_text()), in_use)
            except (OSError, ValueError):  # no such file, or "max"
                continue
