"""The lock of a run folder, valid across hosts, and moving an old run aside."""

from __future__ import annotations

import json
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import free_name, load_json, parse_object, write_synced


class RunLock:
    """Context manager that holds the lock of a run folder; a missing folder is created.

    The lock is the file `run.lock` with {host, pid, started}. It is created by a hard link, which is atomic on local
    disks and on NFS and shows the complete record at once. A lock that is only an `flock` would not do: many cluster
    file systems support it within one host or not at all, and a worker forked from a killed process would keep it.

    The lock of a process of this host that has ended is taken over: contenders take turns by an `flock` of the stale
    file, and the first replaces it by a rename. Raises CheckpointError while another process of this host holds the
    lock, and for any process of another host, as that cannot be checked from here. Hosts are told apart by name.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._record: dict[str, object] = {}

    def __enter__(self) -> RunLock:
        path = self.run / "run.lock"
        record = {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}
        temporary = path.with_name(f".run.lock.{secrets.token_hex(8)}")
        try:
            try:
                self.run.mkdir(parents=True, exist_ok=True)
                write_synced(temporary, json.dumps(record).encode())
                # One iteration, unless a lock appears or disappears between the two calls.
                if not any(_link(temporary, path) or _take_over(temporary, path) for _ in range(100)):
                    raise CheckpointError(f"{path} cannot be taken: remove it if no process uses this run")
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.run} cannot be locked: {error}") from error
        self._record = record
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the lock file if it is still that of this process; a forked child does not delete its parent's."""
        # An error here must not hide the exception of the block; the lock is stale when the process has ended.
        with suppress(OSError, CheckpointError):
            path = self.run / "run.lock"
            if self._record.get("pid") == os.getpid() and load_json(path) == self._record:
                path.unlink()


def move_aside(run: Path) -> Path:
    """Rename RUN to RUN.replaced-1, or the next free number, and return the new path.

    It holds the run's lock meanwhile, so call it before locking. Raises CheckpointError if the run is in use.
    """
    run = run.absolute()
    if not run.is_dir():
        raise CheckpointError(f"{run} is not a folder")
    with RunLock(run) as lock:
        target = free_name(run.with_name(f"{run.name}.replaced"))
        try:
            run.rename(target)
        except OSError as error:
            raise CheckpointError(f"{run} cannot be moved to {target.name}: {error}") from error
        lock.run = target
    return target


def _link(temporary: Path, path: Path) -> bool:
    """Create the lock with the content of `temporary`; return False if there is a lock."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError:
        # The file system has no hard links. A reader that sees the file before its content refuses it as unreadable.
        try:
            write_synced(path, temporary.read_bytes())
        except FileExistsError:
            return False
    return True


def _take_over(temporary: Path, path: Path) -> bool:
    """Replace the lock of a process that has ended; return False if the lock changed meanwhile."""
    # Not at the top: Windows has no fcntl, and the rest of the package works there.
    import fcntl

    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                # Another contender may have replaced the file while this one waited.
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return False
                _refuse_if_held(path, file.read(4096))
                temporary.replace(path)
            finally:
                # Not left to closing: a child forked meanwhile would keep the flock.
                fcntl.flock(file, fcntl.LOCK_UN)
    except FileNotFoundError:
        return False
    return True


def _refuse_if_held(path: Path, data: bytes) -> None:
    try:
        owner = parse_object(data, str(path))
    except CheckpointError:
        owner = {}
    host, pid = owner.get("host"), owner.get("pid")
    if not isinstance(host, str) or type(pid) is not int or pid < 1:
        raise CheckpointError(f"the lock {path} is unreadable: remove it if no process uses this run")
    if host != socket.gethostname():
        raise CheckpointError(
            f"{path.parent} is in use by process {pid} on {host}; if that one is surely gone, remove {path}"
        )
    if _is_running(pid, owner.get("started")):
        raise CheckpointError(f"{path.parent} is in use by process {pid} on this host, {host}")


def _is_running(pid: int, started: object) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = _process_start(pid)
    # If the start time is unknown, a process with this pid counts as the owner: a refusal loses no data.
    return not (started and now) or started == now


def _process_start(pid: int) -> str:
    """Return the start of a process, which differs if its pid is reused; "ended" for a zombie, "" if unknown."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    # After the command in parentheses, which may contain any byte: the state, 18 other fields, the start time.
    fields = status.rpartition(b")")[2].split()
    return "ended" if fields[0] in (b"Z", b"X") else f"{int(fields[19])} ticks after boot {boot}"
