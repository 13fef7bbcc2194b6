"""Checkpoints against real kills, real write errors and altered bytes; resume against the uninterrupted run."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpt_kit_hf import checkpointing
from gpt_kit_hf.checkpointing import (
    RunLock,
    append_jsonl,
    cut_jsonl,
    flatten_optimizer_state,
    latest_checkpoint,
    list_checkpoints,
    load_json,
    load_tensors,
    move_aside,
    read_jsonl,
    replace_file,
    restore_optimizer_state,
    save_checkpoint,
    save_json,
    save_tensors,
    verify_checkpoint,
)
from gpt_kit_hf.errors import CheckpointError, UsageError

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
        steps = [checkpointing.checkpoint_step(path) for path in list_checkpoints(run)]
        seen.add(tuple(steps))
        newest = latest_checkpoint(run, report=no_report)
        assert newest is not None
        assert checkpointing.checkpoint_step(newest) == steps[-1] >= 2
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
    assert names(tmp_path) == [".stage-step-00000002", "step-00000001"]
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
    barrier = lambda: calls.append("barrier")  # noqa: E731
    save_checkpoint(tmp_path, 10, with_other_content, keep_last=1, barrier=barrier, report=no_report)
    assert calls == ["barrier"]
    assert (folder / "config.json").is_file()

    (folder / "config.json").write_text('{"n_layer": 3}')
    save_checkpoint(tmp_path, 10, with_other_content, keep_last=1, report=calls.append)
    assert (folder / "other").is_file()
    assert "config.json has changed" in calls[1]
    assert names(tmp_path) == ["damaged-step-00000010-1", "step-00000010"]


def test_the_barrier_stands_between_manifest_and_name(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"

    def barrier() -> None:
        assert (checkpoints / ".stage-step-00000001" / "manifest.json").is_file()
        assert list_checkpoints(tmp_path) == []
        raise RuntimeError("another process failed")

    with pytest.raises(RuntimeError, match="another process failed"):
        save_checkpoint(tmp_path, 1, fill, keep_last=1, barrier=barrier)
    assert names(tmp_path) == []


def test_a_failed_write_keeps_the_old_one_and_frees_the_others(tmp_path: Path) -> None:
    save(tmp_path, 1)
    calls: list[str] = []

    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 2 was not saved: .*No space left") as caught:
        save_checkpoint(tmp_path, 2, full, keep_last=1, barrier=lambda: calls.append("barrier"))
    assert "\n" not in str(caught.value)
    assert calls == ["barrier"]
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


# --- single files ---------------------------------------------------------------------------------------------


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors = {
        "base": base,
        "row": base[2],
        "transposed": base.T,
        "same": base,
        "half": base.to(torch.bfloat16),
        "step": torch.tensor(7.0, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.tensor([float("nan"), -0.0])),
        "count": torch.tensor([2**62, -1]),
    }
    path = tmp_path / "t.safetensors"
    save_tensors(path, tensors)
    loaded = load_tensors(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        wanted = tensor.detach().contiguous().flatten().view(torch.uint8)
        assert torch.equal(loaded[name].flatten().view(torch.uint8), wanted)


@pytest.mark.parametrize("bad", [torch.zeros(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"])
def test_tensors_without_bytes_are_refused(tmp_path: Path, bad: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="w is not a plain dense tensor"):
        save_tensors(tmp_path / "t", {"w": bad})


def test_a_header_bomb_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.safetensors"
    monkeypatch.setattr(checkpointing, "load_file", no_report)
    for claim, size in ((1 << 62, 100), (90_000_000, 1 << 30), (93, 100)):
        path.write_bytes(struct.pack("<Q", claim) + b"{" * 92)
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=f"header claims {claim:,} bytes, the file has {size:,}"):
            load_tensors(path)


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_tensors(path, {"w": torch.ones(100)})
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole + b"x", pickle.dumps({"w": 1}), struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            load_tensors(path)
    with pytest.raises(CheckpointError, match="No such file"):
        load_tensors(tmp_path / "missing")


def test_json_floats_are_exact(tmp_path: Path) -> None:
    draw = random.Random(0)
    bits = [struct.unpack("<d", draw.randbytes(8))[0] for _ in range(2000)]
    floats = [value for value in bits if value == value and abs(value) != float("inf")]
    floats += [0.1, -0.0, 5e-324, 1.7976931348623157e308]
    save_json(tmp_path / "s.json", {"floats": floats, "big": 2**80, "none": None, "text": "é\u2028"})
    loaded = load_json(tmp_path / "s.json")
    assert struct.pack(f"{len(floats)}d", *loaded["floats"]) == struct.pack(f"{len(floats)}d", *floats)
    assert (loaded["big"], loaded["none"], loaded["text"]) == (2**80, None, "é\u2028")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2), {1: 2}, {1}, torch.zeros(1)], ids=str)
def test_json_that_would_change_is_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError):
        save_json(tmp_path / "s.json", {"value": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b"[1]",
        b"3",
        b"",
        b'{"a": "\xff"}',
        b"[" * 200_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=range(10),
)
def test_json_that_is_not_strict_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"s\.json"):
        load_json(tmp_path / "s.json")


def test_json_has_a_size_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "_MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than the 100 allowed"):
        save_json(tmp_path / "s.json", {"a": "x" * 100})
    (tmp_path / "s.json").write_text('{"a": "' + "x" * 92 + '"}')
    with pytest.raises(CheckpointError, match="larger than the 100 bytes"):
        load_json(tmp_path / "s.json")


def test_a_replaced_file_is_never_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    replace_file(path, "one")
    monkeypatch.setattr(os, "fsync", lambda descriptor: die())
    assert in_child(lambda: replace_file(path, b"two")) == KILLED
    monkeypatch.undo()
    assert path.read_text() == "one"
    replace_file(path, "thré")
    assert path.read_bytes() == "thré".encode()
    with pytest.raises(CheckpointError, match="No such file"):
        replace_file(tmp_path / "missing" / "a.txt", "x")


def test_jsonl_survives_a_torn_line_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 1 / (step + 3), "note": "é"} for step in range(4)]
    for record in records:
        append_jsonl(path, record)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        reports: list[str] = []
        # The closing brace makes the last object whole, with its line end or without.
        expected = 4 if end >= len(whole) - 1 else 3
        assert read_jsonl(path, report=reports.append) == records[:expected]
        assert len(reports) == (1 if start < end < len(whole) - 1 else 0)
        assert cut_jsonl(path, lambda record: record["step"] < 2, report=reports.append) == expected - 2
        append_jsonl(path, records[2])
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])


def test_jsonl_torn_elsewhere_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    for attempt in (lambda: read_jsonl(path), lambda: cut_jsonl(path, lambda record: False)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not valid JSON"):
            attempt()
    with pytest.raises(CheckpointError, match="no line was added"):
        append_jsonl(path, {"loss": float("nan")})
    assert path.read_text() == '{"step": 1}\n{"step"\n{"step": 3}\n'
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_jsonl(tmp_path / "missing")


# --- optimizer state ------------------------------------------------------------------------------------------


class WideMomentum(torch.optim.Optimizer):
    """An optimizer that is not torch's: float32 state for a weight of any dtype, and a plain number."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("buffer", torch.zeros(p.shape, dtype=torch.float32))
                state["count"] = state.get("count", 0) + 1
                buffer.mul_(0.9).add_(p.grad.float())
                p.sub_((group["lr"] / state["count"] * buffer).to(p.dtype))


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    parameters = dict(model.named_parameters())
    matrices = [p for p in parameters.values() if p.ndim == 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(groups_of(m), lr=1e-2, betas=(0.9, 0.95)),
    "AdamW fused": lambda m: torch.optim.AdamW(groups_of(m), lr=1e-2, fused=True),
    "AdamW amsgrad": lambda m: torch.optim.AdamW(groups_of(m), lr=1e-2, amsgrad=True, foreach=True),
    "AdamW lr tensor": lambda m: torch.optim.AdamW(groups_of(m), lr=torch.tensor(1e-2), fused=True),
    "SGD momentum": lambda m: torch.optim.SGD(groups_of(m), lr=1e-1, momentum=0.9, nesterov=True),
    "SGD plain": lambda m: torch.optim.SGD(groups_of(m), lr=1e-1),
    "Adagrad": lambda m: torch.optim.Adagrad(groups_of(m), lr=1e-1),
    "wide": lambda m: WideMomentum(groups_of(m.to(torch.bfloat16)), lr=1e-1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda m: torch.optim.Muon(groups_of(m)[0]["params"], lr=1e-2)


def make_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            lr = 1e-2 * (1 + step)
            group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def names_of(model: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_optimizer_continues_to_the_bit(tmp_path: Path, kind: str) -> None:
    oracle = make_model()
    train(oracle, straight := OPTIMIZERS[kind](oracle), range(10))

    first = make_model()
    train(first, optimizer := OPTIMIZERS[kind](first), range(5))
    tensors, state = flatten_optimizer_state(optimizer, names_of(first))
    save_tensors(tmp_path / "optimizer.safetensors", tensors)
    save_json(tmp_path / "optimizer.json", state)

    second = make_model()
    resumed = OPTIMIZERS[kind](second)
    second.load_state_dict(first.state_dict())
    stored = load_tensors(tmp_path / "optimizer.safetensors")
    restore_optimizer_state(resumed, stored, load_json(tmp_path / "optimizer.json"), names_of(second))
    assert repr(resumed.state_dict()) == repr(optimizer.state_dict())
    train(first, optimizer, range(5, 7))  # shares no memory with the resumed one
    train(second, resumed, range(5, 10))
    for name, value in oracle.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    ours, theirs = (flatten_optimizer_state(o, names_of(m)) for o, m in ((resumed, second), (straight, oracle)))
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, value in theirs[0].items():
        assert ours[0][name].dtype == value.dtype
        assert torch.equal(ours[0][name], value), name


def test_state_follows_the_name_and_not_the_position() -> None:
    model, other = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    tensors, state = flatten_optimizer_state(optimizer, names_of(model))
    assert {"exp_avg.0.weight", "exp_avg_sq.2.bias", "step.0.bias"} < set(tensors)
    reversed_order = torch.optim.AdamW(list(other.parameters())[::-1], lr=1.0)
    restore_optimizer_state(reversed_order, tensors, state, names_of(other))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], reversed_order.state[q]["exp_avg"])
    assert reversed_order.param_groups[0]["lr"] == 3e-2
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    train(other, reversed_order, range(3, 5))
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items()), "memory is shared"


def test_a_parameter_that_was_never_stepped_stays_so() -> None:
    model, other = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model[0].requires_grad_(False)  # type: ignore[index]
    train(model, optimizer, range(2))
    tensors, state = flatten_optimizer_state(optimizer, names_of(model))
    assert len(optimizer.state) == 2
    fresh = torch.optim.AdamW(other.parameters(), fused=False)
    restore_optimizer_state(fresh, tensors, state, names_of(other))
    assert len(fresh.state) == 2
    assert fresh.param_groups[0]["fused"] is False


def trained() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, Any]]:
    model = make_model()
    optimizer = OPTIMIZERS["AdamW"](model)
    train(model, optimizer, range(2))
    tensors, state = flatten_optimizer_state(optimizer, names_of(model))
    return model, dict(tensors), json.loads(json.dumps(state))


TAMPERS: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], object], str]] = {
    "tensor gone": (lambda t, s: t.pop("exp_avg.0.weight"), r"exp_avg\.0\.weight is missing"),
    "tensor added": (lambda t, s: t.update(x=torch.ones(1)), "x belongs to no parameter"),
    "tensor shape": (lambda t, s: t.update({"exp_avg.0.bias": torch.ones(6)}), "recorded dtype and shape"),
    "tensor dtype": (lambda t, s: t.update({"exp_avg.0.bias": torch.ones(7).half()}), "recorded dtype"),
    "state gone": (lambda t, s: s["parameters"].pop("0.bias"), "not those of its parameter groups"),
    "shape": (lambda t, s: s["parameters"]["0.bias"].update(shape=[8]), r"0\.bias has shape \[7\]"),
    "name": (lambda t, s: s["groups"][1].update(parameters=["0.bias"]), r"2\.bias is only in the optimizer"),
    "group": (lambda t, s: s["groups"].pop(), "has 2 parameter groups, the checkpoint 1"),
    "option": (lambda t, s: s["groups"][0]["options"].pop("lr"), "option 'lr' is missing"),
    "text": (lambda t, s: s["groups"][0]["options"].update(lr="1"), "'lr' is '1', must be a number"),
    "betas": (lambda t, s: s["groups"][0]["options"].update(betas=0.9), "malformed"),
    "entry": (lambda t, s: s["parameters"]["0.bias"]["state"].update(x=[1]), "is a list, not stored"),
    "empty": (lambda t, s: s.clear(), "malformed"),
}


@pytest.mark.parametrize("tamper", TAMPERS)
def test_incomplete_optimizer_state_is_refused_and_changes_nothing(tamper: str) -> None:
    _, tensors, state = trained()
    alter, message = TAMPERS[tamper]
    alter(tensors, state)
    model = make_model()
    optimizer = OPTIMIZERS["AdamW"](model)
    before = repr(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        restore_optimizer_state(optimizer, tensors, state, names_of(model))
    assert repr(optimizer.state_dict()) == before


def test_what_has_no_name_or_no_form_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"shape \(7, 5\) in the optimizer has no name"):
        flatten_optimizer_state(optimizer, {})
    with pytest.raises(UsageError, match="the same name"):
        flatten_optimizer_state(optimizer, dict.fromkeys(model.parameters(), "w"))
    lbfgs = torch.optim.LBFGS(model.parameters())
    lbfgs.state[lbfgs.param_groups[0]["params"][0]]["old_dirs"] = [torch.ones(3)]
    with pytest.raises(CheckpointError, match="not stored here"):
        flatten_optimizer_state(lbfgs, names_of(model))


# --- lock and moving aside ------------------------------------------------------------------------------------


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
    # Dead, but a zombie still, as a child of a launcher that has not looked yet.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == pid
    hold(tmp_path)
    os.waitpid(pid, 0)
    assert in_child(lock_and_die) == KILLED
    hold(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_recycled_number_is_not_taken_for_the_owner(tmp_path: Path) -> None:
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
def test_a_lock_that_cannot_be_judged_stays(tmp_path: Path, content: str, message: str) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        hold(tmp_path)
    assert f"remove {lock}" in str(caught.value) or "remove it" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert lock.read_text() == content


def test_a_forked_child_and_a_robbed_owner_release_nothing(tmp_path: Path) -> None:
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
    judge = checkpointing._refuse_if_held

    def rival() -> None:
        monkeypatch.undo()
        with RunLock(tmp_path):
            os._exit(7)

    def judge_slowly(path: Path, data: bytes) -> None:
        """Give a rival all chances between this process's look at the dead owner and its own takeover."""
        children.append(start_child(rival))
        for _ in range(30):
            time.sleep(0.01)
            if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOWAIT | os.WNOHANG):
                break
        judge(path, data)

    monkeypatch.setattr(checkpointing, "_refuse_if_held", judge_slowly)
    with RunLock(tmp_path):
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


def test_a_run_is_moved_aside_whole_unless_in_use(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="is not a folder"):
        move_aside(run)
    for number in (1, 2):
        save(run, number)
        assert move_aside(run) == tmp_path / f"run.replaced-{number}"
        assert not run.exists()
        assert names(tmp_path / f"run.replaced-{number}") == [f"step-0000000{number}"]
        assert not (tmp_path / f"run.replaced-{number}" / "run.lock").exists()
    with RunLock(run), pytest.raises(CheckpointError, match="in use"):
        move_aside(run)
    assert run.is_dir()
