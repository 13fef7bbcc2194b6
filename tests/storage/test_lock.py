"""The lock of a run folder with real processes that are killed, paused, race, fork or reuse a pid; two hosts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import KILLED, die, in_child, start_child

from gpt_kit_hf.errors import CheckpointError, RunError
from gpt_kit_hf.storage import lock, processes
from gpt_kit_hf.storage.lock import RunLock, move_aside

LEASE = 1.0  # seconds


def hold(run: Path) -> None:
    with RunLock(run):
        pass


def refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match="in use by process"):
        hold(run)


def forge(run: Path, **changes: object) -> Path:
    """Write a lock like this process's own, changed."""
    with RunLock(run):
        record = json.loads((run / "run.lock").read_text())
    (run / "run.lock").write_text(json.dumps({**record, **changes}))
    return run / "run.lock"


def on_host(name: str, body: Callable[[], object]) -> Callable[[], object]:
    """Return the body as it runs on another host, in a child process."""

    def run() -> None:
        socket.gethostname = lambda: name
        body()

    return run


def wait_for(file: Path) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until, f"{file.name} does not appear"
        time.sleep(0.005)


def ended_well(*pids: int) -> bool:
    return [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)


# --- one host -------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_the_first_releases(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    with RunLock(run):
        record = json.loads((run / "run.lock").read_text())
        assert record["pid"] == os.getpid()
        assert in_child(lambda: refused(run)) == 0
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on this host, {record['host']}"):
            hold(run)
        assert (run / "run.lock").is_file()
    assert list(run.iterdir()) == []
    with pytest.raises(KeyError), RunLock(run):
        raise KeyError
    assert in_child(lambda: hold(run)) == 0


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    def lock_and_die() -> None:
        with RunLock(tmp_path):
            die()

    pid = start_child(lock_and_die)
    # A zombie, as a child of a launcher that has not waited for it yet.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == pid
    hold(tmp_path)
    os.waitpid(pid, 0)
    assert in_child(lock_and_die) == KILLED
    hold(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_reused_pid_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    forge(tmp_path, started="1 ticks after boot")
    hold(tmp_path)
    forge(tmp_path)
    with pytest.raises(CheckpointError, match="in use by process"):
        hold(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"host": "elsewhere", "pid": 1, "started": ""}', "process 1 on elsewhere; if that one is surely gone"),
        ('{"host": "elsewhere", "pid": -1}', "unreadable"),
        ("", "unreadable"),
        ("[]", "unreadable"),
    ],
)
def test_a_lock_without_a_lease_or_an_unreadable_one_is_kept(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.lock"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        hold(tmp_path)
    assert f"remove {file}" in str(caught.value) or "remove it" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert file.read_text() == content


def test_a_forked_child_and_a_replaced_owner_release_nothing(tmp_path: Path) -> None:
    with RunLock(tmp_path) as held:
        assert in_child(lambda: held.__exit__(None, None, None)) == 0
        assert in_child(lambda: sys.exit(0)) == 1
        assert (tmp_path / "run.lock").is_file()
        (tmp_path / "run.lock").write_text('{"host": "elsewhere", "pid": 1, "started": ""}')
    assert (tmp_path / "run.lock").is_file()


@pytest.mark.parametrize(("stale", "links"), [(True, True), (False, True), (False, False)])
def test_of_many_at_once_one_gets_the_lock(
    tmp_path: Path, stale: bool, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(self: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    for round_ in range(4):
        run = tmp_path / str(round_)
        run.mkdir()
        if stale:
            forge(run, started="long ago")
        contest(run, [socket.gethostname()] * 6)


def contest(run: Path, hosts: list[str]) -> None:
    """Let contenders on hosts ask for a lock at once, and check that one gets it."""
    reader, writer = os.pipe()

    def contend() -> None:
        os.close(writer)
        os.read(reader, 1)  # returns, for all at once, when the parent closes its end
        try:
            with RunLock(run, lease=LEASE) as held:
                (run / f"won-{os.getpid()}").touch()
                while len(list(run.glob("*-*"))) < len(hosts):
                    time.sleep(0.005)
                held.check()
        except CheckpointError:
            (run / f"lost-{os.getpid()}").touch()

    children = [start_child(on_host(host, contend)) for host in hosts]
    os.close(writer)
    assert ended_well(*children)
    os.close(reader)
    assert len(list(run.glob("won-*"))) == 1
    assert len(list(run.glob("lost-*"))) == len(hosts) - 1
    assert not list(run.glob("*run.lock*"))


def test_a_link_whose_answer_got_lost_is_the_own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends the request again, and then says that the file exists."""
    link = Path.hardlink_to

    def link_twice(self: Path, target: Path) -> None:
        link(self, target)
        link(self, target)

    monkeypatch.setattr(Path, "hardlink_to", link_twice)
    with RunLock(tmp_path) as held:
        held.check()
    assert list(tmp_path.iterdir()) == []


def test_a_takeover_under_way_is_not_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival that sees the same ended owner waits for the one that has claimed the lock, and is then refused."""
    forge(tmp_path, started="long ago")
    children: list[int] = []
    link = lock._link

    def rival() -> None:
        monkeypatch.undo()
        with RunLock(tmp_path):
            os._exit(7)

    def link_slowly(temporary: Path, path: Path) -> bool:
        """Let a rival run between this process's claim and its takeover."""
        linked = link(temporary, path)
        if linked and path.name != "run.lock":
            children.append(start_child(rival))
            for _ in range(30):
                time.sleep(0.01)
                if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOWAIT | os.WNOHANG):
                    break
        return linked

    monkeypatch.setattr(lock, "_link", link_slowly)
    with RunLock(tmp_path):
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_claim_of_a_killed_contender_does_not_block(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_READS", 10)
    forge(tmp_path, started="long ago", lease=0.1, **({"host": "elsewhere"} if elsewhere else {}))

    def claim_and_die() -> None:
        monkeypatch.setattr(Path, "replace", lambda *paths: die())
        hold(tmp_path)

    assert in_child(claim_and_die) == KILLED
    assert len(list(tmp_path.glob(".run.lock.*"))) == 2  # the record of that one, and its claim
    hold(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_paused_contender_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of this machine that is paused for two leases between its claim and its takeover still gets the lock."""
    monkeypatch.setattr(lock, "_READS", 10)
    forge(tmp_path, host="elsewhere", lease=0.1)
    link, children = lock._link, list[int]()

    def rival() -> None:
        monkeypatch.setattr(lock, "_link", link)
        with RunLock(tmp_path, lease=0.1):
            os._exit(7)

    def link_slowly(temporary: Path, path: Path) -> bool:
        linked = link(temporary, path)
        if linked and path.name != "run.lock":
            children.append(start_child(rival))
            os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOWAIT)
        return linked

    monkeypatch.setattr(lock, "_link", link_slowly)
    with RunLock(tmp_path) as held:
        held.check()
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


def test_what_killed_contenders_left_is_deleted(tmp_path: Path) -> None:
    """Those of processes that may still run are kept: of this one, and of another host if not an hour old."""
    with RunLock(tmp_path):
        own = json.loads((tmp_path / "run.lock").read_text())
    leftovers: dict[str, tuple[dict[str, object] | None, int]] = {
        "of a running process": (own, 7200),
        "of an ended one": ({**own, "pid": 2**31 - 1}, 0),
        "of one with a reused pid": ({**own, "started": "long ago"}, 0),
        "of another host": ({**own, "host": "elsewhere"}, 60),
        "of another host, old": ({**own, "host": "elsewhere"}, 7200),
        "being written": (None, 60),
        "half written, old": (None, 7200),
    }
    now = time.time()
    for name, (record, age) in leftovers.items():
        path = tmp_path / f".run.lock.{name}"
        path.write_text(json.dumps(record) if record else '{"host": "el')
        os.utime(path, (now - age, now - age))
    hold(tmp_path)
    kept = {path.name.removeprefix(".run.lock.") for path in tmp_path.iterdir()}
    assert kept == {"of a running process", "of another host", "being written"}


# --- two hosts ------------------------------------------------------------------------------------------------


def test_the_lock_of_a_killed_process_elsewhere_is_taken_over_when_its_lease_ends(tmp_path: Path) -> None:
    def lock_and_die() -> None:
        with RunLock(tmp_path, lease=LEASE):
            die()

    assert in_child(on_host("elsewhere", lock_and_die)) == KILLED
    lines: list[str] = []
    pid = json.loads((tmp_path / "run.lock").read_text())["pid"]
    with RunLock(tmp_path, report=lines.append) as held:
        held.check()
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert lines == [
        f"{tmp_path} is locked by process {pid} on elsewhere: waiting for its lease to end, 1 s unless it is renewed"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("equal", ["host", "host and pid"])
def test_containers_with_equal_names_are_two_machines(
    equal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of another container, with this one's host name and even its pid, is not looked for here."""
    changes = {} if equal == "host and pid" else {"pid": 2**31 - 1}
    forge(tmp_path, machine="boot of another", lease=LEASE, **changes)
    lines: list[str] = []
    with RunLock(tmp_path, report=lines.append):
        assert len(lines) == 1


def test_a_lease_that_is_renewed_is_not_taken_over(tmp_path: Path) -> None:
    released = tmp_path / "released"

    def holder() -> None:
        with RunLock(tmp_path, lease=LEASE) as held:
            wait_for(released)
            held.check()

    pid = start_child(on_host("elsewhere", holder))
    wait_for(tmp_path / "run.lock")
    with pytest.raises(CheckpointError, match=f"in use by process {pid} on elsewhere"):
        hold(tmp_path)
    released.touch()
    assert ended_well(pid)


def test_a_lock_that_is_released_during_the_wait_is_taken(tmp_path: Path) -> None:
    released = tmp_path / "released"

    def holder() -> None:
        with RunLock(tmp_path, lease=60.0):
            wait_for(released)

    pid = start_child(on_host("elsewhere", holder))
    wait_for(tmp_path / "run.lock")
    with RunLock(tmp_path, report=lambda line: released.touch()) as held:
        held.check()
    assert ended_well(pid)


def test_of_many_hosts_one_takes_an_ended_lease_over(tmp_path: Path) -> None:
    forge(tmp_path, host="gone", lease=LEASE)
    contest(tmp_path, [f"host-{number}" for number in range(6)])


def test_of_many_one_takes_over_from_a_killed_contender(tmp_path: Path) -> None:
    """All of them see at once that its claim is as old as a lease."""
    path = forge(tmp_path, host="gone", lease=LEASE)
    claim = tmp_path / f".run.lock.{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    claim.write_text(json.dumps({**json.loads(path.read_text()), "id": "of a contender"}))
    contest(tmp_path, [f"host-{number}" for number in range(6)])


def test_a_paused_holder_stops_after_its_lease_was_taken_over(tmp_path: Path) -> None:
    """It wakes, renews nothing of the other's, releases nothing of it, and is told so before it writes."""
    paused, woken = tmp_path / "paused", tmp_path / "woken"

    def holder() -> None:
        with RunLock(tmp_path, lease=LEASE) as held:
            held.check()
            paused.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            held._renewal.join(LEASE)  # several renewals would be due
            with pytest.raises(RunError, match=f"taken over by process {os.getppid()} on "):
                held.check()
        woken.touch()

    pid = start_child(on_host("elsewhere", holder))
    os.waitpid(pid, os.WUNTRACED)
    assert paused.exists()
    with RunLock(tmp_path) as held:
        os.kill(pid, signal.SIGCONT)
        wait_for(woken)
        assert ended_well(pid)
        held.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["paused", "woken"]


def test_a_lock_that_was_removed_is_lost_and_one_that_cannot_be_read_is_not(tmp_path: Path) -> None:
    with RunLock(tmp_path) as held:
        record = held.path.read_bytes()
        held.path.unlink()
        with pytest.raises(RunError, match=r"run\.lock was removed: this process stops"):
            held.check()
        held.path.mkdir()
        with pytest.raises(CheckpointError, match="cannot be read"):
            held.check()
        held.path.rmdir()
        held.path.write_bytes(record)
        held.check()


def test_without_proc_the_host_name_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows: there is no start of a process, and no namespace."""
    monkeypatch.setattr(processes, "_machine", lambda: "")
    monkeypatch.setattr(processes, "_started", lambda pid: "")
    monkeypatch.setattr(sys, "platform", "darwin")

    def lock_and_die() -> None:
        with RunLock(tmp_path):
            die()

    assert in_child(lock_and_die) == KILLED
    with RunLock(tmp_path):
        refused(tmp_path)


@pytest.mark.parametrize("boot_id", ["", "\n", None])
def test_on_linux_without_a_boot_id_no_process_is_surely_of_this_machine(
    boot_id: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers with the same host name and the same pid would be taken for one."""
    read_text = Path.read_text

    def read(self: Path, *arguments: Any) -> str:
        if self.name != "boot_id":
            return read_text(self, *arguments)
        if boot_id is None:
            raise FileNotFoundError(self)
        return boot_id

    monkeypatch.setattr(Path, "read_text", read)
    assert not processes.is_of_this_machine(processes.this_process())
    forge(tmp_path, lease=0.2)
    lines: list[str] = []
    with RunLock(tmp_path, report=lines.append):
        assert len(lines) == 1  # it waited for the lease


# --- moving aside ---------------------------------------------------------------------------------------------


def test_a_run_is_moved_aside_whole_unless_in_use(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="is not a folder"):
        move_aside(run)
    for number in (1, 2):
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / f"file-{number}").touch()
        moved = move_aside(run)
        assert moved == tmp_path / f"run.replaced-{number}"
        assert not run.exists()
        assert sorted(moved.rglob("*")) == [moved / "checkpoints", moved / "checkpoints" / f"file-{number}"]
    with RunLock(run), pytest.raises(CheckpointError, match="in use"):
        move_aside(run)
    assert run.is_dir()
