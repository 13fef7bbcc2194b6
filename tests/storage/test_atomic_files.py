"""JSON, JSONL and tensors: exact to the bit, whole after a kill, refused when torn, hostile or too large."""

from __future__ import annotations

import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from children import KILLED, die, in_child

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage import atomic_files
from gpt_kit_hf.storage.atomic_files import (
    append_jsonl,
    cut_jsonl,
    load_json,
    load_tensors,
    read_jsonl,
    replace_file,
    save_json,
    save_tensors,
)


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
    monkeypatch.setattr(safetensors.torch, "load_file", lambda *_, **__: pytest.fail("the bomb was read"))
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
    monkeypatch.setattr(atomic_files, "_MAX_JSON_BYTES", 100)
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
