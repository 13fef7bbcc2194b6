"""Documents against a reader by hand: EOS marks and separators wherever text is cut, and text that is bad."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_chunks import documents_in

from gpt_kit_hf.data.text import shards
from gpt_kit_hf.data.text.dataset_shards import DatasetShard, rows_shards
from gpt_kit_hf.data.text.documents import (
    MARKS_AT_LINE_ENDS,
    MARKS_IN_TEXT,
    READ,
    SEPARATORS,
    SEPARATORS_WITH_CRLF,
    Policy,
    left_out,
    replaced,
)
from gpt_kit_hf.data.text.files import spans
from gpt_kit_hf.data.text.shards import FileShard, file_shards
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN

SPLIT = Policy(eos_in_text="split")
SKIP = Policy(eos_in_text="split", on_bad_text="skip")
REPLACE = Policy(eos_in_text="split", on_bad_text="replace")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a file of a few hundred bytes is cut everywhere; all prime, so that borders meet differently."""
    for name, size in (("SHARD_BYTES", 211), ("CHUNK_BYTES", 47)):
        monkeypatch.setattr(shards, name, size)
    monkeypatch.setattr(spans, "_BLOCK", 31)


def read(
    files: Path | Sequence[Path], policy: Policy = SPLIT, *, separator: str | None = None, **options: Any
) -> tuple[list[str], Counter[str]]:
    """The documents in files, and what was found."""
    named = [files] if isinstance(files, Path) else list(files)
    tally = Counter[str]()
    found = file_shards(named, column="text", separator=separator, may_cut=True, policy=policy, **options)
    return documents_in(chunk for shard in found for chunk in shard.chunks(None, tally)), tally


def by_hand(text: str, separator: str | None = None) -> list[str]:
    """The documents of a text by the words of the documentation: separators first, then lines that end in the mark."""
    documents = []
    for part in text.split(separator) if separator else [text]:
        waiting = ""
        for line in part.split("\n"):
            bare = line.removesuffix("\r").rstrip(" \t")
            if bare.endswith(EOS_TOKEN):
                documents.append(waiting + bare.removesuffix(EOS_TOKEN))
                waiting = ""
            else:
                waiting += line + "\n"
        documents.append(waiting.removesuffix("\n") if not part.endswith(EOS_TOKEN) else waiting)
    return [document for document in documents if document.strip()]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n<|endoftext|>\ntwo\n", ["one\n", "two\n"]),
        ("one<|endoftext|>\ntwo", ["one", "two"]),
        ("one\r\n<|endoftext|>\r\ntwo\r\n", ["one\r\n", "two\r\n"]),
        ("one<|endoftext|> \t\n two", ["one", " two"]),
        ("one\n<|endoftext|>", ["one\n"]),
        ("one\n<|endoftext|>\n", ["one\n"]),
        ("one\n<|endoftext|>\n\n \n", ["one\n"]),
        ("<|endoftext|>\n<|endoftext|>\none<|endoftext|>\n", ["one"]),
        ("one\n<|endoftext|>\n\ntwo", ["one\n", "\ntwo"]),
        ("GPT's <|endoftext|> ends a text.\n", ["GPT's <|endoftext|> ends a text.\n"]),
        ("one\n<|endoftext|>two", ["one\n<|endoftext|>two"]),
        ("one<|endoftext|>x<|endoftext|>\ntwo", ["one<|endoftext|>x", "two"]),
        ("<|endoftext|>\n", []),
    ],
)
def test_marks_at_line_ends_end_documents(tmp_path: Path, text: str, documents: list[str]) -> None:
    file, packed, rows = tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.jsonl"
    file.write_bytes(text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    rows.write_text(json.dumps({"text": text}))
    for each in (file, packed, rows):
        found, tally = read(each)
        assert found == documents, each.name
        assert tally[READ] == len(documents)
        assert tally[MARKS_IN_TEXT] + tally[MARKS_AT_LINE_ENDS] == text.count(EOS_TOKEN)
        assert tally[MARKS_IN_TEXT] == sum(document.count(EOS_TOKEN) for document in documents)
    assert by_hand(text) == documents


def test_marks_are_kept_or_refused_if_that_is_asked_for(tmp_path: Path) -> None:
    for text in ("one\n<|endoftext|>\ntwo\n", "one <|endoftext|> two\n"):
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + json.dumps({"text": text}))
        found, tally = read(tmp_path / "a.txt", Policy("keep"))
        assert (found, tally[MARKS_IN_TEXT], tally[MARKS_AT_LINE_ENDS]) == ([text], 1, 0)
        for name, line in (("a.txt", 1), ("a.jsonl", 2)):
            with pytest.raises(
                DataError, match=rf"{name}:{line}: <\|endoftext\|> is written in the text .*split.*keep"
            ):
                read(tmp_path / name, Policy("error"))
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read(tmp_path / "a.txt", Policy("error"))[0] == ["one\ntwo"]


PARTS = [
    EOS_TOKEN,
    EOS_TOKEN + "\n",
    f"\n{EOS_TOKEN}\n",
    EOS_TOKEN + " \t\r\n",
    "\n",
    "\n\n",
    "\r\n",
    " ",
    "--",
    "<|end",
]


@pytest.mark.parametrize("separator", [None, "\n\n", "--", " ", "\n", "\r\n\r\n", "text|>--", "\n--\n"])
@pytest.mark.parametrize("seed", range(12))
def test_documents_are_the_same_wherever_text_is_cut(
    tmp_path: Path, separator: str | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{separator} {seed}")
    text = "".join(
        rng.choice(PARTS) if rng.random() < 0.4 else rng.choice("ab é") * rng.randint(1, 30) for _ in range(120)
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    expected = by_hand(text, separator)
    for block, chunk, shard in ((31, 47, 211), (7, 13, 89), (1, 20, 500), (1000, 30, 60), (5000, 5000, 5000)):
        monkeypatch.setattr(shards, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(spans, "_BLOCK", block)
        for file in ("a.txt", "a.txt.gz"):
            found, tally = read(tmp_path / file, separator=separator, shard_bytes=shard)
            assert found == expected, (block, chunk, shard, file)
            assert tally[READ] == len(expected)
    for shard_ in file_shards(
        [tmp_path / "a.txt"], column="text", separator=separator, may_cut=True, shard_bytes=150, policy=SPLIT
    ):
        chunks = list(shard_.chunks())
        for number, each in enumerate(chunks, start=1):
            assert list(shard_.chunks(json.loads(json.dumps(each.next)))) == chunks[number:]


def test_text_without_a_mark_is_cut_as_before(tmp_path: Path) -> None:
    """The same chunks and content keys for every policy: what was stored stays valid."""
    (tmp_path / "a.txt").write_text("word after <|endof word\n" * 60)
    found = [
        file_shards([tmp_path / "a.txt"], column="text", separator=None, may_cut=True, policy=policy)
        for policy in (Policy(), SPLIT, SKIP, REPLACE)
    ]
    assert len({tuple((shard.spans, shard.content_key()) for shard in each) for each in found}) == 1
    texts = [[chunk[:2] for shard in each for chunk in shard.chunks()] for each in found]
    assert texts[0] == texts[1] == texts[2] == texts[3]


# --- rows

ROWS = [
    "one<|endoftext|>",
    "two\n<|endoftext|>\nthree",
    "",
    "four <|endoftext|> five",
    "six\n<|endoftext|>\n",
    "seven",
]
ROWS_READ = ["one", "two\n", "three", "", "four <|endoftext|> five", "six\n", "seven"]


def test_marks_in_rows_end_documents_once_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    pq.write_table(pa.table({"text": ROWS}), tmp_path / "a.parquet")
    stored = datasets.Dataset.from_dict({"text": ROWS})
    stream = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    forms: list[Any] = [
        *([shard] for name in ("a.jsonl", "a.parquet") for shard in [_only(tmp_path / name)]),
        rows_shards(stored, "the set", "text", SPLIT),
        [DatasetShard(dataset=stream, source="the set", index=0, column="text", policy=SPLIT)],
    ]
    for (shard,) in forms:
        tally = Counter[str]()
        chunks = list(shard.chunks(None, tally))
        assert [chunk.text for chunk in chunks] == ROWS_READ
        assert all(chunk.ends_document for chunk in chunks)
        assert (tally[READ], tally[MARKS_AT_LINE_ENDS], tally[MARKS_IN_TEXT]) == (7, 3, 1)
        # Also from the middle of a row.
        for number, chunk in enumerate(chunks, start=1):
            position = json.loads(json.dumps(chunk.next))
            assert [each.text for each in shard.chunks(position)] == ROWS_READ[number:], number


def _only(file: Path) -> FileShard:
    (shard,) = file_shards([file], column="text", separator=None, may_cut=True, shard_bytes=10_000, policy=SPLIT)
    return shard


# --- bad text

BAD_LINES = [
    (b'{"text": "fine"}', None),
    (b'{"text": null}', "null"),
    (b'{"text": 7}', "not a string"),
    (b'{"text": "half \\ud83d of it"}', "half a surrogate"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b'{"text": "cut', "not a JSON row"),
    (b'{"body": "x"}', "without the column"),
    (b'{"text": "fine, too"}', None),
]


def test_a_bad_row_is_left_out_or_repaired_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(line for line, _ in BAD_LINES))
    found, tally = read(file, SKIP)
    assert found == ["fine", "fine, too"]
    assert tally == Counter({READ: 8, **{left_out(kind): 1 for _, kind in BAD_LINES if kind}})
    found, tally = read(file, REPLACE)
    assert found == ["fine", "half \ufffd of it", "caf\ufffd", "fine, too"]
    gone = {left_out(kind): 1 for kind in ("null", "not a string", "not a JSON row", "without the column")}
    assert tally == Counter({READ: 8, replaced("half a surrogate"): 1, replaced("not UTF-8"): 1, **gone})
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'text' must be text, got None"):
        read(file)


def test_a_bad_row_of_parquet_and_datasets_is_left_out_or_repaired(tmp_path: Path) -> None:
    values = pa.array([b"fine", None, b"caf\xe9 \xff", b"fine, too"]).view(pa.string())
    pq.write_table(pa.table({"text": values, "n": range(4)}), tmp_path / "a.parquet")
    stored = datasets.Dataset(pa.table({"text": values, "n": range(4)}))
    for policy, documents, counts in (
        (SKIP, ["fine", "fine, too"], {left_out("null"): 1, left_out("not UTF-8"): 1}),
        (REPLACE, ["fine", "caf\ufffd \ufffd", "fine, too"], {left_out("null"): 1, replaced("not UTF-8"): 2}),
    ):
        found, tally = read(tmp_path / "a.parquet", policy)
        assert found == documents
        assert tally == Counter({READ: 4, **counts})
        (shard,) = rows_shards(stored, "the set", "text", policy)
        tally = Counter()
        assert documents_in(shard.chunks(None, tally)) == documents
        assert tally == Counter({READ: 4, **counts})
    with pytest.raises(DataError, match="the set row 1: 'text' must be text, got None"):
        documents_in(rows_shards(stored, "the set", "text", SPLIT)[0].chunks())
    numbers = datasets.Dataset.from_dict({"text": [1, 2]})
    tally = Counter()
    assert documents_in(rows_shards(numbers, "the set", "text", SKIP)[0].chunks(None, tally)) == []
    assert tally == Counter({READ: 2, left_out("not a string"): 2})


def test_bad_rows_of_a_streamed_dataset_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": null}\n{"text": "fine, too"}\n')
    stream = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    tally = Counter[str]()
    shard = DatasetShard(dataset=stream, source="the set", index=0, column="text", policy=SKIP)
    assert documents_in(shard.chunks(None, tally)) == ["fine", "fine, too"]
    assert tally == Counter({READ: 3, left_out("null"): 1})


@pytest.mark.parametrize("separator", [None, "\n\n"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_document_that_is_not_utf8_is_left_out_whole_or_repaired(
    tmp_path: Path, separator: str | None, packed: bool, seed: int
) -> None:
    """Long documents, which come in many chunks and shards, with a bad byte anywhere."""
    rng = random.Random(f"{separator} {seed}")
    mark = (separator or "<|endoftext|>\n").encode()
    documents = [f"\n{number} words of text, é".encode() * rng.randint(1, 40) for number in range(9)]
    for number in rng.sample(range(9), 3):
        place = rng.randint(0, len(documents[number]))
        bad = rng.choice([b"\xff", b"\xe9 ", b"\xe2\x80"])
        documents[number] = documents[number][:place] + bad + documents[number][place:]
    data = mark.join(documents)
    file = tmp_path / ("a.txt.gz" if packed else "a.txt")
    file.write_bytes(gzip.compress(data) if packed else data)
    good = [document for document in documents if _is_utf8(document)]
    found, tally = read(file, SKIP, separator=separator)
    assert found == [document.decode() for document in good]
    assert (tally[READ], tally[left_out("not UTF-8")]) == (9, 9 - len(good))
    found, tally = read(file, REPLACE, separator=separator)
    assert found == [document.decode("utf-8", "replace") for document in documents]
    assert tally[replaced("not UTF-8")] == sum(text.count("\ufffd") for text in found) > 0
    assert tally[READ] == 9
    with pytest.raises(DataError, match="not UTF-8 text"):
        read(file, separator=separator)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_file_that_is_not_utf8_is_one_document_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 and more\n" * 60)
    found, tally = read([tmp_path / "a.txt", tmp_path / "b.txt"], SKIP)
    assert found == ["fine\n"]
    assert tally == Counter({READ: 2, left_out("not UTF-8"): 1})


# --- separators


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("\\n\\n", "\n\n"),
        ("\n\n", "\n\n"),
        ("\\t", "\t"),
        ("\\r\\n", "\r\n"),
        ("\\\\n", "\\n"),
        ("\\x0c", "\x0c"),
        ("\\u2028", "\u2028"),
        ("\\section", "\\section"),
        ("<|endoftext|>", "<|endoftext|>"),
        ("\\", "\\"),
    ],
)
def test_escapes_in_a_separator_are_read(typed: str, meant: str) -> None:
    assert TextOptions(text_files=["a"], document_separator=typed).separator == meant


def test_half_a_surrogate_is_no_separator() -> None:
    with pytest.raises(UsageError, match="half a surrogate"):
        TextOptions(text_files=["a"], document_separator="\\ud83d")


def test_separators_and_those_with_other_line_ends_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\n\nb\n\nc" + b"\n" + b"d\r\n\r\ne" * 30)
    _, tally = read(tmp_path / "a.txt", separator="\n\n")
    assert (tally[SEPARATORS], tally[SEPARATORS_WITH_CRLF]) == (2, 30)
