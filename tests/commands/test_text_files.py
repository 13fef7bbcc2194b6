"""Files of every kind, good, damaged and under wrong names, through train, evaluate and inspect.

Each file comes with the documents that it holds, None if it must be refused: no command ends in a traceback, and train
and evaluate read exactly these documents or refuse the file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import gpt_kit

from gpt_kit_hf import GPTModel, create_model_config
from gpt_kit_hf.commands import train as train_command
from gpt_kit_hf.data.text.corpus import prepare_text
from gpt_kit_hf.data.text.files import plain_files
from gpt_kit_hf.evaluation import score
from gpt_kit_hf.hub.model_folder import write_model_folder
from gpt_kit_hf.options.run import RunOptions
from gpt_kit_hf.tokenization.encodings import get_encoding

FILES = 500
FAST = 60
WORDS = ["the", "cat", "naïve", "北京", "it's", "x=y;", "a,b", 'say "hi"', "tab\there", "ÄÖ", "€5", "12345", "{", "#"]
LATIN = ["the", "cat", "naïve", "it's", "café", "Straße", "señor", "1234", "ÄÖ"]
SUFFIXES = [
    "",
    ".txt",
    ".md",
    ".csv",
    ".tsv",
    ".jsonl",
    ".json",
    ".parquet",
    ".tar",
    ".zip",
    ".gz",
    ".zst",
    ".PDF",
    ".tgz",
]
HEADS = [
    *(
        b"%PDF-1.4\n",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xd8\xff\xe0\0\x10JFIF",
        b"GIF89a\1\0\1\0",
        b"\x7fELF\2\1\1\0",
    ),
    *(
        b"SQLite format 3\0",
        b"Rar!\x1a\x07\x01\0",
        b"7z\xbc\xaf\x27\x1c\0\4",
        b"\x93NUMPY\1\0v\0",
        b"OggS\0\2",
        b"Obj\1\4",
    ),
]


class Case(NamedTuple):
    """A file, and the documents it holds: None if it must be refused; `may_refuse` if it may be."""

    name: str
    data: bytes
    documents: list[str] | None
    may_refuse: bool = False
    options: tuple[str, ...] = ()


def words(rng: random.Random, most: int = 60, of: list[str] = WORDS) -> str:
    return " ".join(rng.choices(of, k=rng.randint(4, most))) + rng.choice(["", "\n", "\r\n"])


# --- kinds of files


def plain(rng: random.Random) -> Case:
    text = words(rng)
    return Case(f"a{rng.choice(['', '.txt', '.md', '.py', '.TXT', '.log'])}", text.encode(), [text])


def random_bytes(rng: random.Random) -> Case:
    data = rng.randbytes(rng.choice([1, 2, 7, 40, 300, 4000]))
    try:
        text = data.decode()
        found = None if "\0" in text else [text] * bool(text.strip())
    except UnicodeDecodeError:
        found = None
    return Case(f"a{rng.choice(SUFFIXES)}", data, found, may_refuse=True)


def binary_head(rng: random.Random) -> Case:
    kinds: list[Callable[[], bytes]] = [
        lambda: rng.choice(HEADS) + rng.randbytes(rng.randint(0, 300)),
        lambda: rng.choice(HEADS) + words(rng).encode(),
        lambda: pickle.dumps({"text": words(rng)}, rng.randint(0, 5)),
        lambda: words(rng).encode() + b"\0" + words(rng).encode(),
        lambda: bytes(rng.choice(b"\1\2\3\4\5\6\x0e\x0f\x10 abc") for _ in range(rng.randint(30, 300))),
        lambda: bz2.compress(words(rng).encode()),
    ]
    suffix = rng.choice(["", ".txt", ".md", ".csv", ".jsonl", ".tsv", ".docx"])
    return Case(f"a{suffix}", rng.choice(kinds)(), None)


def office(rng: random.Random) -> Case:
    members = {"word/document.xml": b"<w/>", "xl/workbook.xml": b"<x/>", "ppt/slide.xml": b"<p/>"}
    name = rng.choice(list(members))
    data = zipped({"[Content_Types].xml": b"<types/>", name: members[name]})
    return Case(f"a{rng.choice(['.docx', '.zip', '.txt', ''])}", data, None)


def encoded(rng: random.Random) -> Case:
    codec = rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "latin-1", "utf-16-le", "utf-16-be"])
    text = words(rng, of=LATIN).replace("\r\n", "\n")
    named, marked = rng.random() < 0.5, codec in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    data = text.encode(codec)
    if named or marked or (data.isascii() and b"\0" not in data):
        options = ("--encoding_of_files", codec) if named else ()
        return Case("a.txt", data, [text], options=options)
    return Case("a.txt", data, None)


def mixed_encodings(rng: random.Random) -> Case:
    data = words(rng).encode() + "é".encode("latin-1") + words(rng).encode()
    return Case("a.txt", data, None)


def dialect(rng: random.Random) -> Case:
    suffix = rng.choice([".csv", ".CSV", ".tsv"])
    delimiter = "\t" if suffix == ".tsv" else rng.choice(",;\t|")
    columns = ["id", "text", "a b"][: rng.randint(2, 3)]
    rng.shuffle(columns)
    if "text" not in columns:
        columns[0] = "text"
    cells = [words(rng, 9).strip() + rng.choice(["", "\nnext line", delimiter, '"']) for _ in range(rng.randint(1, 6))]
    out = io.StringIO()
    writer = csv.writer(
        out,
        delimiter=delimiter,
        lineterminator=rng.choice(["\n", "\r\n"]),
        quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    )
    writer.writerow(columns)
    for number, cell in enumerate(cells):
        writer.writerow([cell if column == "text" else f"{number}" for column in columns])
    codec = rng.choice(["utf-8", "utf-8-sig", "utf-16"])
    data, packed = out.getvalue().encode(codec), rng.random() < 0.2
    return Case(f"a{suffix}{'.gz' * packed}", gzip.compress(data) if packed else data, cells)


def broken_table(rng: random.Random) -> Case:
    kinds = [
        "id,text\n1,one, two\n",
        "id,text\n1\n2,b\n",
        'id,text\n1,"open\n2,b\n',
        "a,b\n1,2\n",
        "text,text\n1,2\n",
        "id,text\n",
        "\n\n",
        "id,text\n1,a\0b\n",
    ]
    content = rng.choice(kinds)
    return Case("a.csv", content.encode(), None)


def rows(rng: random.Random) -> Case:
    texts = [words(rng, 9) for _ in range(rng.randint(1, 5))]
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=rng.random() < 0.5) for text in texts]
    if rng.random() < 0.4:
        bad = rng.choice(['{"text": 7}', '{"body": "x"}', "[1]", '"x"', "{", "nothing", '{"text": null}', "[" * 5000])
        return Case("a.jsonl", "\n".join([*lines, bad]).encode(), None)
    data = rng.choice(["\n", "\r\n", "\n\n"]).join(lines).encode()
    if rng.random() < 0.3:
        table = io.BytesIO()
        pq.write_table(pa.table({"text": texts}), table)
        named = rng.random() < 0.5
        return Case("a.parquet" if named else "a.txt", table.getvalue(), texts if named else None)
    return Case(f"a{rng.choice(['.jsonl', '.ndjson', '.JSONL', '.json'])}", data, texts)


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(members: dict[str, bytes], mode: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size, header.uname, header.gname = len(data), "owner", "group"
            archive.addfile(header, io.BytesIO(data))
    return out.getvalue()


def packed(rng: random.Random, members: dict[str, bytes]) -> tuple[str, bytes]:
    kind = rng.choice([".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".TAR"])
    if kind == ".zip":
        return kind, zipped(members)
    mode = {".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}.get(kind, "w")
    data = tarred(members, mode)
    return kind, pa.Codec("zstd").compress(data, asbytes=True) if kind == ".tar.zst" else data


GOOD = [plain, dialect, rows]


def members_of(rng: random.Random, depth: int = 0) -> tuple[dict[str, bytes], list[str]]:
    """Members of an archive and the documents in them; deep folders, empty and hidden members, archives inside."""
    members: dict[str, bytes] = {}
    documents: list[str] = []
    for number in range(rng.randint(1, 5)):
        place = "/".join(["d" * rng.randint(1, 9) for _ in range(rng.choice([0, 1, 2, 30]))])
        prefix = f"{place}/{number}" if place else f"{number}"
        chance = rng.random()
        if chance < 0.1:
            members[f"{prefix}.txt"] = b""
        elif chance < 0.25:
            members[rng.choice([f"__MACOSX/{prefix}.txt", f".git/{prefix}", f"{place or 'x'}/._x.txt"])] = (
                b"\0\5\x16\7"
            )
        elif chance < 0.4 and depth < 2:
            inside, found = members_of(rng, depth + 1)
            if found:
                kind, data = packed(rng, inside)
                members[f"{prefix}{kind}"] = data
                documents += found
        else:
            case = rng.choice(GOOD)(rng)
            if case.documents is not None and not case.options:
                members[f"{prefix}{case.name}"] = case.data
                documents += case.documents
    return members, documents


def archive(rng: random.Random) -> Case:
    members, documents = members_of(rng)
    kind, data = packed(rng, members)
    if rng.random() < 0.15 and kind not in (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"):
        kind = rng.choice([".txt", "", ".csv"])  # an archive is recognised
    return Case(f"a{kind}", data, documents or None)


def archive_of_binaries(rng: random.Random) -> Case:
    members, _ = members_of(rng)
    bad = rng.choice([binary_head, office])(rng)
    if not bad.data.startswith(b"BZh"):
        members[f"z{bad.name}"] = bad.data
    else:
        members["z.png"] = HEADS[1]
    kind, data = packed(rng, members)
    return Case(f"a{kind}", data, None)


def cut(rng: random.Random) -> Case:
    """An archive or compressed file that ends early."""
    if rng.random() < 0.6:
        members, _ = members_of(rng)
        members["last.txt"] = rng.randbytes(300).hex().encode()
        kind, data = packed(rng, members)
        # After the last member a tar archive has two blocks of zeros, of which one is enough, and padding.
        end = len(data.rstrip(b"\0")) if kind in (".tar", ".TAR") else len(data) - 1
    else:
        kind = rng.choice([".txt.gz", ".jsonl.gz", ".csv.gz", ".gz"])
        data = gzip.compress(json.dumps({"text": rng.randbytes(300).hex()}).encode())
        end = len(data) - 1
    return Case(f"a{kind}", data[: rng.randint(1, end)], None)


def flipped(rng: random.Random) -> Case:
    """An archive with checksums, one byte of which is another: what is read is right, or nothing is."""
    members = {f"{number}.txt": words(rng).encode() for number in range(3)}
    documents = [data.decode() for data in members.values()]
    data = bytearray(zipped(members) if rng.random() < 0.5 else gzip.compress(tarred(members, "w")))
    name = "a.zip" if data.startswith(b"PK") else "a.tar.gz"
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return Case(name, bytes(data), documents, may_refuse=True)


def bomb(rng: random.Random) -> Case:
    data = rng.choice([b" ", b"a", b"a \n"]) * (3 << 20)
    kind, packed_data = packed(rng, {"x.txt": data})
    return Case(f"a{kind}", packed_data, None) if kind not in (".tar", ".TAR") else plain(rng)


def empty(rng: random.Random) -> Case:
    kinds: list[tuple[str, bytes]] = [
        ("a.txt", b""),
        ("a.txt", b" \n\t"),
        ("a.txt.gz", gzip.compress(b"")),
        ("a.zip", zipped({})),
        ("a.tar", tarred({"x.txt": b""}, "w")),
        ("a.jsonl", b"\n\n"),
        ("a.parquet", b""),
        ("a.csv", b""),
    ]
    name, data = rng.choice(kinds)
    return Case(name, data, None)


KINDS = [
    *(plain, random_bytes, random_bytes, binary_head, binary_head, office, encoded, encoded, mixed_encodings, dialect),
    *(dialect, broken_table, rows, archive, archive, archive, archive_of_binaries, cut, cut, flipped, bomb, empty),
]


# --- the commands


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model, with one token per byte."""
    folder = tmp_path_factory.mktemp("model")
    encoding = get_encoding("bytes")
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "max_position_embeddings": 64, "vocab_size": encoding.n_vocab}
    network = GPTModel(create_model_config("nano-xs", **sizes))
    write_model_folder(folder, network, encoding, network.state_dict())
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The documents that train and evaluate read, from the ids; train stops before its first step."""
    found: list[list[str]] = []
    prepared = prepare_text

    def noted(text: Any, encoding: Any) -> Any:
        stream, *others = prepared(text, encoding)
        ids = stream.read(0, len(stream)).tolist()
        bounds = [*stream.document_starts.tolist(), len(ids)]
        documents = [ids[begin:end] for begin, end in pairwise(bounds)]
        assert all(document[-1] == 256 for document in documents)
        found.append([bytes(document[:-1]).decode() for document in documents])
        return stream, *others

    def encode(options: RunOptions, *, stream: Any) -> None:
        noted(options.text, get_encoding("bytes"))

    monkeypatch.setattr(train_command, "run_pretraining", encode)
    monkeypatch.setattr(score, "prepare_text", noted)
    monkeypatch.setattr(plain_files, "_MOST_UNPACKED", 1 << 20)
    return found


def check(folder: Path, case: Case, model: Path, read: list[list[str]]) -> None:
    """Run the commands on a file and compare what they read with what it holds."""
    file = folder / case.name
    file.write_bytes(case.data)
    commands = [
        ["train", "--output_dir", folder / "run", "--text_files", file, *case.options],
        ["evaluate", model, file, "--kind", "text", "--max_tokens", 64, *case.options],
        ["inspect", file],
    ]
    for command in commands:
        read.clear()
        ended = gpt_kit(*command)
        where = f"{command[0]} {case.name} {case.data[:200]!r}: {ended.stderr}"
        assert ended.exit_code in (0, 2), where
        if ended.exit_code:
            assert ended.stderr.startswith("error: "), where
            assert ended.stderr.count("\n") == 1, where
        if command[0] == "inspect":
            continue
        if case.documents is None:
            assert ended.exit_code == 2, f"{where} read {read}"
            assert not read, where
        elif not (case.may_refuse and ended.exit_code):
            assert ended.exit_code == 0, where
            assert read == [case.documents], where


def cases(first: int, last: int) -> list[Case]:
    return [KINDS[seed % len(KINDS)](random.Random(seed)) for seed in range(first, last)]


def test_files_are_read_rightly_or_refused(tmp_path: Path, model: Path, read: list[list[str]]) -> None:
    for number, case in enumerate(cases(0, FAST)):
        (tmp_path / str(number)).mkdir()
        check(tmp_path / str(number), case, model, read)


@pytest.mark.slow
def test_many_files_are_read_rightly_or_refused(tmp_path: Path, model: Path, read: list[list[str]]) -> None:
    for number, case in enumerate(cases(FAST, FILES)):
        (tmp_path / str(number)).mkdir()
        check(tmp_path / str(number), case, model, read)


# --- the program itself


def program(*arguments: object, given: bytes | None = None) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main", *map(str, arguments)]
    ended = subprocess.run(command, input=given, capture_output=True, timeout=300, check=False)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


SMALL = ["--model", "nano-xs", "--max_length", 16, "--batch_size", 2, "--encoding", "bytes", "--use_cpu", "true"]


@pytest.mark.slow
def test_text_is_piped_into_the_program_and_a_run_resumes_only_with_the_same(tmp_path: Path) -> None:
    text = "\n".join(f"line {number} of the text" for number in range(200)).encode()
    run = ["train", "--output_dir", tmp_path / "run", *SMALL, "--report_to", "none", "--text_files", "-"]
    code, out, err = program(*run, "--max_steps", 1, given=text)
    assert code == 0, err
    assert "1 document" in out
    resumed = [*run, "--max_steps", 2, "--resume", "--allow_changes", "max_steps"]
    for given, reason in (
        (b"", "the pipe gave no text; to resume a run, give it the same text"),
        (text * 2, "other data"),
    ):
        code, _, err = program(*resumed, given=given)
        assert code == 2
        assert reason in err.splitlines()[-1]
    code, out, err = program(*resumed, given=text)
    assert code == 0, err
    assert "resumed  after step 1" in out


@pytest.mark.slow
def test_the_program_trains_on_an_archive_and_refuses_binaries_without_a_traceback(tmp_path: Path) -> None:
    members = {f"{number}.txt": b"a member of the archive\n" * 9 for number in range(5)}
    (tmp_path / "a.tar.gz").write_bytes(tarred({**members, "__MACOSX/x": b"owner"}, "w:gz"))
    run = ["--output_dir", tmp_path / "run", *SMALL, "--report_to", "none", "--max_steps", 1]
    code, out, err = program("train", *run, "--text_files", tmp_path / "a.tar.gz")
    assert code == 0, err
    assert f"text     {tmp_path}/a.tar.gz: 5 members read, 1 left out (hidden __MACOSX/x)" in out
    code, out, err = program("evaluate", tmp_path / "run", tmp_path / "a.tar.gz")
    assert code == 0, err
    assert "a.tar.gz: 5 documents, 1,080 bytes scored" in out
    (case,) = cases(5, 6)
    (tmp_path / case.name).write_bytes(case.data)
    for command in (
        ["train", "--output_dir", tmp_path / "other", *SMALL, "--text_files"],
        ["evaluate", tmp_path / "run"],
        ["inspect"],
    ):
        code, _, err = program(*command, tmp_path / case.name)
        assert code == 2
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: ")
