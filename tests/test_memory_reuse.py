"""What malloc does with freed memory, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import torch
from gpt_kit_hf.memory_reuse import reuse_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "reuse":
    assert reuse_freed_memory()
for _ in range(3):
    torch.ones(64 << 20, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(64 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_are_made_of_memory_that_is_there() -> None:
    faults = {
        way: int(subprocess.run([sys.executable, "-c", PAGES, way], capture_output=True, text=True, check=True).stdout)
        for way in ("as it is", "reuse")
    }
    assert faults["as it is"] > 1000  # 64 MB have 16,384 pages, unless the system has large ones
    assert faults["reuse"] < faults["as it is"] / 20
