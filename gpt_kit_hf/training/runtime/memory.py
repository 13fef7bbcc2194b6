"""Memory that a step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import platform

# The numbers of these options in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def reuse_freed_memory() -> bool:
    """Have this process keep what it frees, where its C library is glibc; return whether it does.

    Large tensors on a CPU are given back to the system as soon as they are freed, and each step gets them anew, page
    by page and filled with zeros: a twentieth of its time (benchmarks/README.md). On a GPU torch keeps memory itself.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
