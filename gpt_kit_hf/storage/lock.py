"""The lock of a run folder, a lease that is valid across hosts, and moving an old run aside."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gpt_kit_hf.errors import CheckpointError, RunError
from gpt_kit_hf.storage.atomic_files import Report, free_name, parse_object, write_synced
from gpt_kit_hf.storage.processes import is_of_this_machine, is_running, this_process

# A holder renews its lease six times in this time, so a file system that hangs for a minute does not end it.
LEASE_SECONDS = 90.0
_RENEWALS = 6
_READS = 180  # of a contender in the time of a lease
# A contender waits for less than this; an older file of one that may run elsewhere is that of a killed one.
_LEFTOVER_SECONDS = 3600.0

_log = logging.getLogger(__name__)


class RunLock:
    """Context manager that holds the lock of a run folder; a missing folder is created.

    The lock is the file `run.lock` with the process, a random id, the lease in seconds and a counter. A thread renews
    the lease by counting up. Creation is by a hard link, which is atomic on local disks and on NFS and shows the
    complete record at once. An `flock` would not do: many cluster file systems support it within one host or not at
    all, Windows lacks it, and a worker forked from a killed process would keep it.

    The lock of a process of this machine that has ended is taken over at once. That of another machine is taken over
    if this process sees its counter unchanged for its whole lease; no clocks are compared. `report` gets a line before
    such a wait. Raises CheckpointError if the holder runs on this machine, or renews its lease during the wait. Files
    that killed contenders left are deleted.

    A holder that was paused for longer than its lease must not write: call `check` before each write.
    """

    def __init__(self, run: Path, *, lease: float | None = None, report: Report = _log.warning) -> None:
        self.run, self._report = run, report
        self._lease = LEASE_SECONDS if lease is None else lease
        self._record: dict[str, Any] = {}
        self._released = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    @property
    def path(self) -> Path:
        """The lock file."""
        return self.run / "run.lock"

    def __enter__(self) -> RunLock:
        record = {**this_process(), "id": secrets.token_hex(8), "lease": self._lease, "renewed": f"{0:012d}"}
        temporary = self.path.with_name(f".run.lock.{secrets.token_hex(8)}")
        self._record = record
        try:
            try:
                self.run.mkdir(parents=True, exist_ok=True)
                write_synced(temporary, json.dumps(record).encode())
                self._acquire(temporary)
            finally:
                temporary.unlink(missing_ok=True)
            self._delete_leftovers()
        except OSError as error:
            raise CheckpointError(f"{self.run} cannot be locked: {error}") from error
        self._renewal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the lock file if it is still that of this process; a forked child does not delete its parent's."""
        if self._record.get("pid") != os.getpid():
            return
        self._released.set()
        self._renewal.join(timeout=self._lease / _RENEWALS)
        # An error here must not hide the exception of the block; the lock is stale when the process has ended.
        with suppress(OSError):
            if self._is_own(self.path.read_bytes()):
                self.path.unlink()

    def check(self) -> None:
        """Raise RunError if another process took the lock over, or it was removed: nothing may be written any more.

        It reads a file of 300 bytes. Raises CheckpointError if that fails for another reason.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            raise RunError(f"{self.path} was removed: this process stops and writes nothing more") from None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        if not self._is_own(data):
            owner = _owner(self.path, data)
            raise RunError(
                f"{self.run} was taken over by process {owner['pid']} on {owner['host']}, as this one had not renewed "
                f"its lease for {self._lease:.0f} s: it stops and writes nothing more"
            )

    def _is_own(self, data: bytes) -> bool:
        return str(self._record["id"]).encode() in data

    def _renew(self) -> None:
        """Count up in the lock file until it is released; a failure is left to `check`."""
        for count in range(1, 10**12):
            if self._released.wait(self._lease / _RENEWALS):
                return
            record = json.dumps({**self._record, "renewed": f"{count:012d}"}).encode()
            # Into the same file, at the same length: a new one could replace that of a process which took over.
            with suppress(OSError), self.path.open("r+b", buffering=0) as file:
                if self._is_own(file.read(4096)):
                    file.seek(0)
                    file.write(record)

    def _acquire(self, temporary: Path) -> None:
        """Give the file of this process the name of the lock, when that is free or may be taken over."""
        watched, claims, reads, first = _Watched(self.path), dict[Path, _Watched](), 0, None
        while not _link(temporary, self.path):
            try:
                data = watched.read()
            except FileNotFoundError:
                continue
            if self._is_own(data):
                return  # the link was made, but NFS lost the answer and asked again
            owner = _owner(self.path, data)
            lease, first = self._time_left(owner), first or owner
            # Reads are counted, not seconds: while the file system hangs, the holder cannot renew its lease either.
            reads += 1
            if reads == 1 and lease:
                self._report(
                    f"{self.run} is locked by process {owner['pid']} on {owner['host']}: waiting for its lease to "
                    f"end, {lease:.0f} s unless it is renewed"
                )
            if owner.get("id") != first.get("id") or (reads > _READS and watched.unchanged < _READS / 3):
                raise self._in_use(owner)
            if (watched.unchanged >= _READS or not lease) and self._take_over(data, temporary, claims):
                return
            time.sleep((lease or self._lease) / _READS)

    def _take_over(self, seen: bytes, temporary: Path, claims: dict[Path, _Watched]) -> bool:
        """Replace the lock with the content `seen`; return False if it changed or another contender is doing the same.

        Only the contender that creates the claim, a file named after that content, may replace the lock. An abandoned
        claim is not deleted, as two contenders might do so, but claimed itself.
        """
        claim = self._claim_of(seen)
        chain = [claim]
        while not _link(temporary, claim):
            try:
                data = claims.setdefault(claim, _Watched(claim)).read()
            except FileNotFoundError:
                return False
            if self._is_own(data):
                break  # as for the lock
            if not self._is_abandoned(claims[claim]):
                return False
            claim = self._claim_of(claim.name.encode() + data)
            chain.append(claim)
        try:
            if self.path.read_bytes() != seen:
                return False
            temporary.replace(self.path)
        except FileNotFoundError:
            return False
        finally:
            for claim in chain:
                claim.unlink(missing_ok=True)
        return True

    def _claim_of(self, content: bytes) -> Path:
        return self.path.with_name(f".run.lock.{hashlib.sha256(content).hexdigest()[:16]}")

    def _is_abandoned(self, claim: _Watched) -> bool:
        """Return whether a contender has ended between its claim and its takeover."""
        is_old, claimant = claim.unchanged >= _READS, _record(claim.path, claim.data)
        has_ended = self._has_ended(claimant, is_old=is_old)
        if is_old and not has_ended and claimant is not None:
            raise self._in_use(claimant)  # it is paused
        return has_ended

    def _delete_leftovers(self) -> None:
        """Delete the records and claims of contenders that were killed; those of any that may still run are kept."""
        with suppress(OSError):  # they do no harm
            now = self.path.stat().st_mtime
            for path in self.run.glob(".run.lock.*"):
                # Both times are the file system's: no clocks are compared.
                data, age = path.read_bytes(), now - path.stat().st_mtime
                if self._has_ended(_record(path, data), is_old=age > _LEFTOVER_SECONDS):
                    path.unlink(missing_ok=True)

    @staticmethod
    def _has_ended(process: Mapping[str, Any] | None, *, is_old: bool) -> bool:
        """Return whether a process has surely ended; `is_old` decides about one that cannot be looked up here."""
        if process is None or not is_of_this_machine(process):
            return is_old
        return not is_running(process["pid"], process.get("started"))

    def _in_use(self, owner: Mapping[str, Any]) -> CheckpointError:
        return CheckpointError(f"{self.run} is in use by process {owner['pid']} on {owner['host']}")

    def _time_left(self, owner: Mapping[str, Any]) -> float:
        """Return the seconds that a lock must stay unchanged to be taken over; raise CheckpointError if it may not."""
        pid, host, lease = owner["pid"], owner["host"], owner.get("lease")
        if is_of_this_machine(owner):
            if is_running(pid, owner.get("started")):
                raise CheckpointError(f"{self.run} is in use by process {pid} on this host, {host}")
            return 0.0
        if not isinstance(lease, (int, float)):
            raise CheckpointError(
                f"{self.run} is in use by process {pid} on {host}; if that one is surely gone, remove {self.path}"
            )
        return float(lease)


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


class _Watched:
    """A file, its content when it was last read, and how many reads in a row have not found it changed."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.unchanged = path, b"", 0

    def read(self) -> bytes:
        """Return the content. Raises FileNotFoundError."""
        data = self.path.read_bytes()
        self.unchanged = self.unchanged + 1 if data == self.data else 0
        self.data = data
        return data


def _record(path: Path, data: bytes) -> dict[str, Any] | None:
    """Return the record in a file of the lock, or None if it has none, as one that is being written."""
    try:
        owner = parse_object(data, str(path))
    except CheckpointError:
        return None
    host, pid = owner.get("host"), owner.get("pid")
    return owner if isinstance(host, str) and type(pid) is int and 0 < pid < 2**31 else None


def _owner(path: Path, data: bytes) -> dict[str, Any]:
    """Return the record in the lock; raise CheckpointError if it has none."""
    owner = _record(path, data)
    if owner is None:
        raise CheckpointError(f"the lock {path} is unreadable: remove it if no process uses this run")
    return owner
