"""Checkpoints against real kills, real write errors and altered bytes; resume against the uninterrupted run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import KILLED, die, in_child, start_child
from safetensors.torch import save_file

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import append_jsonl, replace_file, save_tensors
from gpt_kit_hf.storage.checkpoints import (
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from gpt_kit_hf.storage.lock import RunLock


def fill(folder: Path) -> None:
    (folder / "config.json").write_text('{"n_layer": 2}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "shards").mkdir()
    (folder / "shards" / "0.bin").write_bytes(folder.name.encode())


def save(run: Path, *steps: int, keep_last: int = 9, **options: Any) -> Path:
    for step in steps:
        folder = save_checkpoint(run, step, options.get("write", fill), keep_last=keep_last)
    return folder


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def no_report(line: str) -> None:
    raise AssertionError(f"unexpected report: {line}")


# --- saving ---------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_intact_and_described(tmp_path: Path) -> None:
    folder = save(tmp_path, 200)
    assert folder == tmp_path / "checkpoints" / "step-00000200"
    assert verify_checkpoint(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 200)
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "shards/0.bin"}
    sha256sum = shutil.which("sha256sum")
    if sha256sum:
        shown = subprocess.run([sha256sum, folder / "model.safetensors"], capture_output=True, text=True)
        assert manifest["files"]["model.safetensors"] == {"size": 10240, "sha256": shown.stdout.split()[0]}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_of_a_checkpoint_have_the_mode_of_ordinary_files(tmp_path: Path, umask: int) -> None:
    def write(folder: Path) -> None:
        fill(folder)
        save_tensors(folder / "optimizer.safetensors", {"w": torch.ones(3)})
        (folder / "model.safetensors").chmod(0o600)
        (folder / "shards" / "0.bin").chmod(0o777)

    before = os.umask(umask)
    try:
        folder = save(tmp_path, 1, write=write)
    finally:
        os.umask(before)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    written = {"config.json", "model.safetensors", "optimizer.safetensors", "shards/0.bin"}
    assert set(files) == written | {"manifest.json"}
    assert {name: oct(stat.S_IMODE(path.stat().st_mode)) for name, path in files.items()} == dict.fromkeys(
        files, oct(0o666 & ~umask)
    )
    assert verify_checkpoint(folder) == []


def test_a_mount_without_modes_of_its_own_takes_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    assert verify_checkpoint(save(tmp_path, 1)) == []


def test_a_kill_before_any_system_call_of_a_save_leaves_a_good_run(tmp_path: Path) -> None:
    """The child dies before its n-th change to the disk, for each n until a save runs through."""

    def save_and_die(run: Path, at: int) -> None:
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls > at:
                die()

        def audit(event: str, _: tuple[object, ...]) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                count()

        def counted_fsync(descriptor: int) -> None:
            count()
            fsync(descriptor)

        fsync = os.fsync
        # The child ends with these two in place; the parent never sees them.
        os.fsync = counted_fsync  # type: ignore[assignment]
        sys.addaudithook(audit)
        save(run, 3, keep_last=2)

    seen = set()
    for at in range(1000):
        run = tmp_path / str(at)
        save(run, 1, 2)
        code = in_child(lambda run=run, at=at: save_and_die(run, at))  # type: ignore[misc]
        steps = [checkpoint_step(path) for path in list_checkpoints(run)]
        seen.add(tuple(steps))
        newest = latest_checkpoint(run, report=no_report)
        assert newest is not None
        assert checkpoint_step(newest) == steps[-1] >= 2
        assert all(verify_checkpoint(path) == [] for path in list_checkpoints(run))
        save(run, 4, keep_last=2)
        assert len(names(run)) == 2, "leftovers of the killed save stay on the disk"
        if code == 0:
            break
        assert code == KILLED
    assert at > 30
    assert seen == {(1, 2), (1, 2, 3), (2, 3)}


def test_a_killed_process_is_succeeded(tmp_path: Path) -> None:
    """Killed from outside amid its write: its lock is taken over, the checkpoint before is used."""
    reader, writer = os.pipe()

    def hang(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        os.write(writer, b"writing")
        time.sleep(600)

    def body() -> None:
        with RunLock(tmp_path):
            save(tmp_path, 1)
            save(tmp_path, 2, write=hang)

    pid = start_child(body)
    assert os.read(reader, 7) == b"writing"
    with pytest.raises(CheckpointError, match=f"in use by process {pid}"), RunLock(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left, whole = names(tmp_path)
    assert left.startswith(".stage-step-00000002-")
    assert whole == "step-00000001"
    with RunLock(tmp_path):
        assert latest_checkpoint(tmp_path, report=no_report) == tmp_path / "checkpoints" / "step-00000001"
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    os.close(reader)
    os.close(writer)


def test_rotation_comes_last_and_keeps_what_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, 20, 30, 40)
    moves: list[str] = []
    rename = Path.rename

    def record(self: Path, target: Path) -> Path:
        if target.name.startswith(".trash-"):
            assert verify_checkpoint(tmp_path / "checkpoints" / "step-00000050") == []
        moves.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", record)
    save_checkpoint(tmp_path, 50, fill, keep_last=2, keep=[20])
    assert moves == ["step-00000050", ".trash-step-00000010", ".trash-step-00000030"]
    assert names(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]


def test_rotation_never_counts_newer_checkpoints(tmp_path: Path) -> None:
    newer = save(tmp_path, 10, 20, 90)
    (newer / "config.json").unlink()
    save(tmp_path, 30, keep_last=1)
    assert names(tmp_path) == ["step-00000030", "step-00000090"]


def test_an_intact_checkpoint_is_kept_and_a_damaged_one_moved_aside(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    calls: list[str] = []
    with_other_content = lambda stage: (stage / "other").write_text("x") and None  # noqa: E731
    check = lambda: calls.append("check")  # noqa: E731
    save_checkpoint(tmp_path, 10, with_other_content, keep_last=1, check=check, report=no_report)
    assert calls == ["check", "check"]
    assert (folder / "config.json").is_file()

    (folder / "config.json").write_text('{"n_layer": 3}')
    save_checkpoint(tmp_path, 10, with_other_content, keep_last=1, report=calls.append)
    assert (folder / "other").is_file()
    assert "config.json has changed" in calls[2]
    assert names(tmp_path) == ["damaged-step-00000010-1", "step-00000010"]


def test_who_may_not_write_changes_nothing_and_names_nothing(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".stage-step-00000001-of-another").mkdir(parents=True)
    allowed: list[bool] = []

    def check() -> None:
        if not allowed.pop():
            raise RuntimeError("taken over")
        assert names(tmp_path) == [".stage-step-00000001-of-another"]

    allowed[:] = [False]
    with pytest.raises(RuntimeError, match="taken over"):
        save_checkpoint(tmp_path, 1, fill, keep_last=1, check=check)
    assert names(tmp_path) == [".stage-step-00000001-of-another"]

    def fill_completely(folder: Path) -> None:
        fill(folder)
        assert names(tmp_path) == [folder.name]
        assert folder.name.startswith(".stage-step-00000001-")

    allowed[:] = [False, True]
    with pytest.raises(RuntimeError, match="taken over"):
        save_checkpoint(tmp_path, 1, fill_completely, keep_last=1, check=check)
    assert names(tmp_path) == []


def test_a_failed_write_keeps_the_old_one_and_frees_the_others(tmp_path: Path) -> None:
    save(tmp_path, 1)
    calls: list[str] = []

    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 2 was not saved: .*No space left") as caught:
        save_checkpoint(tmp_path, 2, full, keep_last=1, check=lambda: calls.append("check"))
    assert "\n" not in str(caught.value)
    assert calls == ["check", "check"]
    assert names(tmp_path) == ["step-00000001"]
    with pytest.raises(CheckpointError, match="needs 1,152,921,504,606,846,976 bytes"):
        save_checkpoint(tmp_path, 2, no_report, keep_last=1, required_bytes=1 << 60)  # type: ignore[arg-type]


def test_a_fault_of_the_program_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, 2, broken, keep_last=1)
    assert names(tmp_path) == []


def test_the_kernel_refusing_to_write_keeps_everything_old(tmp_path: Path) -> None:
    """A file size limit makes real writes fail midway, as a full disk does."""
    log, old = tmp_path / "metrics.jsonl", tmp_path / "old.txt"
    save(tmp_path, 1)
    old.write_bytes(b"old")
    append_jsonl(log, {"step": 1, "text": "x" * 60_000})
    before = log.read_bytes()
    weights = {"w": torch.zeros(100_000)}

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, len(before) + 5))
        for attempt in (
            lambda: save_checkpoint(tmp_path, 2, lambda f: save_tensors(f / "w", weights), keep_last=1),
            lambda: save_checkpoint(tmp_path, 2, lambda f: save_file(weights, f / "w"), keep_last=1),
            lambda: replace_file(old, b"x" * 100_000),
            lambda: append_jsonl(log, {"step": 2}),
        ):
            with pytest.raises(CheckpointError):
                attempt()

    assert in_child(body) == 0
    assert names(tmp_path) == ["step-00000001"]
    assert verify_checkpoint(tmp_path / "checkpoints" / "step-00000001") == []
    assert old.read_bytes() == b"old"
    assert log.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl", "old.txt"]


def test_what_cannot_be_described_is_not_saved(tmp_path: Path) -> None:
    def link(folder: Path) -> None:
        (folder / "model.safetensors").symlink_to("/etc/hostname")

    with pytest.raises(CheckpointError, match=r"model\.safetensors is a symbolic link"):
        save_checkpoint(tmp_path, 1, link, keep_last=1)
    with pytest.raises(CheckpointError, match="no file"):
        save_checkpoint(tmp_path, 1, lambda folder: None, keep_last=1)
    with pytest.raises(UsageError, match="keep_last=0"):
        save_checkpoint(tmp_path, 1, fill, keep_last=0)
    assert names(tmp_path) == []


# --- reading --------------------------------------------------------------------------------------------------


def flip_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def swap_for_link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def name_outside(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda m: m["files"].update({name: m["files"]["config.json"]}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (flip_bit, "model.safetensors has changed: its SHA-256 differs"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 99), "has 99 bytes instead of 10,240"),
    "deleted": (lambda f: (f / "shards" / "0.bin").unlink(), "shards/0.bin is missing"),
    "extra": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is not in the manifest"),
    "link": (swap_for_link, "config.json is a symbolic link"),
    "fifo": (lambda f: os.mkfifo(f / "pipe"), "pipe is a special file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda f: os.truncate(f / "manifest.json", 40), "not valid JSON"),
    "list": (lambda f: (f / "manifest.json").write_text("[]"), "must be a JSON object, is a list"),
    "deep": (lambda f: (f / "manifest.json").write_text('{"a":' * 100_000), "not valid JSON"),
    "format": (lambda f: edit_manifest(f, lambda m: m.update(format=2)), "not of format 1"),
    "step": (lambda f: edit_manifest(f, lambda m: m.update(step=7)), "manifest.json is of step 7"),
    "entry": (lambda f: edit_manifest(f, lambda m: m["files"].update(a=[])), "no size for a"),
    "parent": (name_outside("../config.json"), "names '../config.json', which leaves the folder"),
    "absolute": (name_outside("/etc/hostname"), "names '/etc/hostname', which leaves the folder"),
    "dotted": (name_outside("shards/../../x"), "which leaves the folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    alter, message = DAMAGES[damage]
    newest = save(tmp_path, 100, 200)
    alter(newest)
    problems = verify_checkpoint(newest)
    assert any(message in problem for problem in problems), problems
    reports: list[str] = []
    assert latest_checkpoint(tmp_path, report=reports.append) == tmp_path / "checkpoints" / "step-00000100"
    assert len(reports) == 1
    assert reports[0].startswith("step-00000200 is damaged and not used: ")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000100")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        latest_checkpoint(tmp_path, report=reports.append)


def test_only_checkpoints_are_listed_and_by_number(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
    assert latest_checkpoint(tmp_path, report=no_report) is None
    save(tmp_path, 100_000_000, 99_999_999, 0)
    for odd in ("step-1", "step-000000001", "damaged-step-00000001-1", ".trash-step-00000001", "step-x"):
        (tmp_path / "checkpoints" / odd).mkdir()
    (tmp_path / "checkpoints" / "step-00000005").write_text("a file")
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["step-00000000", "step-99999999", "step-100000000"]
    assert verify_checkpoint(tmp_path / "nowhere") != []
