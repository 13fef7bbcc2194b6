"""The header of a GGUF file: read as the package gguf reads it, and refused where it is no whole file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.storage.gguf_header import is_gguf, read_gguf_header

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'gpt-kit-hf[gguf]'")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gguf_models import write_tiny_gguf

    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "tiny")
    write_tiny_gguf(folder / "tiny", folder / "tiny.gguf", chat_template="{{ 'é' }}")
    return folder / "tiny.gguf"


def test_it_is_what_the_package_gguf_reads(file: Path) -> None:
    header, reader = read_gguf_header(file), gguf.GGUFReader(file)
    expected = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == expected
    assert (header.architecture, header.context_length, header.precision) == ("gpt2", 64, "F32")
    found = {name: (each.shape, each.type) for name, each in header.tensors.items()}
    assert found == {each.name: (tuple(each.shape.tolist()), int(each.tensor_type)) for each in reader.tensors}


def test_it_is_known_by_its_name_or_its_content(file: Path, tmp_path: Path) -> None:
    (tmp_path / "renamed.bin").write_bytes(file.read_bytes())
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "other.txt").write_bytes(b"text")
    assert [is_gguf(tmp_path / name) for name in ("renamed.bin", "empty.gguf", "other.txt", "none.gguf")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert not is_gguf(tmp_path)


def test_a_file_that_ends_anywhere_early_is_refused(file: Path, tmp_path: Path) -> None:
    content, cut = file.read_bytes(), tmp_path / "cut.gguf"
    ends = [0, 3, 4, 7, 8, 23, *random.Random(0).sample(range(24, len(content)), 40), len(content) - 1]
    for end in ends:
        cut.write_bytes(content[:end])
        with pytest.raises(UsageError, match=r"is not complete|is no GGUF file"):
            read_gguf_header(cut)


def test_a_damaged_header_is_refused_or_read_but_ends_in_no_other_error(file: Path, tmp_path: Path) -> None:
    content, damaged, draws = file.read_bytes(), tmp_path / "damaged.gguf", random.Random(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        changed[draws.randrange(4, 9000)] = draws.randrange(256)
        damaged.write_bytes(changed)
        try:
            read_gguf_header(damaged)
        except UsageError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"GGML" + c[4:], "it begins with b'GGML'"),
        (lambda c: c[:4] + b"\x09\0\0\0" + c[8:], "GGUF version 9; known: 2, 3"),
        (lambda c: c.replace(b"general.architecture", b"general.architectura"), "has no general.architecture"),
        (lambda c: c.replace(b"gpt2.context_length", b"gpt2.context_lengte"), "has no gpt2.context_length"),
    ],
)
def test_another_file_is_refused_by_name(file: Path, tmp_path: Path, change: object, message: str) -> None:
    assert callable(change)
    other = tmp_path / "other.gguf"
    other.write_bytes(change(file.read_bytes()))
    with pytest.raises(UsageError, match=message):
        read_gguf_header(other)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_gguf_header(tmp_path / "none.gguf")
