"""What malloc does with freed memory, in a process of its own, and what the garbage collector looks at."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from gpt_kit_hf.training.runtime import memory

# The file by itself: to import the package takes longer than all else here.
PAGES = """
import resource, runpy, sys

if sys.argv[1] == "reuse":
    assert runpy.run_path(sys.argv[2])["reuse_freed_memory"]()
for _ in range(3):
    b"x" * (64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_are_made_of_memory_that_is_there() -> None:
    command, file = [sys.executable, "-c", PAGES], str(Path(memory.__file__))
    faults = {
        way: int(subprocess.run([*command, way, file], capture_output=True, text=True, check=True).stdout)
        for way in ("as it is", "reuse")
    }
    assert faults["as it is"] > 1000  # 64 MB have 16,384 pages, unless the system has large ones
    assert faults["reuse"] < faults["as it is"] / 20


def test_only_what_is_new_is_collected() -> None:
    class Node:
        other: Node

    def cycle(made: list[int]) -> None:
        first, second = Node(), Node()
        first.other, second.other = second, first
        weakref.finalize(first, made.append, 1)

    ended: list[int] = []
    before = len(gc.get_objects())
    with memory.frozen_objects():
        assert len(gc.get_objects()) < before / 10
        cycle(ended)
        gc.collect()
        assert ended == [1]
    assert gc.get_freeze_count() == 0
