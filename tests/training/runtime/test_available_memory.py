"""Which errors mean that memory ran out, and how much a control group leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from gpt_kit_hf.training.runtime.available_memory import available_memory, out_of_memory

SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
    MemoryError(),
]
OTHER = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_a_lack_of_memory_is_recognised(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not out_of_memory(error)


def group(folder: Path, limit: str, used: int, inactive: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {2: ("memory.max", "memory.current", ""), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")}
    (folder / names[version][0]).write_text(f"{limit}\n")
    (folder / names[version][1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - inactive}\n{names[version][2]}inactive_file {inactive}\n")


def root_with(folder: Path, *lines: str) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_each_limit_of_the_control_groups_counts(tmp_path: Path) -> None:
    root = root_with(tmp_path, "0::/job/step")
    mount = root / "sys/fs/cgroup"
    group(mount / "job/step", "max", 3 << 20, 0)
    assert available_memory(root) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    group(mount / "job", str(9 << 20), 5 << 20, 2 << 20)  # the group above is limited
    assert available_memory(root) == (9 - 5 + 2) << 20
    group(mount / "job/step", str(4 << 20), 3 << 20, 0)
    assert available_memory(root) == 1 << 20
    group(mount / "job/step", str(2 << 20), 3 << 20, 0)  # lowered below what is in use
    assert available_memory(root) == 0


def test_version_1_and_a_container_that_shows_the_name_of_the_host(tmp_path: Path) -> None:
    root = root_with(tmp_path, "12:cpu,cpuacct:/docker/1a2b", "4:memory:/docker/1a2b", "0::/docker/1a2b")
    group(root / "sys/fs/cgroup/memory", str(8 << 20), 6 << 20, 1 << 20, version=1)
    assert available_memory(root) == 3 << 20


def test_without_control_groups_the_system_decides(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
