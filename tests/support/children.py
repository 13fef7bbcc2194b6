"""Forked processes that end, or are killed, where a test wants it."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable

KILLED = -signal.SIGKILL


def fork() -> int:
    with warnings.catch_warnings():
        # Newer Pythons warn that torch's threads do not survive a fork; the children here use none.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def start_child(body: Callable[[], object]) -> int:
    """Run body in a forked process that ends without pytest's own clean-up; return its pid."""
    if pid := fork():
        return pid
    code = 1
    try:
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def in_child(body: Callable[[], object]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(start_child(body), 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
