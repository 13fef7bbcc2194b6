"""Which process wrote a file, and whether it still runs: host, machine, pid and start."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil


def this_process() -> dict[str, object]:
    """Return {host, machine, pid, started}, which identify this process on every host.

    Containers may have equal host names and equal pids, so `machine` has the boot and the pid namespace of the system,
    and `started` the start of the process. Both are "" where /proc does not say so.
    """
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid)}


def is_of_this_machine(process: Mapping[str, object]) -> bool:
    """Return whether the pid of a process, as `this_process` describes it, can surely be looked up here.

    Where no system says which machine it is, as on macOS and Windows, the host name decides; on Linux, where that is
    often the same in several containers, the answer is then no.
    """
    machine = _machine()
    if not machine and sys.platform == "linux":
        return False
    return (process.get("host"), process.get("machine")) == (socket.gethostname(), machine)


def is_running(pid: int, started: object) -> bool:
    """Return whether a process of this machine runs; a zombie does not.

    If a start is unknown, a process with this pid counts as the same one.
    """
    if not psutil.pid_exists(pid):
        return False
    now = _started(pid)
    return not (started and now) or started == now


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"boot {boot} {Path('/proc/self/ns/pid').readlink()}" if boot else ""
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return the start of a process, which differs if its pid is reused; "ended" for a zombie, "" if unknown."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    # After the command in parentheses, which may contain any byte: the state, 18 other fields, the start time.
    fields = status.rpartition(b")")[2].split()
    return "ended" if fields[0] in (b"Z", b"X") else f"{int(fields[19])} ticks after boot"
