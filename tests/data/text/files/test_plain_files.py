"""Archives, tables, encodings and pipes as documents, stored and streamed alike; what is no text is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_chunks import documents_in

from gpt_kit_hf.data.text import sources
from gpt_kit_hf.data.text.files import plain_files
from gpt_kit_hf.data.text.files.file_types import file_refusal
from gpt_kit_hf.data.text.sources import TextSource, source_notes, train_sources
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options import files
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.options.files import find_files

MEMBERS = {
    "b/one.txt": b"first text\n",
    "b/._one.txt": b"\0\5\x16\7\0\2",
    "__MACOSX/b/x.txt": b"metadata",
    ".hidden/y.txt": b"hidden",
    "a/rows.JSONL": b'{"text": "row 1"}\n{"text": "row 2"}\n',
    "a/empty.txt": b"",
    "c.csv": b'id,text\n1,"cell, one"\n2,"two\nlines"\n',
    "d.txt.gz": gzip.compress(b"packed"),
    "LICENSE": b"no suffix",
}
DOCUMENTS = ["first text\n", "row 1", "row 2", "cell, one", "two\nlines", "packed", "no suffix"]
LEFT_OUT = "5 members read, 4 left out (hidden b/._one.txt, __MACOSX/b/x.txt, .hidden/y.txt; empty a/empty.txt)"
ARCHIVES = ["a.tar", "a.tar.gz", "a.tgz", "A.TAR.GZ", "a.tar.zst", "a.tar.bz2", "a.tar.xz", "a.zip"]


def write_archive(file: Path, members: dict[str, bytes]) -> Path:
    """As `tar` and `zip` write it, with owners in the headers of a tar archive."""
    name = file.name.lower()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        return file
    buffer = io.BytesIO()
    mode: Any = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(name.rpartition(".")[2], "w")
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        folder = tarfile.TarInfo("b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for member, data in members.items():
            header = tarfile.TarInfo(member)
            header.size, header.uname = len(data), "somebody"
            tar.addfile(header, io.BytesIO(data))
    data = buffer.getvalue()
    file.write_bytes(pa.Codec("zstd").compress(data, asbytes=True) if name.endswith(".zst") else data)
    return file


def source(*files: Path | str, **options: Any) -> TextSource:
    ((_, found),) = train_sources(TextOptions(text_files=[str(file) for file in files], **options))
    return found


def documents(*files: Path | str, **options: Any) -> list[str]:
    """The documents of files, which are the same stored and streamed."""
    found = source(*files, **options)
    stored, streamed = read(found, streamed=False), read(found, streamed=True)
    assert stored == streamed
    return stored


def read(found: TextSource, *, streamed: bool) -> list[str]:
    shards = found.streamed_shards(True) if streamed else found.shards(True)
    return documents_in(chunk for shard in shards for chunk in shard.chunks())


def refusal(*files: Path | str, **options: Any) -> str:
    """The one line with which files are refused, stored and streamed."""
    messages = []
    for streamed in (False, True):
        with pytest.raises(DataError) as caught:
            read(source(*files, **options), streamed=streamed)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


# --- archives


@pytest.mark.parametrize("name", ARCHIVES)
def test_members_of_an_archive_are_documents_by_their_own_suffix(tmp_path: Path, name: str) -> None:
    file = write_archive(tmp_path / name, MEMBERS)
    assert documents(file) == DOCUMENTS
    assert source(file).notes() == [f"{file}: {LEFT_OUT}"]


def test_an_archive_is_recognised_under_another_name(tmp_path: Path) -> None:
    for name in ("a.tar", "a.zip"):
        write_archive(tmp_path / name, MEMBERS).rename(tmp_path / "corpus.txt")
        assert documents(tmp_path / "corpus.txt") == DOCUMENTS


def test_an_archive_within_an_archive_is_read_to_a_depth(tmp_path: Path) -> None:
    inner = write_archive(tmp_path / "0.zip", {"x.txt": b"deep"})
    for depth in range(1, 4):
        inner = write_archive(tmp_path / f"{depth}.tar.gz", {inner.name: inner.read_bytes()})
        if depth < 3:
            assert documents(inner) == ["deep"]
    assert "3.tar.gz/2.tar.gz/1.tar.gz/0.zip: archives within archives, more than 3 deep" in refusal(inner)


def test_links_in_an_archive_are_left_out_and_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        header = tarfile.TarInfo("x.txt")
        header.size = 4
        tar.addfile(header, io.BytesIO(b"text"))
    assert documents(tmp_path / "a.tar") == ["text"]
    assert source(tmp_path / "a.tar").notes() == [
        f"{tmp_path}/a.tar: 1 member read, 1 left out (no regular file link.txt)"
    ]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.zst", "a.zip"])
def test_a_member_that_is_no_text_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    file = write_archive(tmp_path / name, {"x.txt": b"text", "img/y.png": b"\x89PNG\r\n\x1a\n" + bytes(20)})
    assert refusal(file).startswith(f"{file}/img/y.png: a PNG image")
    file = write_archive(tmp_path / name, {"x.txt": b"text", "y.txt": b"one\ntwo \xff"})
    assert f"{file}/y.txt:2: not UTF-8 text (byte 0xff at offset 8)" in refusal(file)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.zst", "a.tar.bz2", "a.tar.xz", "a.zip"])
def test_a_cut_archive_is_refused_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    """tarfile alone takes an archive that is cut between two members for a whole one."""
    rng = random.Random(name)
    data = write_archive(
        tmp_path / name, {f"{n}.txt": rng.randbytes(400).hex().encode() for n in range(9)}
    ).read_bytes()
    # A tar archive ends with two blocks of zeros, and more that fill a record.
    last = 512 * (1 + 9 * 3) if name == "a.tar" else len(data) - 1
    for length in sorted({700, 1024, 2048, last, *rng.sample(range(600, last), 25)}):
        (tmp_path / name).write_bytes(data[:length])
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: "), length


def test_an_archive_that_unpacks_to_far_more_than_text_does_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_files, "_MOST_UNPACKED", 1 << 16)
    for name in ("a.zip", "a.tar.gz"):
        file = write_archive(tmp_path / name, {"x.txt": b" " * (4 << 20)})
        assert "unpacks to more than 200 times its size" in refusal(file)


def test_an_archive_without_text_is_refused(tmp_path: Path) -> None:
    file = write_archive(tmp_path / "a.zip", {"__MACOSX/x.txt": b"metadata", "e.txt": b""})
    assert "0 members read, 2 left out" in refusal(file)
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    assert "there is no text to train on" in refusal(tmp_path / "none.zip")


def test_a_changed_archive_is_unpacked_again_and_a_damaged_copy_made_again(tmp_path: Path) -> None:
    for text in (b"before", b"after all"):
        assert documents(write_archive(tmp_path / "a.zip", {"x.txt": text})) == [text.decode()]
    ((copy, _),) = source(tmp_path / "a.zip")._plain_files()[0]
    copy.write_bytes(b"cut")
    assert documents(tmp_path / "a.zip") == ["after all"]


# --- tables


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'id,text\n1,"one, ""two"""\n2,\n3,"a\nb"\n', ['one, "two"', "", "a\nb"]),
        ("A.CSV", "text,id\r\nx,1\r\n\r\ny,2\r\n", ["x", "y"]),
        ("a.csv", "id;text\n1;one, two, three\n", ["one, two, three"]),
        ("a.csv", "id\ttext\n1\tone, two\n", ["one, two"]),
        ("a.csv", "id|text\n1|one, two\n", ["one, two"]),
        ("a.csv", "sep=;\nid;text\n1;one, two\n", ["one, two"]),
        ("a.csv", "\ufefftext,id\nx,1\n", ["x"]),
        ("a.tsv", 'id\ttext\n1\t"Hello" he said, then\n2\t"open\n', ['"Hello" he said, then', '"open']),
        ("a.tsv", 'id\ttext\n1\t"a\tb"\n2\tc\n', ["a\tb", "c"]),
        ("a.csv", "text,id\n" + "x" * 200_000 + ",1\n", ["x" * 200_000]),
    ],
)
def test_rows_of_a_table_are_documents(
    tmp_path: Path, name: str, content: str, expected: list[str], packed: str
) -> None:
    data = content.encode()
    (tmp_path / (name + packed)).write_bytes(gzip.compress(data) if packed else data)
    assert documents(tmp_path / (name + packed)) == expected


def test_another_column_is_named_or_taken_if_it_is_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,body\n1,one\n")
    assert documents(tmp_path / "a.csv", text_column="body") == ["one"]
    assert documents(tmp_path / "a.csv", text_column="id") == ["1"]
    assert refusal(tmp_path / "a.csv") == f"{tmp_path}/a.csv: no column 'text' (text_column); its columns: id, body"
    (tmp_path / "b.csv").write_text("body\none\n")
    assert documents(tmp_path / "b.csv") == ["one"]
    assert source(tmp_path / "b.csv").notes() == [f"{tmp_path}/b.csv: its only column, 'body', is the text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,one, two\n", "a.csv:2: a row of 3 cells under 2 columns: a cell that holds a delimiter"),
        ('id,text\n1,"a\nb"\n2\n', "a.csv:4: a row of 1 cell under 2 columns"),
        ('id,text\n1,"never ends\n2,b\n', "a.csv:2: not a row of CSV: unexpected end of data"),
        ("text,text\n1,2\n", "a.csv:1: the column 'text' occurs more than once"),
        ("id,text\n", "a.csv: holds no row below its header"),
        ("id,text\n1,a\0b\n", "a.csv: no text, it holds NUL bytes"),
    ],
)
def test_a_table_that_cannot_be_read_rightly_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert message in refusal(tmp_path / "a.csv")


def test_a_cell_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"a\nb"\n2,caf\xe9\n')
    assert refusal(tmp_path / "a.csv").startswith(f"{tmp_path}/a.csv:4: ")
    assert documents(tmp_path / "a.csv", encoding_of_files="cp1252") == ["a\nb", "café"]


# --- encodings

TEXT = "Grüße, \u201c\u0153uvre\u201d \u20ac5\r\nline two\n"


@pytest.mark.parametrize("codec", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("big", [False, True])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, codec: str, big: bool) -> None:
    data = TEXT.encode(codec)
    if big and codec != "utf-8-sig":
        data = "\ufeff".encode(f"{codec}-be") + TEXT.encode(f"{codec}-be")
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "rows.jsonl").write_bytes('\ufeff{"text": "é"}\n'.encode("utf-16-le"))
    (tmp_path / "t.csv").write_bytes("\ufefftext,id\né,1\n".encode("utf-16-le"))
    files = [tmp_path / name for name in ("a.txt", "b.txt.gz", "rows.jsonl", "t.csv")]
    assert documents(*files) == [TEXT, TEXT, "é", "é"]
    assert documents(*files, encoding_of_files="cp1252") == [TEXT, TEXT, "é", "é"]  # the mark is more certain


@pytest.mark.parametrize("codec", ["cp1252", "utf-16-le", "utf-16-be", "utf_32_be", "mac_roman", "CP1252"])
def test_a_named_encoding_gives_the_text_that_was_encoded(tmp_path: Path, codec: str) -> None:
    (tmp_path / "a.txt").write_bytes((TEXT * 50_000).encode(codec))  # more than a block
    assert "".join(documents(tmp_path / "a.txt", encoding_of_files=codec)) == TEXT * 50_000


def test_text_of_other_scripts_is_read_across_blocks(tmp_path: Path) -> None:
    text = "吾輩は猫である。" * 100_000
    for codec in ("shift_jis", "gb18030", "euc_jp", "utf-16"):
        (tmp_path / "a.txt").write_bytes(text.encode(codec))
        assert "".join(documents(tmp_path / "a.txt", encoding_of_files=codec)) == text


@pytest.mark.parametrize(
    ("data", "guess"),
    [
        ("Grüße aus Köln\n".encode("cp1252"), "it looks like cp1252"),
        ("plain words\n".encode("utf-16-le"), "utf-16-le without a byte-order mark, it seems: give"),
        ("plain words\n".encode("utf-16-be"), "utf-16-be without a byte-order mark, it seems: give"),
        ("Привет, мир".encode("cp1251"), "name its encoding, such as --encoding_of_files cp1251"),
        ("日本語の文章".encode("shift_jis"), "name its encoding, such as"),
    ],
)
def test_text_in_another_encoding_is_refused_with_what_it_looks_like(tmp_path: Path, data: bytes, guess: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    message = refusal(tmp_path / "a.txt")
    assert guess in message
    assert "--encoding_of_files" in message


def test_bytes_that_are_not_of_the_named_encoding_are_refused_with_their_place(tmp_path: Path) -> None:
    data = b"x" * (3 << 20) + b"\x81" + b"y"
    (tmp_path / "a.txt").write_bytes(data)
    message = refusal(tmp_path / "a.txt", encoding_of_files="cp1252")
    assert f"not text in cp1252 at byte {3 << 20:,}; name the right encoding by --encoding_of_files, or" in message
    (tmp_path / "b.txt").write_bytes("\ufeffab".encode("utf-16-le") + b"\x00")
    assert "not text in utf-16 at byte 6; name" in refusal(tmp_path / "b.txt")


def test_a_compressed_file_in_another_encoding_that_is_cut_is_refused(tmp_path: Path) -> None:
    data = gzip.compress(random.Random(1).randbytes(200_000).hex().encode("utf-16"))
    for name in ("a.txt.gz", "a.csv.gz"):
        (tmp_path / name).write_bytes(data[:-200])
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read: ")


@pytest.mark.parametrize("codec", ["utf-8", "cp1252", "utf-16-le"])
def test_bad_bytes_of_any_encoding_are_replaced_or_left_out_if_asked(tmp_path: Path, codec: str) -> None:
    bad = b"\x00\xd8" if codec == "utf-16-le" else b"\x81"  # half a surrogate, and no character
    options: dict[str, Any] = {"encoding_of_files": codec}
    (tmp_path / "a.txt").write_bytes("café ".encode(codec) + bad + " and on".encode(codec))
    (tmp_path / "b.csv").write_bytes("text,n\ngood é,1\nbad ".encode(codec) + bad + ",2\nlast,3\n".encode(codec))
    for name in ("a.txt", "b.csv"):
        assert str(tmp_path / name) in refusal(tmp_path / name, **options)
    files = [tmp_path / "a.txt", tmp_path / "b.csv"]
    replaced = ["café \ufffd and on", "good é", "bad \ufffd", "last"]
    assert documents(*files, on_bad_text="replace", **options) == replaced
    assert documents(*files, on_bad_text="skip", **options) == ["good é", "last"]


@pytest.mark.parametrize("name", ["cp1525", "latin-11", "hex", "rot13", "", "no such\0name"])
def test_an_unknown_encoding_is_refused_before_a_file_is_read(name: str) -> None:
    with pytest.raises(UsageError, match="unknown encoding_of_files"):
        TextOptions(text_files=["a"], encoding_of_files=name)


def test_the_encoding_changes_the_fingerprint_where_it_changes_the_text(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("plain\n")
    (tmp_path / "marked.txt").write_bytes("café\n".encode("latin-1"))

    def keys(name: str, codec: str | None) -> list[str]:
        return [shard.content_key() for shard in source(tmp_path / name, encoding_of_files=codec).shards(True)]

    assert keys("plain.txt", None) == keys("plain.txt", "cp1252")
    assert keys("marked.txt", "latin-1") == keys("marked.txt", "cp1252") != keys("marked.txt", "cp1251")


# --- what is no text


def pickled(protocol: int) -> bytes:
    return pickle.dumps([{"text": "secret"}, 1], protocol)


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "<xml>words</xml>")
    return buffer.getvalue()


def saved_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(9))
    return buffer.getvalue()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.txt", "b.csv", "c.jsonl", "noname"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7\nwords", "a PDF document: convert it to text first, such as by pdftotext"),
        (b"{\\rtf1 words}", "an RTF document"),
        (
            zipped("[Content_Types].xml", "word/document.xml"),
            "a Word document: convert it to text first, such as by pandoc",
        ),
        (zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook: save its table as .csv"),
        (zipped("[Content_Types].xml", "ppt/slides.xml"), "a PowerPoint presentation"),
        (zipped("mimetype", "content.xml"), "an OpenDocument or EPUB document"),
        (zipped("archive/data.pkl"), "a PyTorch checkpoint"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an old Word or Excel document"),
        *((pickled(protocol), "a Python pickle: write its rows as .jsonl") for protocol in (0, 2, 3, 4, 5)),
        (parquet(), "a Parquet file: rename it to .parquet"),
        (gzip.compress(b"words"), "compressed by gzip, which its name does not say: rename it to end in .gz"),
        (saved_array(), "a NumPy array"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a JPEG image"),
        (b"words\0words", "it holds NUL bytes (the first at offset 5)"),
        (bytes(range(1, 32)) * 9, "of its bytes are control characters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_text_is_refused_by_its_content(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert f"{tmp_path / name}: {message}" in refusal(tmp_path / name) or message in refusal(tmp_path / name)
    if not data.startswith(b"\x1f\x8b"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        if not zipfile.is_zipfile(io.BytesIO(data)):
            assert message in refusal(tmp_path / f"{name}.gz")


@pytest.mark.parametrize(
    "text",
    [
        "RIFF and raff",
        "ID3 was an algorithm",
        "ORCs marched, één voor één",
        "OggSome",
        "BZ",
        "PK is Peking",
        "c\nd",
        "V",
        "GIF",
    ],
)
def test_text_that_begins_like_something_else_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert documents(tmp_path / "a.txt") == [text]


def test_terminal_colors_and_overstrikes_are_text(tmp_path: Path) -> None:
    text = "\x1b[31mred\x1b[0m N\bNA\bAM\bME\bE\f\x1a\n" * 5
    (tmp_path / "a.txt").write_text(text)
    assert documents(tmp_path / "a.txt") == [text]


def test_a_nul_byte_far_into_a_file_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"some words\n" * 20_000 + b"a\0b\n" + b"some words\n" * 20_000)
    assert "a.txt:20001: no text (a NUL byte at offset 220001)" in refusal(tmp_path / "a.txt")


# --- folders, pipes and names


def test_a_folder_is_its_files_in_order_without_hidden_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.TXT", ".git/config", ".hidden", "a/.DS_Store", "a/empty.txt"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text("" if "empty" in name else name)
    assert documents(tmp_path / "corpus") == ["a/b/c.TXT", "a/z.txt", "b.txt"]
    note = f"{tmp_path}/corpus: 3 files read, 3 hidden and 1 empty left out"
    assert source_notes(TextOptions(text_files=[f"{tmp_path}/corpus"])) == [note]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("~/corpus/b.txt", "~/corpus/a/*.txt") == ["b.txt", "a/z.txt"]
    assert documents("~/corpus") == ["a/b/c.TXT", "a/z.txt", "b.txt"]
    (tmp_path / "none").mkdir()
    assert "no such file" in refusal(tmp_path / "none")


def fed(pipe: Path, data: bytes) -> threading.Thread:
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    return writer


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"piped text\n", ["piped text\n"]),
        (b'{"text": "row 1"}\n{"text": "row 2"}\n', ["row 1", "row 2"]),
        (gzip.compress(b"packed"), ["packed"]),
        (parquet(), ["a"]),
        (TEXT.encode("utf-16"), [TEXT]),
    ],
    ids=["text", "rows", "gzip", "parquet", "utf-16"],
)
def test_a_pipe_is_read_once_and_its_form_is_told_by_its_content(
    tmp_path: Path, data: bytes, expected: list[str]
) -> None:
    writer = fed(tmp_path / "pipe", data)
    found = source(tmp_path / "pipe")
    assert documents(tmp_path / "pipe") == expected == documents(tmp_path / "pipe")
    writer.join()
    assert str(tmp_path / "pipe") in found.shards(True)[0].name


def test_a_pipe_that_gives_nothing_or_that_several_processes_would_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = fed(tmp_path / "pipe", b"")
    assert "the pipe gave no text; to resume a run, give it the same text again" in refusal(tmp_path / "pipe")
    writer.join()
    os.mkfifo(tmp_path / "other")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a pipe can be read by one process only: save its text to a file"):
        source(tmp_path / "other").shards(True)


def test_the_standard_input_is_named_by_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(DataError, match="'-': the standard input is a terminal: pipe text into the command"):
        find_files(["-"])

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(files, "STANDARD_INPUT", Path(os.devnull))
    with pytest.raises(DataError, match="'-': the standard input is neither a pipe nor a file: pipe text into the "):
        find_files(["-"])


def test_files_read_as_before_have_the_content_keys_that_they_had(tmp_path: Path) -> None:
    """Trained bits and token caches of text, JSON Lines and Parquet do not depend on the detection of other forms."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "row"}))
    keys = [shard.content_key() for name in ("a.txt", "b.jsonl") for shard in source(tmp_path / name).shards(True)]
    direct = [
        shard.content_key()
        for name in ("a.txt", "b.jsonl")
        for shard in sources.file_shards([tmp_path / name], column="text", separator=None, may_cut=True)
    ]
    assert keys == direct


@pytest.mark.parametrize("on_bad_text", ["stop", "skip", "replace"])
@pytest.mark.parametrize(
    "content", [b'[\n{"text": "a"},\n{"text": "b"}\n]\n', b'\xef\xbb\xbf [ {"text": "a"}]', b"[\n"]
)
def test_an_array_of_rows_is_refused_with_what_makes_it_lines(
    tmp_path: Path, content: bytes, on_bad_text: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    options = TextOptions(text_files=[str(tmp_path / "a.json")], on_bad_text=on_bad_text)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a\.json: a JSON array of rows: write one row per line, such as by jq"):
        source_notes(options)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_json_lines_under_another_name_are_said_to_be_trained_as_they_stand(tmp_path: Path, ending: str) -> None:
    def notes(name: str, content: bytes) -> list[str]:
        file = tmp_path / (name + ending)
        file.write_bytes(gzip.compress(content) if ending else content)
        return source_notes(TextOptions(text_files=[str(file)]))

    (note,) = notes("a.txt", b'\n{"text": "a"}\n{"text": "b"}\n{"text"')
    assert note.endswith("its lines are JSON and are trained as they stand: rename it to .jsonl to read their text")
    for name, content in {
        "b.jsonl": b'{"text": "a"}\n{"text": "b"}\n',
        "c.ipynb": b'{"cells": [{"source": ["one"]}]}\n',
        "d.txt": b"{one}\n{two}\n",
        "e.txt": b"1\n2\n3\n",
    }.items():
        assert notes(name, content) == []


def test_a_saved_dataset_given_as_files_is_refused_with_the_option_for_it(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="an Arrow file: name the folder by --dataset_name if save_to_disk wrote it"):
        source_notes(TextOptions(text_files=[str(tmp_path / "saved")]))


def test_a_zip_file_of_a_version_that_is_not_known_is_refused_where_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    directory = file.read_bytes().index(b"PK\x01\x02")
    damaged = bytearray(file.read_bytes())
    damaged[directory + 6] = 148  # the version that is needed to extract it
    file.write_bytes(damaged)
    with pytest.raises(NotImplementedError), zipfile.ZipFile(file):
        pass
    assert file_refusal(file) is None
    ((_, source),) = train_sources(TextOptions(text_files=[str(file)]))
    with pytest.raises(DataError, match=r"a\.zip: cannot be read .*: zip file version 14\.8"):
        source.shards(False)
