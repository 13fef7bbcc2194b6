"""The lock of a run folder with real processes that are killed, race, fork or reuse a pid; moving a run aside."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from conftest import KILLED, die, in_child, start_child

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage import lock
from gpt_kit_hf.storage.lock import RunLock, move_aside


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
    forge(tmp_path, started="1 ticks after boot x")
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
def test_a_lock_of_another_host_or_an_unreadable_one_is_kept(tmp_path: Path, content: str, message: str) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        hold(tmp_path)
    assert f"remove {lock}" in str(caught.value) or "remove it" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert lock.read_text() == content


def test_a_forked_child_and_a_replaced_owner_release_nothing(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        assert in_child(lambda: lock.__exit__(None, None, None)) == 0
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
        reader, writer = os.pipe()

        def contend(run: Path = run, reader: int = reader, writer: int = writer) -> None:
            os.close(writer)
            os.read(reader, 1)  # returns, for all at once, when the parent closes its end
            try:
                with RunLock(run):
                    (run / f"won-{os.getpid()}").touch()
                    while len(list(run.glob("*-*"))) < 6:
                        time.sleep(0.005)
            except CheckpointError:
                (run / f"lost-{os.getpid()}").touch()

        children = [start_child(contend) for _ in range(6)]
        os.close(writer)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 6
        os.close(reader)
        assert len(list(run.glob("won-*"))) == 1
        assert len(list(run.glob("lost-*"))) == 5
        assert not list(run.glob("*run.lock*"))


def test_a_takeover_under_way_is_not_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(tmp_path, started="long ago")
    children: list[int] = []
    judge = lock._refuse_if_held

    def rival() -> None:
        monkeypatch.undo()
        with RunLock(tmp_path):
            os._exit(7)

    def judge_slowly(path: Path, data: bytes) -> None:
        """Let a rival run between this process's check of the dead owner and its takeover."""
        children.append(start_child(rival))
        for _ in range(30):
            time.sleep(0.01)
            if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOWAIT | os.WNOHANG):
                break
        judge(path, data)

    monkeypatch.setattr(lock, "_refuse_if_held", judge_slowly)
    with RunLock(tmp_path):
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


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
