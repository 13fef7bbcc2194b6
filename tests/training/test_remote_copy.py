"""Runs with a copy on a remote file system: continued elsewhere to the bit, and what a failure leaves."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from test_pretrain import LINES, assert_same_run, options

from gpt_kit_hf import CheckpointError, UsageError, train
from gpt_kit_hf.storage.checkpoints import list_checkpoints, verify_checkpoint
from gpt_kit_hf.storage.remote_run import RemoteRun


class KilledError(BaseException):
    """Ends a run where a kill would."""


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text("".join(LINES) * 8)
    return str(file)


def run(folder: Path, text_file: str, **changes: Any) -> str:
    """Train with few checkpoints; return the output."""
    output = io.StringIO()
    quiet: dict[str, Any] = {"save_total_limit": 2, "sample_steps": 0, "report_to": ["none"]}
    train(options(folder, text_file, **{**quiet, **changes}), stream=output)
    return output.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> Path:
    """A run without a copy, which was not interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, text_file)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> Path:
    """The copy of a run that was killed after its checkpoint of step 8; its folder is lost."""
    place = tmp_path_factory.mktemp("killed")
    run_until_killed(place / "lost", text_file, f"file://{place}/copy")
    return place / "copy"


@pytest.fixture
def copy(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "copy"))


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


def run_until_killed(folder: Path, text_file: str, url: str) -> None:
    update = RemoteRun.update

    def update_and_die(self: RemoteRun, step: int, **rule: Any) -> None:
        update(self, step, **rule)
        if step == 8:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteRun, "update", update_and_die)
        with pytest.raises(KilledError):
            run(folder, text_file, remote_dir=url)
    shutil.rmtree(folder)


def files_below(root: Path) -> dict[str, bytes]:
    """The files of a run that are copied, by name."""
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".")}


def test_a_run_continues_on_another_machine_to_the_bit(
    whole: Path, copy: Path, text_file: str, tmp_path: Path
) -> None:
    output = run(tmp_path / "here", text_file, resume=True, remote_dir=f"file://{copy}")
    assert "fetched step-00000008" in output
    assert "resumed  after step 8" in output
    assert_same_run(tmp_path / "here", whole)
    assert [folder.name for folder in list_checkpoints(copy)] == ["step-00000008", "step-00000012"]
    assert files_below(copy) == files_below(tmp_path / "here")
    # The copy is a run folder itself, and a complete one is left as it is.
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert "is complete: 12 steps" in run(tmp_path / "here", text_file, resume=True, remote_dir=f"file://{copy}")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_an_object_store_holds_the_same(
    whole: Path, memory: fsspec.AbstractFileSystem, text_file: str, tmp_path: Path
) -> None:
    run_until_killed(tmp_path / "lost", text_file, "memory://bucket/run")
    run(tmp_path / "here", text_file, resume=True, remote_dir="memory://bucket/run")
    assert_same_run(tmp_path / "here", whole)
    names = [name.removeprefix("/bucket/run/") for name in memory.find("/bucket/run")]
    assert {name: memory.cat_file(f"/bucket/run/{name}") for name in names} == files_below(tmp_path / "here")


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (remove_manifest, "step-00000008 in .* was not uploaded completely"),
        (flip_a_byte, "step-00000008 in .* is damaged and not used: optimizer.safetensors has changed"),
        (lose_a_file, "step-00000008 in .* is damaged and not used: model.safetensors is missing"),
    ],
)
def test_a_torn_upload_is_skipped_and_replaced(
    whole: Path, copy: Path, text_file: str, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    damage(copy / "checkpoints" / "step-00000008")
    output = run(tmp_path / "here", text_file, resume=True, remote_dir=f"file://{copy}")
    assert re.search(told, output)
    assert "resumed  after step 4" in output
    assert_same_run(tmp_path / "here", whole)
    assert [verify_checkpoint(folder) for folder in list_checkpoints(copy)] == [[], []]
    assert files_below(copy) == files_below(tmp_path / "here")


def test_a_copy_without_an_intact_checkpoint_is_an_error(copy: Path, text_file: str, tmp_path: Path) -> None:
    for checkpoint in list_checkpoints(copy):
        flip_a_byte(checkpoint)
    before = files_below(copy)
    with pytest.raises(CheckpointError, match=r"none of the 2 complete checkpoints in file://.* is intact"):
        run(tmp_path / "here", text_file, resume=True, remote_dir=f"file://{copy}")
    assert files_below(copy) == before


def test_a_newer_run_folder_is_not_replaced(whole: Path, text_file: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/copy"
    run(tmp_path / "here", text_file, max_steps=8, remote_dir=url)
    # Without the copy, which is then older.
    run(tmp_path / "here", text_file, resume=True, allow_changes=["max_steps"])
    output = run(tmp_path / "here", text_file, resume=True, remote_dir=url)
    assert "fetched" not in output
    copied, kept = files_below(tmp_path / "copy"), files_below(tmp_path / "here")
    assert {name: copied[name] for name in kept} == kept


def test_a_failed_upload_is_one_line_and_tried_again(
    text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, url, broken = LocalFileSystem.put_file, f"file://{tmp_path}/copy", ["step-00000004", "step-00000012"]

    def fail(self: LocalFileSystem, source: str, target: str) -> None:
        if any(name in target for name in broken):
            raise PermissionError("no more space\nin the bucket")
        put(self, source, target)

    monkeypatch.setattr(LocalFileSystem, "put_file", fail)
    with pytest.raises(CheckpointError) as error:
        run(tmp_path / "here", text_file, save_total_limit=3, remote_dir=url)
    complete = f"{tmp_path}/here is complete, but remote_dir '{url}' cannot be written"
    assert str(error.value) == f"{complete} (resume to try it again): no more space"
    assert [folder.name for folder in list_checkpoints(tmp_path / "copy")] == ["step-00000008"]
    broken.clear()
    assert "is complete" in run(tmp_path / "here", text_file, save_total_limit=3, resume=True, remote_dir=url)
    assert files_below(tmp_path / "copy") == files_below(tmp_path / "here")


def test_a_file_system_that_cannot_be_read_begins_nothing(
    copy: Path, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LocalFileSystem, *arguments: Any, **named: Any) -> None:
        raise PermissionError("the token has expired\nand more")

    before = files_below(copy)
    monkeypatch.setattr(LocalFileSystem, "ls", fail)
    with pytest.raises(CheckpointError, match=r"^remote_dir 'file://.*' cannot be read: the token has expired$"):
        run(tmp_path / "here", text_file, resume=True, remote_dir=f"file://{copy}")
    assert not (tmp_path / "here").exists()
    assert files_below(copy) == before


def test_the_copy_of_another_run_is_not_overwritten(copy: Path, text_file: str, tmp_path: Path) -> None:
    url, before = f"file://{copy}", files_below(copy)
    with pytest.raises(UsageError, match=r"remote_dir 'file://.*' already holds a run: use resume, overwrite or"):
        run(tmp_path / "here", text_file, remote_dir=url)
    run(tmp_path / "here", text_file, max_steps=4)
    with pytest.raises(UsageError, match=r"remote_dir 'file://.*' holds another run than output_dir"):
        run(tmp_path / "here", text_file, max_steps=4, resume=True, remote_dir=url)
    assert files_below(copy) == before
    output = run(tmp_path / "here", text_file, max_steps=4, overwrite=True, remote_dir=url)
    assert f"moved the previous run from {url} to {url}.replaced-1" in output
    assert files_below(Path(f"{copy}.replaced-1")) == before
    assert files_below(copy) == files_below(tmp_path / "here")


def test_the_best_checkpoints_of_a_lost_folder_stay(copy: Path, text_file: str, tmp_path: Path) -> None:
    metrics = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    metrics += [{"kind": "eval", "step": 4, "loss": 0.0, "bits_per_byte": 0.0, "tokens": 1}]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    run(tmp_path / "here", text_file, resume=True, keep_best=1, save_total_limit=1, remote_dir=f"file://{copy}")
    assert [folder.name for folder in list_checkpoints(copy)] == ["step-00000004", "step-00000012"]
