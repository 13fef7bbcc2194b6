"""Memory of a training process: glibc's allocator and Python's garbage collector."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt parameters of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def reuse_freed_memory() -> bool:
    """Make glibc keep the memory that this process frees; return False for another C library.

    By default glibc returns large blocks to the system when they are freed. Each training step then gets its tensors
    page by page, filled with zeros, which takes 5% of its time on a CPU (benchmarks/README.md). On a GPU torch has its
    own caching allocator.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def release_freed_memory() -> None:
    """Make glibc return all memory that this process has freed to the system, once; other C libraries do nothing."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    is_glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    return ctypes.CDLL(None) if is_glibc else None


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Let the garbage collector leave alone what exists now, until the end of the block.

    A full collection looks at every object, 450,000 with torch and transformers imported: 0.3 s of a step, again and
    again. What is made in the block is collected as always.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
