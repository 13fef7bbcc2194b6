"""How much memory a process may still take, and which errors mean that there was not enough."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import psutil
import torch

# What CUDA, HIP, XPU, MPS, HPU, their libraries and the CPU's allocator say. CUDNN_STATUS_NOT_SUPPORTED, which
# Accelerate counts as well, is not among them: a smaller batch does not change what cuDNN supports.
_TEXTS = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|PT_DEVMEM Allocation failed"
)
# Of the two versions of control groups: the mount, then the files of limit, use and statistics.
_CGROUP_2 = ("", "memory.max", "memory.current", "inactive_file")
_CGROUP_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on the device or on the host.

    Apart from torch's allocator for GPUs, libraries and devices raise a plain RuntimeError, which only its text tells
    from others.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _TEXTS.search(str(error)) is not None


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take: what the system has, and what its control group allows.

    A container or a Slurm job may have less than the system. Pages of files that are not in use count as free, as the
    kernel drops them first. `root` is the folder that holds `proc` and `sys`.
    """
    available: int = psutil.virtual_memory().available  # psutil has no type
    return min([available, *_left_in_cgroups(root)])


def memory_left(device: torch.device) -> int | None:
    """Return the bytes that tensors of this process may still take on a device, None if it does not tell."""
    if device.type == "cpu":
        return available_memory()
    if device.type != "cuda":
        return None
    # What torch has reserved and not given to tensors is free as well.
    free, reserved = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    return int(free + reserved - torch.cuda.memory_allocated(device))


def _left_in_cgroups(root: Path) -> list[int]:
    """Return the bytes left in the control group of this process, and in each one above it, where limited."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    left = []
    for line in lines:
        number, controllers, name = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        mount, *files = _CGROUP_2 if number == "0" else _CGROUP_1
        # In a container without a namespace of its own, the name is that of the host, and the group is the mount.
        groups = [PurePosixPath(name.lstrip("/")), *PurePosixPath(name.lstrip("/")).parents]
        for group in groups:
            left.extend(_left_in(root / "sys/fs/cgroup" / mount / group, *files))
    return left


def _left_in(group: Path, limit: str, use: str, inactive: str) -> list[int]:
    try:
        allowed, used = (group / limit).read_text().strip(), int((group / use).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # the group has no limit, as that of the root, or is not mounted here
        return []
    if allowed == "max":
        return []
    return [max(0, int(allowed) - used + int(statistics.get(inactive, 0)))]
