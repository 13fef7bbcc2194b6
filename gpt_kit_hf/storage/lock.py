"""One writer for a run folder: the lock that processes on all hosts see, and moving a finished run aside."""

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
    """Hold, as a context manager, the right to write into a run folder; the folder is made if missing.

    The lock is the file `run.lock` with {host, pid, started}. It comes into being by a hard link, which is
    atomic on local disks and NFS alike and shows the whole record at once; `flock` alone would be simpler, but
    many cluster file systems have it on one host only, or not at all, and a worker forked from a killed process
    would go on holding it. The lock of a process of this host that has ended is taken over: those who find it
    queue in an `flock` of that very file, and the first replaces it by its own in one rename. Raises
    CheckpointError while another process holds it, and for any process of another host, which cannot be seen
    from here. A host is its name.
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
                # One round, but for a lock that comes or goes between the two looks.
                if not any(_link(temporary, path) or _take_over(temporary, path) for _ in range(100)):
                    raise CheckpointError(f"{path} cannot be taken; remove it if no process uses this run")
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.run} cannot be locked: {error}") from error
        self._record = record
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the lock file if it is still this process's own; a forked child leaves its parent's."""
        # A lock that cannot be deleted must not hide the block's exception; its process is gone soon anyway.
        with suppress(OSError, CheckpointError):
            path = self.run / "run.lock"
            if self._record.get("pid") == os.getpid() and load_json(path) == self._record:
                path.unlink()


def move_aside(run: Path) -> Path:
    """Rename RUN to RUN.replaced-1, or the next free number, and return the new path; nothing is deleted.

    Takes the run's lock meanwhile, so call it before locking. Raises CheckpointError if the run is in use.
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
    """Create the lock with the content of `temporary`; return False if it exists."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError:
        # Some mounted drives have no hard links. A reader may see an empty record for an instant: refused.
        try:
            write_synced(path, temporary.read_bytes())
        except FileExistsError:
            return False
    return True


def _take_over(temporary: Path, path: Path) -> bool:
    """Replace the lock of a process that has ended; return False if the lock changed meanwhile."""
    # Here, not above: Windows lacks it, and the rest of the package works there.
    import fcntl

    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                # While this process waited, another may have replaced the file that is now locked.
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return False
                _refuse_if_held(path, file.read(4096))
                temporary.replace(path)
            finally:
                # Closing would not do where another thread has forked meanwhile: the child shares the lock.
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
        raise CheckpointError(f"the lock {path} is unreadable; remove it if no process uses this run")
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
    # Where the system does not tell, a process of that number counts as the owner: refusing loses nothing.
    return not (started and now) or started == now


def _process_start(pid: int) -> str:
    """Return when a process began, unlike for any other of its number; "ended" for a zombie, "" if unknown."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    # Behind the command's name, in parentheses and of any bytes: the state, 18 other fields, the start.
    fields = status.rpartition(b")")[2].split()
    return "ended" if fields[0] in (b"Z", b"X") else f"{int(fields[19])} ticks after boot {boot}"
