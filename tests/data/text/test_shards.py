"""Shards against the documents that were written: nothing lost, nothing moved, wherever a file is cut."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from text_chunks import documents_in

from gpt_kit_hf.data.text import shards
from gpt_kit_hf.data.text.files import spans
from gpt_kit_hf.data.text.files.spans import FileSpan
from gpt_kit_hf.data.text.shards import FileShard, TextChunk, file_shards
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, encode_documents, get_encoding, may_cut, train_bpe

FORMS = ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "ndjson", "json", "parquet"]
SEPARATORS = [EOS_TOKEN, "\n\n", "--", "END OF", "\n---\n"]
WORDS = [
    "the",
    "cat",
    "it's",
    "They'll",
    "12345",
    "x=y;",
    "naïve",
    "北京",
    "👍🏽",
    "e\u0301",
    "\x7f",
    EOS_TOKEN,
    "<|endof",
]
BLANKS = [" ", " ", "\n", "  ", "\n\n\n", "\t", "\r\n", "\u00a0", "\u2028", "   \n "]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a file of a few hundred bytes is cut everywhere; all prime, so that borders meet differently."""
    for name, size in (("SHARD_BYTES", 211), ("CHUNK_BYTES", 47)):
        monkeypatch.setattr(shards, name, size)
    monkeypatch.setattr(spans, "_BLOCK", 31)


def random_text(rng: random.Random, words: int = 60) -> str:
    """Words and blanks in any order, some words long enough to have no place to cut."""
    makers: list[Callable[[], str]] = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice(BLANKS),
        lambda: rng.choice(BLANKS),
        lambda: "".join(rng.choices("abcdefgh", k=rng.randint(1, 9))),
        lambda: rng.choice("a7é") * rng.randint(1, 90),
    ]
    return "".join(rng.choices(makers, [9, 9, 3, 9, 1])[0]() for _ in range(rng.randint(1, words)))


def compressed(data: bytes, ending: str, rng: random.Random) -> bytes:
    """As `cat a.gz b.gz` makes it: several compressed members, one after the other."""
    cut = rng.randint(0, len(data))
    members = [data[:cut], data[cut:]]
    if ending == "gz":
        return b"".join(map(gzip.compress, members))
    codec = pa.Codec("zstd")
    return b"".join(codec.compress(member, asbytes=True) for member in members)


def write_form(folder: Path, form: str, documents: Sequence[str], rng: random.Random) -> list[Path]:
    """Write documents as a user has them: text a document a file, a row each otherwise."""
    kind, _, packed = form.partition(".")
    if kind == "parquet":
        pq.write_table(
            pa.table({"n": range(len(documents)), "text": documents}), folder / "d.parquet", row_group_size=3
        )
        return [folder / "d.parquet"]
    if kind == "txt":
        contents = [document.encode() for document in documents]
    else:
        rows = [json.dumps({"n": 1, "text": text}, ensure_ascii=rng.random() < 0.5) for text in documents]
        contents = [rng.choice(["\n", "\r\n", "\n\n", "\n \n"]).join(rows).encode() + rng.choice([b"", b"\n"])]
    files = [folder / f"{number:03}.{form}" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(compressed(content, packed, rng) if packed else content)
    return files


def shards_of(files: Sequence[Path], *, separator: str | None = None, cut: bool = True) -> list[FileShard]:
    return file_shards(list(files), column="text", separator=separator, may_cut=cut)


def all_chunks(found: Iterable[FileShard]) -> list[TextChunk]:
    return [chunk for shard in found for chunk in shard.chunks()]


def written_text(text: str, separator: str | None = None) -> list[str]:
    """The documents of a text file, by hand."""
    documents = text.removeprefix("\ufeff").split(separator) if separator else [text.removeprefix("\ufeff")]
    return [document for document in documents if document.strip()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_form_reads_as_the_documents_written(tmp_path: Path, form: str, cut: bool, seed: int) -> None:
    rng = random.Random(f"{form} {seed}")
    documents = [random_text(rng) for _ in range(14)]
    found = shards_of(write_form(tmp_path, form, documents, rng), cut=cut)
    expected = [d for text in documents for d in written_text(text)] if form.startswith("txt") else documents
    assert documents_in(all_chunks(found)) == expected
    assert len(found) > 1 or form.partition(".")[2]
    if not cut or not form.startswith("txt"):
        assert len(all_chunks(found)) == len(expected)


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_a_separated_file_reads_as_its_text_split(tmp_path: Path, separator: str, cut: bool, seed: int) -> None:
    rng = random.Random(f"{separator} {seed}")
    text = rng.choice(["", "\ufeff"])
    for _ in range(12):
        text += random_text(rng, words=24) + separator * rng.choice([1, 1, 1, 2])
    text += rng.choice(["", "\n", "the last one\n"])
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    assert documents_in(all_chunks(shards_of([file], separator=separator, cut=cut))) == written_text(text, separator)
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(compressed(text.encode(), "gz", rng))
    assert documents_in(all_chunks(shards_of([packed], separator=separator, cut=cut))) == written_text(text, separator)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_separator_on_any_border_ends_the_document(tmp_path: Path, separator: str) -> None:
    """The separator walks over the borders of blocks, chunks and shards; before it a letter, after it a blank."""
    file = tmp_path / "a.txt"
    for before in range(25, 225):
        text = ("ab cd efg\n" * 40)[:before] + "x" + separator + " yz\n" + "w v" * 60 + separator + "z"
        file.write_text(text)
        assert documents_in(all_chunks(shards_of([file], separator=separator))) == written_text(text, separator), (
            before
        )


def test_a_run_of_separators_is_cut_between_whole_separators(tmp_path: Path) -> None:
    """Three line ends are a separator of two and one that begins the next document, in every shard."""
    file = tmp_path / "a.txt"
    for before in range(180, 215):
        text = "a" * before + "\n\n\n" + "b" * 300 + "\n\n\n\n\nc"
        file.write_text(text)
        assert documents_in(all_chunks(shards_of([file], separator="\n\n"))) == written_text(text, "\n\n"), before


@pytest.mark.parametrize("blanks", ["\n", " " * 70, "\n" * 300])
def test_white_space_at_the_end_of_a_document_is_kept_wherever_it_is_cut(tmp_path: Path, blanks: str) -> None:
    file = tmp_path / "a.txt"
    for before in range(200, 225):
        text = "ab" * (before // 2) + "c" * (before % 2) + blanks
        file.write_text(text)
        assert documents_in(all_chunks(shards_of([file]))) == [text], before


@pytest.mark.parametrize("text", ["x" * 1500, " " * 700 + "a", "é\u3000" * 400, "1\u20032" * 300, "a\tb" * 400])
def test_text_without_a_place_to_cut_is_one_chunk(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    found = shards_of([tmp_path / "a.txt"])
    assert len(found) == 1
    assert [chunk[:2] for chunk in found[0].chunks()] == [(text, True)]


def test_a_long_document_comes_in_chunks_that_fit_in_memory(tmp_path: Path) -> None:
    text = "word after word\n" * 100
    for name, data in (("a.txt", text.encode()), ("b.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        chunks = all_chunks(shards_of([tmp_path / name]))
        assert max(len(chunk.text) for chunk in chunks) <= 47 + 31 + len("after")
        assert [chunk.ends_document for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert all(chunk.text[-1].isalpha() and after.text[0] in " \n" for chunk, after in pairwise(chunks))


def test_a_byte_order_mark_is_dropped_at_the_start_of_a_file_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\ufefftwo\r\n")
    (tmp_path / "b.txt").write_text("\ufeff")
    (tmp_path / "c.jsonl").write_text('\ufeff{"text": "\ufeffrow"}\r\n')
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("\ufefffour".encode()))
    found = shards_of([tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl", "d.txt.gz")])
    assert documents_in(all_chunks(found)) == ["one\ufefftwo\r\n", "\ufeffrow", "four"]


# --- encoding chunks


@pytest.fixture(scope="module")
def trained_encoding() -> tiktoken.Encoding:
    rng = random.Random(5)
    return train_bpe([random_text(rng) for _ in range(60)] + ["the cat it's They'll 12345\n" * 9], 420)


@pytest.mark.parametrize("kind", ["bytes", "trained", "gpt2"])
@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_chunks_encode_to_the_ids_of_the_whole_document(
    tmp_path: Path, kind: str, separator: str | None, request: pytest.FixtureRequest
) -> None:
    """200 random texts: the ids of each document encoded by itself, and EOS."""
    encoding = get_encoding("bytes") if kind == "bytes" else request.getfixturevalue(f"{kind}_encoding")
    end = encoding.encode_single_token(EOS_TOKEN)
    assert may_cut(encoding)
    rng, file, cuts = random.Random(f"{kind} {separator}"), tmp_path / "a.txt", 0
    for number in range(200):
        text = random_text(rng, words=120)
        file.write_bytes(text.encode())
        chunks = all_chunks(shards_of([file], separator=separator))
        cuts += sum(not chunk.ends_document for chunk in chunks)
        expected = [[*encoding.encode_ordinary(document), end] for document in written_text(text, separator)]
        found = encode_documents(encoding, [chunk[:2] for chunk in chunks], "a.txt")
        assert found.tolist() == [token for document in expected for token in document], number
        one_by_one = [encode_documents(encoding, [chunk[:2]], "a.txt").tolist() for chunk in chunks]
        assert [token for chunk in one_by_one for token in chunk] == found.tolist(), number
    assert cuts > 100


# --- resuming


@pytest.mark.parametrize("form", [*FORMS, "separated", "separated.gz", "separated END OF"])
@pytest.mark.parametrize("seed", range(3))
def test_reading_resumes_after_any_chunk(tmp_path: Path, form: str, seed: int) -> None:
    rng = random.Random(f"{form} {seed}")
    documents = [random_text(rng, words=110) for _ in range(7)]
    separator = None
    if form.startswith("separated"):
        separator = "END OF" if form.endswith("OF") else "\n\n"
        text = separator.join(documents).encode()
        files = [tmp_path / "a.txt.gz" if form.endswith("gz") else tmp_path / "a.txt"]
        files[0].write_bytes(compressed(text, "gz", rng) if form.endswith("gz") else text)
    else:
        files = write_form(tmp_path, form, documents, rng)
    inside = 0
    for shard in shards_of(files, separator=separator):
        chunks = list(shard.chunks())
        for number, chunk in enumerate(chunks, start=1):
            position = json.loads(json.dumps(chunk.next))
            inside += not chunk.ends_document
            # The same chunks, so that a place inside of one is the same place, too.
            assert list(shard.chunks(position)) == chunks[number:]
    assert inside > 5 or not form.startswith(("txt", "separated"))


def test_shards_are_the_same_at_each_call_and_in_order(tmp_path: Path) -> None:
    rng = random.Random(3)
    files = write_form(tmp_path, "txt", [random_text(rng, 110) for _ in range(9)], rng)
    found = shards_of(files)
    assert found == shards_of(files)
    spans = [span for shard in found for span in shard.spans]
    assert list(dict.fromkeys(span.file for span in spans)) == files
    for file in files:
        bounds = [(span.start, span.stop) for span in spans if span.file == file]
        assert [0, *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), file.stat().st_size]
    assert all(shard.size <= 211 or len(shard.spans) == 1 for shard in found)
    assert sum(shard.size for shard in found) == sum(file.stat().st_size for file in files)


# --- digests


def shard_of(*spans: tuple[Path, int, int], separator: str | None = None, cut: bool = True) -> FileShard:
    return FileShard(spans=tuple(FileSpan(*span) for span in spans), column="text", separator=separator, may_cut=cut)


def whole(file: Path) -> tuple[Path, int, int]:
    return (file, 0, file.stat().st_size)


def test_a_content_key_changes_with_bytes_and_format_but_not_with_the_name(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one two"), ("b.txt", "one two"), ("c.txt", "one tow"), ("d.jsonl", "one two")):
        (tmp_path / name).write_text(text)
    a, b, c, d = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt", "d.jsonl"))
    key = shard_of(whole(a)).content_key()
    assert shard_of(whole(b)).content_key() == key
    others = [shard_of(whole(c)), shard_of(whole(d)), shard_of(whole(a), separator=" "), shard_of(whole(a), cut=False)]
    assert len({key, *(shard.content_key() for shard in others)}) == 5


@pytest.mark.parametrize(
    ("contents", "one", "other"),
    [
        # Two documents, and one that spells both with what a digest writes between.
        (["a", "b", "atextb"], [(0, 0, 1), (1, 0, 1)], [(2, 0, 6)]),
        (["ab", "c", "a", "bc"], [(0, 0, 2), (1, 0, 1)], [(2, 0, 1), (3, 0, 2)]),
        # The end of a file, and the same bytes where the file goes on.
        (["one two", "one two three"], [(0, 0, 7)], [(1, 0, 7)]),
        # A byte order mark at the beginning, and the same bytes further on.
        (["\ufeffx", "ab\ufeffx"], [(0, 0, 4)], [(1, 2, 6)]),
        # Blanks alone are no document, at the end of one they belong to it.
        (["  ", "ab  "], [(0, 0, 2)], [(1, 2, 4)]),
    ],
)
def test_shards_with_other_text_have_other_content_keys(
    tmp_path: Path, contents: list[str], one: list[tuple[int, int, int]], other: list[tuple[int, int, int]]
) -> None:
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_text(content)
    found = [shard_of(*((tmp_path / f"{n}.txt", a, b) for n, a, b in spans)) for spans in (one, other)]
    texts = [[chunk[:2] for chunk in shard.chunks()] for shard in found]
    assert texts[0] != texts[1]
    assert found[0].content_key() != found[1].content_key()


def test_a_stamp_changes_when_a_file_keeps_its_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import time

    file = tmp_path / "a.txt"
    file.write_text("before")
    shard = shard_of((file, 0, 6))
    assert shard.stamp() is None, "a file that has only just changed may change again within the clock's tick"
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**11)
    before, times = shard.stamp(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert before is not None
    assert shard.stamp() == before
    file.write_text("after.")
    os.utime(file, ns=times)
    assert file.stat().st_mtime_ns == times[1]
    assert shard.stamp() not in (before, None)


# --- errors


def failure(found: Callable[[], Iterable[FileShard]]) -> str:
    with pytest.raises(DataError) as caught:
        all_chunks(found())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(tmp_path: Path, packed: str) -> None:
    data = b"some words here\n" * 40
    file = tmp_path / f"a.txt{packed}"
    for place in (0, 5, 46, 47, 211, 230, 500, 639):
        bad = data[:place] + b"\xff" + data[place + 1 :]
        file.write_bytes(compressed(bad, packed[1:], random.Random(1)) if packed else bad)
        line = data[:place].count(b"\n") + 1
        assert f"{file}:{line}: not UTF-8 text (byte 0xff at offset {place})" in failure(lambda: shards_of([file]))


def test_a_character_cut_by_the_end_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\ntwo é".encode()[:-1])
    assert ":2: not UTF-8 text (byte 0xc3 at offset 8)" in failure(lambda: shards_of([tmp_path / "a.txt"]))


@pytest.mark.parametrize("form", ["jsonl", "json", "ndjson", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{", "not a JSON row"),
        (b"nothing", "not a JSON row"),
        (b'{"text": "\xff"}', "not UTF-8 text (byte 0xff); it looks like cp1252"),
        (b'{"text": "a"} {"text": "b"}', "not a JSON row"),
        (b"[" * 100_000, "not a JSON row"),
        (b"[1, 2]", "a row must be a JSON object, got list"),
        (b'"text"', "a row must be a JSON object, got str"),
        (b"{}", "no 'text' (text_column); the row has nothing"),
        (b'{"body": "x", "n": 1}', "no 'text' (text_column); the row has 'body', 'n'"),
        (b'{"text": null}', "'text' must be text, got None"),
        (b'{"text": 7}', "'text' must be text, got 7"),
        (b'{"text": NaN}', "'text' must be text, got nan"),
        (b'{"text": ["a"]}', "'text' must be text, got ['a']"),
        (b'{"text": "half \\ud83d"}', "'text' has a lone surrogate, U+D83D"),
    ],
    ids=str,
)
def test_a_row_that_is_not_text_is_named_by_line(tmp_path: Path, form: str, row: bytes, reason: str) -> None:
    if form.partition(".")[2] and len(row) > 1000:
        pytest.skip("one form is enough for the deep row")
    good = b'{"text": "a row that is fine"}\n'
    data = good * 20 + b"\r\n" + row + b"\n" + good * 3  # in the third shard
    file = tmp_path / f"a.{form}"
    packed = form.partition(".")[2]
    file.write_bytes(compressed(data, packed, random.Random(1)) if packed else data)
    assert f"{file}:22: {reason}" in failure(lambda: shards_of([file]))


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (7, "7"), (b"raw", "b'raw'")])
def test_a_parquet_row_that_is_not_text_is_named(tmp_path: Path, value: object, shown: str) -> None:
    file = tmp_path / "a.parquet"
    values = ["a", "b", "c", "d"] if value is None else [value] * 4
    table = pa.table({"text": pa.array([*values, value])})
    pq.write_table(table, file, row_group_size=2)
    message = failure(lambda: shards_of([file]))
    assert message.startswith(f"{file}: row ")
    assert message.endswith(f"'text' must be text, got {shown}; --on_bad_text skip leaves such text out")


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\xff\xfe"]).view(pa.string())}), file)
    assert str(file) in failure(lambda: shards_of([file]))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all", b"PAR1" + b"\xff" * 40 + b"PAR1"])
def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    assert f"{tmp_path / 'a.parquet'}: cannot be read as Parquet" in failure(
        lambda: shards_of([tmp_path / "a.parquet"])
    )


def test_parquet_whose_pages_are_damaged_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"row {n}" for n in range(400)]}), file, compression="zstd", use_dictionary=False
    )
    data = bytearray(file.read_bytes())
    data[4:200] = b"\xff" * 196
    file.write_bytes(data)
    assert str(file) in failure(lambda: shards_of([file]))


def test_a_missing_column_of_parquet_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    message = failure(lambda: shards_of([tmp_path / "a.parquet"]))
    assert message == f"{tmp_path / 'a.parquet'}: no column 'text' (text_column); its columns: body, n"


@pytest.mark.parametrize("ending", ["txt.gz", "jsonl.gz", "txt.zst", "jsonl.zst"])
@pytest.mark.parametrize("harm", ["cut short", "not compressed"])
def test_a_compressed_file_that_is_damaged_is_named(tmp_path: Path, ending: str, harm: str) -> None:
    rng = random.Random(2)
    rows = "".join(json.dumps({"text": random_text(rng)}) + "\n" for _ in range(40)).encode()
    kind = ending.partition(".")[2]
    data = gzip.compress(rows) if kind == "gz" else pa.Codec("zstd").compress(rows, asbytes=True)
    file = tmp_path / f"a.{ending}"
    for length in (12, len(data) // 2, len(data) - 9, len(data) - 1):
        file.write_bytes(rows if harm == "not compressed" else data[:length])
        message = failure(lambda: shards_of([file]))
        assert message.startswith(f"{file}: cannot be decompressed: "), length


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
        found = shards_of([tmp_path / name])
        (tmp_path / name).unlink()
        assert str(tmp_path / name) in failure(lambda found=found: found)  # type: ignore[misc]


@pytest.mark.parametrize(
    "text", ["\u6f22\u5b57\u3002" * 30 + "\n", "\u00e9t\u00e9 123, " * 9, "a\u3000 b\u00a0\n c\u2003 d\n" * 20]
)
def test_text_of_any_script_is_cut_to_the_same_tokens(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 40)
    monkeypatch.setattr(spans, "_BLOCK", 64)
    (tmp_path / "a.txt").write_text(text * 40)
    encoding = train_bpe([text * 3, "abc def 12 3\n"], 400)
    found = file_shards([tmp_path / "a.txt"], column="text", separator=None, may_cut=True, shard_bytes=500)
    assert len(found) > 1
    chunks = [(chunk.text, chunk.ends_document) for shard in found for chunk in shard.chunks()]
    assert len(chunks) > 10
    ids = np.concatenate([encode_documents(encoding, [chunk], "here") for chunk in chunks])
    np.testing.assert_array_equal(ids, encode_documents(encoding, [(text * 40, True)], "here"))
