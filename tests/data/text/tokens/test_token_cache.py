"""The token cache against encoding by hand: shards are encoded once, damaged files again, none is kept in memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from children import KILLED, in_child

from gpt_kit_hf.data.text import shards
from gpt_kit_hf.data.text.documents import (
    AS_IT_IS,
    MARKS_AT_LINE_ENDS,
    MARKS_IN_TEXT,
    READ,
    Policy,
    left_out,
    replaced,
)
from gpt_kit_hf.data.text.files import spans
from gpt_kit_hf.data.text.shards import FileShard, Tally, TextChunk, file_shards
from gpt_kit_hf.data.text.tokens import stored_arrays, token_cache
from gpt_kit_hf.data.text.tokens.stored_arrays import StoredIds
from gpt_kit_hf.data.text.tokens.token_cache import StoredTokens, store_tokens
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, get_encoding, train_bpe

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat;",
    "it's",
    "naïve",
    "12345",
    "\n\n",
    ",",
    ".",
    "北京",
    "=",
    "\t",
    "and",
    "then",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own, and sizes at which a file of a few hundred bytes has several shards and chunks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for module, name, size in (
        (shards, "SHARD_BYTES", 401),
        (shards, "CHUNK_BYTES", 67),
        (spans, "_BLOCK", 53),
        (token_cache, "CHUNK_BYTES", 150),
    ):
        monkeypatch.setattr(module, name, size)
    return tmp_path / "cache" / "gpt-kit-tokens"


def random_text(seed: object, words: int = 300) -> str:
    rng = random.Random(str(seed))
    return " ".join(rng.choices([*WORDS, EOS_TOKEN], k=words)) + "\n"


def shards_in(*files: Path, separator: str | None = None) -> list[FileShard]:
    return [*file_shards(list(files), column="text", separator=separator, may_cut=True)]


def ids_in(stored: StoredTokens) -> list[int]:
    return [token for chunk in stored.chunks for token in np.asarray(chunk).tolist()]


def by_hand(encoding: tiktoken.Encoding, documents: Sequence[str]) -> tuple[list[int], list[int]]:
    """Each document encoded by itself and ended, and where each begins."""
    end = encoding.encode_single_token(EOS_TOKEN)
    encoded = [[*encoding.encode_ordinary(document), end] for document in documents]
    starts = [0, *np.cumsum([len(document) for document in encoded])[:-1].tolist()]
    return [token for document in encoded for token in document], starts


def assert_stored(stored: StoredTokens, encoding: tiktoken.Encoding, documents: Sequence[str]) -> None:
    ids, starts = by_hand(encoding, documents)
    assert ids_in(stored) == ids
    assert stored.document_starts.tolist() == starts


@pytest.fixture(scope="module")
def trained_encoding() -> tiktoken.Encoding:
    return train_bpe([random_text(seed) for seed in range(9)], 330)


def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "encode_documents", lambda *_: pytest.fail("encoded again"))


@pytest.mark.parametrize("kind", ["bytes", "trained", "gpt2"])
@pytest.mark.parametrize("num_proc", [1, 3])
def test_ids_are_those_of_each_document_by_itself(
    tmp_path: Path, kind: str, num_proc: int, request: pytest.FixtureRequest
) -> None:
    encoding = get_encoding("bytes") if kind == "bytes" else request.getfixturevalue(f"{kind}_encoding")
    texts = [random_text(seed) for seed in range(3)]
    rows = [random_text(("row", seed), words=9) for seed in range(60)] + [""]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    pq.write_table(pa.table({"text": rows[:7]}), tmp_path / "rows.parquet", row_group_size=2)
    files = [*(tmp_path / f"{number}.txt" for number in range(3)), tmp_path / "rows.jsonl", tmp_path / "rows.parquet"]
    found = shards_in(*files)
    stored = store_tokens(found, encoding, num_proc)
    assert_stored(stored, encoding, [*texts, *rows, *rows[:7]])
    assert stored.made == len(found) > 12
    assert {chunk.dtype for chunk in stored.chunks} == {np.dtype(np.uint16)}


@pytest.mark.parametrize(("vocabulary", "dtype"), [(256, np.uint8), (257, np.uint16), (66_000, np.uint32)])
def test_ids_are_kept_in_the_smallest_type_that_holds_the_vocabulary(
    tmp_path: Path, cache: Path, vocabulary: int, dtype: type
) -> None:
    ranks = {bytes([byte]): byte for byte in range(min(255, vocabulary - 1))}
    end = {EOS_TOKEN: vocabulary - 1}
    encoding = tiktoken.Encoding("made up", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=end)
    (tmp_path / "a.txt").write_text("some words " * 90)
    stored = store_tokens(shards_in(tmp_path / "a.txt"), encoding)
    assert_stored(stored, encoding, ["some words " * 90])
    assert {chunk.dtype for chunk in stored.chunks} == {np.dtype(dtype)}
    for file in cache.glob("*.arrow"):
        with pa.ipc.open_stream(file) as reader:
            assert reader.schema.field("input_ids").type.value_type == pa.from_numpy_dtype(dtype)


def test_nothing_is_encoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(random_text(1))
    first = store_tokens(shards_in(tmp_path / "a.txt"), get_encoding("bytes"))
    no_encoding(monkeypatch)
    again = store_tokens(shards_in(tmp_path / "a.txt"), get_encoding("bytes"), 3)
    assert (again.made, again.key, ids_in(again)) == (0, first.key, ids_in(first))
    # Under another name, too: it is the text that counts.
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert store_tokens(shards_in(tmp_path / "b.txt"), get_encoding("bytes")).made == 0
    (tmp_path / "c.txt").write_text("something else")
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        store_tokens(shards_in(tmp_path / "c.txt"), get_encoding("bytes"))


def test_each_encoding_and_separator_has_its_own_files(tmp_path: Path, trained_encoding: tiktoken.Encoding) -> None:
    text = random_text(1)
    (tmp_path / "a.txt").write_text(text)
    keys = set()
    for encoding in (get_encoding("bytes"), trained_encoding):
        for separator, documents in ((None, [text]), ("\n", [line for line in text.split("\n") if line.strip()])):
            stored = store_tokens(shards_in(tmp_path / "a.txt", separator=separator), encoding)
            assert stored.made > 2
            assert_stored(stored, encoding, documents)
            keys.add(stored.key)
    assert len(keys) == 4


def test_a_change_encodes_only_its_shard_again(tmp_path: Path) -> None:
    texts = [random_text(seed, words=60) for seed in range(6)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    files = sorted(tmp_path.glob("*.txt"))
    found = shards_in(*files)
    encoding = get_encoding("bytes")
    before = store_tokens(found, encoding)
    assert before.made == len(found) == 6
    texts[3] = texts[3].swapcase()
    files[3].write_text(texts[3])
    after = store_tokens(shards_in(*files), encoding)
    assert after.made == 1
    assert after.key != before.key
    assert_stored(after, encoding, texts)
    # And back: what was made before is still there.
    files[3].write_text(texts[3].swapcase())
    assert store_tokens(shards_in(*files), encoding).made == 0


@pytest.mark.parametrize("ending", ["\n", "word", " ", "x" * 300])
def test_appended_text_encodes_only_the_last_shard_again(tmp_path: Path, ending: str) -> None:
    """Whatever the file ended with: its last shard, which ended the document, no longer does."""
    encoding, file = get_encoding("bytes"), tmp_path / "a.txt"
    for words in range(200, 260):
        text = random_text("appended", words=words).rstrip() + ending
        file.write_text(text)
        before = store_tokens(shards_in(file), encoding)
        assert_stored(before, encoding, [text])
        file.write_text(text + " and more")
        after = store_tokens(shards_in(file), encoding)
        assert_stored(after, encoding, [text + " and more"])
        assert after.made <= 2 < len(after.chunks)


def test_files_with_the_same_bytes_share_a_file_of_ids(tmp_path: Path, cache: Path) -> None:
    rows = "".join(json.dumps({"text": random_text(0, words=40)}) + "\n" for _ in range(2))
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(rows)
    found = shards_in(*sorted(tmp_path.glob("*.jsonl")))
    stored = store_tokens(found, get_encoding("bytes"))
    assert len(found) == 3
    assert stored.made == 1 == len(list(cache.glob("*.arrow")))
    assert_stored(stored, get_encoding("bytes"), [random_text(0, words=40)] * 6)


def test_two_files_and_one_with_their_joined_text_are_stored_apart(tmp_path: Path) -> None:
    for name, text in (("a.txt", "a"), ("b.txt", "b"), ("c.txt", "atextb")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    assert_stored(store_tokens(shards_in(a, b), get_encoding("bytes")), get_encoding("bytes"), ["a", "b"])
    assert_stored(store_tokens(shards_in(c), get_encoding("bytes")), get_encoding("bytes"), ["atextb"])


def test_white_space_alone_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n" * 400)
    for found in ([], shards_in(tmp_path / "a.txt")):
        stored = store_tokens(found, get_encoding("bytes"))
        assert stored.document_starts.size == 0
        assert ids_in(stored) == []


# --- changed files


def test_a_file_is_read_again_only_when_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    file = tmp_path / "a.txt"
    file.write_text(random_text(1))
    now, read = time.time_ns, FileShard.content_key
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**11)  # as if written long ago
    reads: list[str] = []

    def counted(shard: FileShard) -> str:
        reads.append(shard.name)
        return read(shard)

    monkeypatch.setattr(FileShard, "content_key", counted)
    encoding = get_encoding("bytes")
    found = len(shards_in(file))
    first = store_tokens(shards_in(file), encoding)
    assert len(reads) == found > 2
    assert store_tokens(shards_in(file), encoding).key == first.key
    assert len(reads) == found
    # Same size, and the time set back: only what nobody can set shows the change.
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_text(random_text(1).swapcase())
    os.utime(file, ns=times)
    changed = store_tokens(shards_in(file), encoding)
    assert len(reads) == 2 * found
    assert_stored(changed, encoding, [random_text(1).swapcase()])


def test_a_file_that_has_just_changed_is_read_each_time(tmp_path: Path) -> None:
    file, encoding = tmp_path / "a.txt", get_encoding("bytes")
    for text in ("aaaa", "bbbb", "cccc"):
        file.write_text(text)
        os.utime(file, (0, 0))
        assert_stored(store_tokens(shards_in(file), encoding), encoding, [text])


# --- how documents are read


def shards_by(policy: Policy, *files: Path) -> list[FileShard]:
    return [*file_shards(list(files), column="text", separator=None, may_cut=True, policy=policy)]


POLICIES = [Policy(eos, bad) for eos in ("keep", "split") for bad in ("stop", "skip", "replace")]


def test_a_policy_that_changes_nothing_changes_no_key_and_encodes_nothing_again(tmp_path: Path) -> None:
    rng = random.Random(0)
    (tmp_path / "a.txt").write_text(" ".join(rng.choices([*WORDS, f"{EOS_TOKEN} x"], k=300)))  # marks within lines
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"{n} {EOS_TOKEN} x"}) + "\n" for n in range(40)))
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    marks = sum(file.read_text().count(EOS_TOKEN) for file in files)
    keys, made = set(), []
    for policy in POLICIES:
        stored = store_tokens(shards_by(policy, *files), get_encoding("bytes"))
        keys.add(stored.key)
        made.append(stored.made)
        assert stored.tally[MARKS_IN_TEXT] == marks
        assert stored.tally[READ] == len(stored.document_starts) == 41
    assert len(keys) == 1
    assert made[1:] == [0] * 5


@pytest.mark.parametrize("num_proc", [1, 3])
def test_what_was_found_is_known_from_the_cache_too(tmp_path: Path, num_proc: int) -> None:
    text = f"one\n{EOS_TOKEN}\ntwo {EOS_TOKEN} two\n" * 40
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": null}\n{"text": "caf\xe9"}\n' * 60)
    files, encoding = [tmp_path / "a.txt", tmp_path / "b.jsonl"], get_encoding("bytes")
    skip = Policy("split", "skip")
    first = store_tokens(shards_by(skip, *files), encoding, num_proc)
    again = store_tokens(shards_by(skip, *files), encoding, num_proc)
    assert first.made > 6
    assert again.made == 0
    for stored in (first, again):
        assert stored.key == first.key
        counts = {MARKS_AT_LINE_ENDS: 40, MARKS_IN_TEXT: 40, left_out("null"): 60, left_out("not UTF-8"): 60}
        assert stored.tally == Counter({READ: 41 + 180, **counts})
        one, two = "one\n", f"two {EOS_TOKEN} two\n"
        assert_stored(stored, encoding, [one, *[two + one] * 39, two, *["fine"] * 60])
    replaced_ = store_tokens(shards_by(Policy("split", "replace"), *files), encoding, num_proc)
    assert replaced_.key != first.key
    assert replaced_.tally[replaced("not UTF-8")] == 60
    with pytest.raises(DataError, match=r"b\.jsonl:\d+: (not a JSON row|'text' must be text, got None)"):
        store_tokens(shards_by(Policy("split", "stop"), *files), encoding, num_proc)


def test_ids_of_a_version_without_notes_are_used_unless_a_mark_would_be_split(tmp_path: Path, cache: Path) -> None:
    """Such a version knew one policy: marks are text, and bad text stops."""
    encoding = get_encoding("bytes")
    (tmp_path / "a.txt").write_text("no mark at all " * 90)
    (tmp_path / "b.txt").write_text("".join(f"{n}\n{EOS_TOKEN}\n" for n in range(99)))
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    before = store_tokens(shards_by(AS_IT_IS, a, b), encoding)
    for note in (cache / "seen").glob("*.json"):
        note.unlink()
    split = Policy("split")
    assert store_tokens(shards_by(split, a), encoding).made == 0
    after = store_tokens(shards_by(split, b), encoding)
    assert after.made == len(shards_by(split, b))
    assert_stored(after, encoding, [f"{n}\n" for n in range(99)])
    kept = store_tokens(shards_by(AS_IT_IS, a, b), encoding)
    assert (kept.made, kept.key) == (0, before.key)
    assert_stored(kept, encoding, [a.read_text(), b.read_text()])


# --- damaged files of ids


def test_a_truncated_file_of_ids_is_made_again(tmp_path: Path, cache: Path) -> None:
    encoding, texts = get_encoding("bytes"), [random_text(seed, words=15) for seed in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store_tokens(shards_in(tmp_path / "a.jsonl"), encoding)
    (stored,) = cache.glob("*.arrow")
    data = stored.read_bytes()
    for length in [*range(0, len(data) - 8, 8), *range(1, len(data) - 8, 37)]:
        stored.write_bytes(data[:length])
        again = store_tokens(shards_in(tmp_path / "a.jsonl"), encoding)
        assert again.made == 1, f"{length} of {len(data)} bytes passed for the whole"
        assert stored.read_bytes() == data


@pytest.mark.parametrize("harm", ["nothing", "text", "zeros", "other schema"])
def test_a_file_with_other_content_is_made_again(tmp_path: Path, cache: Path, harm: str) -> None:
    encoding, text = get_encoding("bytes"), random_text(0, words=20)
    (tmp_path / "a.txt").write_text(text)
    store_tokens(shards_in(tmp_path / "a.txt"), encoding)
    (stored,) = cache.glob("*.arrow")
    if harm == "other schema":
        with pa.OSFile(str(stored), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("x", pa.int8())])) as writer:
            writer.write_table(pa.table({"x": pa.array([1], pa.int8())}))
    else:
        stored.write_bytes({"nothing": b"", "text": b"not Arrow " * 50, "zeros": bytes(2000)}[harm])
    again = store_tokens(shards_in(tmp_path / "a.txt"), encoding)
    assert again.made == 1
    assert_stored(again, encoding, [text])


def test_ids_made_again_are_read_although_the_damaged_file_was_open(tmp_path: Path, cache: Path) -> None:
    encoding, text = get_encoding("bytes"), random_text(0, words=20)
    (tmp_path / "a.txt").write_text(text)
    assert_stored(store_tokens(shards_in(tmp_path / "a.txt"), encoding), encoding, [text])
    (stored,) = cache.glob("*.arrow")
    os.truncate(stored, 100)
    assert_stored(store_tokens(shards_in(tmp_path / "a.txt"), encoding), encoding, [text])


def test_ids_truncated_while_they_are_read_are_an_error(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text(random_text(0, words=20))
    stored = store_tokens(shards_in(tmp_path / "a.txt"), get_encoding("bytes"))
    (file,) = cache.glob("*.arrow")
    os.truncate(file, 100)
    with pytest.raises(DataError, match=r"\.arrow was cut short; if it is in the token cache, remove it"):
        ids_in(stored)


# --- interrupted runs


@dataclass(frozen=True)
class FakeShard:
    """A shard of given chunks, which may do something before it is read."""

    texts: tuple[str, ...]
    number: int
    before: Callable[[], object] = field(default=lambda: None)
    policy: Policy = AS_IT_IS

    @property
    def name(self) -> str:
        return f"shard {self.number}"

    @property
    def size(self) -> int:
        return 100

    def content_key(self) -> str:
        return f"{self.number} {self.texts}"

    def stamp(self) -> str | None:
        return None

    def chunks(self, position: Any = None, tally: Tally | None = None) -> Iterator[TextChunk]:
        self.before()
        for number, text in enumerate(self.texts):
            yield TextChunk(text, True, number + 1)


def bad() -> None:
    raise DataError("the disk is on fire")


@pytest.mark.parametrize("num_proc", [1, 3])
def test_an_error_keeps_the_shards_encoded_before_it(num_proc: int, cache: Path) -> None:
    encoding = get_encoding("bytes")
    fine = [FakeShard((f"text {n}", "more"), n) for n in range(9)]
    broken = [*fine[:6], FakeShard(fine[6].texts, 6, bad), *fine[7:]]
    with pytest.raises(DataError, match="the disk is on fire"):
        store_tokens(broken, encoding, num_proc)
    kept = len(list(cache.glob("*.arrow")))
    assert kept >= 6 - (num_proc - 1)
    assert not list(cache.glob(".*")), "a stage was left behind"
    stored = store_tokens(fine, encoding)
    assert stored.made == 9 - kept
    assert_stored(stored, encoding, [text for shard in fine for text in shard.texts])


def test_text_that_cannot_be_encoded_is_named_by_its_shard() -> None:
    with pytest.raises(DataError, match="shard 3 has the lone surrogate"):
        store_tokens([FakeShard(("fine", "half \ud83d"), 3)], get_encoding("bytes"))


# Is killed before it encodes a shard, or when a file of ids is written but does not have its name yet.
KILLED_RUN = """
import os, pathlib, signal, sys
import datasets
datasets.config.HF_DATASETS_CACHE = pathlib.Path(sys.argv[1])
from gpt_kit_hf.data.text import shards
from gpt_kit_hf.data.text.tokens import token_cache
from gpt_kit_hf.storage import atomic_files
from gpt_kit_hf.tokenization.encodings import get_encoding
shards.SHARD_BYTES = 401
files = [pathlib.Path(file) for file in sys.argv[4:]]
found = shards.file_shards(files, column="text", separator=None, may_cut=True)
place, name = sys.argv[2].split()
module = atomic_files if name == "write_synced" else token_cache
inner, calls = getattr(module, name), []

def deadly(*arguments):
    # A shard or a file of ids: not a note of a content key.
    calls.extend([1] * (name == "_encode_shard" or ".arrow" in str(arguments)))
    if len(calls) <= int(place):
        return inner(*arguments)
    if name == "write_synced":
        inner(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, name, deadly)
token_cache.store_tokens(found, get_encoding("bytes"), int(sys.argv[3]))
"""


@pytest.mark.parametrize(("killed_at", "name", "num_proc"), [(4, "write_synced", 1), (5, "_encode_shard", 3)])
def test_a_killed_run_continues_to_the_same_ids(
    killed_at: int, name: str, num_proc: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, texts = get_encoding("bytes"), [random_text(seed, words=80) for seed in range(9)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    files = sorted(tmp_path.glob("*.txt"))
    arguments = [str(tmp_path / "cache"), f"{killed_at} {name}", str(num_proc), *map(str, files)]
    ended = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], check=False, timeout=100)
    assert ended.returncode == KILLED
    kept = len(list(cache.glob("*.arrow")))
    assert killed_at - num_proc < kept <= killed_at
    assert name != "write_synced" or list(cache.glob(".*")), "the file that was being written has no name yet"
    continued = store_tokens(shards_in(*files), encoding, num_proc)
    assert continued.made == 9 - kept
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    uninterrupted = store_tokens(shards_in(*files), encoding)
    assert uninterrupted.made == 9
    assert continued.key == uninterrupted.key
    assert_stored(continued, encoding, texts)
    np.testing.assert_array_equal(continued.document_starts, uninterrupted.document_starts)
    for ours, theirs in zip(continued.chunks, uninterrupted.chunks, strict=True):
        assert Path(ours.file).read_bytes() == Path(theirs.file).read_bytes()


# --- reading


def stored_corpus(tmp_path: Path, text: str) -> tuple[list[StoredIds], list[int]]:
    (tmp_path / "corpus.txt").write_text(text)
    stored = store_tokens(shards_in(tmp_path / "corpus.txt"), get_encoding("bytes"))
    return stored.chunks, [*text.encode(), 256]


@pytest.mark.parametrize("seed", range(5))
def test_stored_ids_are_sliced_like_an_array(tmp_path: Path, seed: int) -> None:
    chunks, expected = stored_corpus(tmp_path, random_text(seed))
    rng = np.random.default_rng(seed)
    chunk, array = chunks[1], np.asarray(chunks[1])
    for _ in range(100):
        a, b, c, d = (int(n) for n in rng.integers(-array.size - 9, array.size + 9, size=4))
        np.testing.assert_array_equal(np.asarray(chunk[a:b]), array[a:b])
        np.testing.assert_array_equal(np.asarray(chunk[a:b][c:d]), array[a:b][c:d])
        assert chunk[a:b].size == array[a:b].size
    assert np.asarray(chunk, dtype=np.int64).dtype == np.int64
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(chunk[3:9]))), array[3:9])
    stream = TokenStream(chunks, np.zeros(1, np.int64))
    assert len(stream) == len(expected)
    for _ in range(50):
        start, stop = (int(n) for n in np.sort(rng.integers(0, len(expected) + 1, size=2)))
        assert stream.read(start, stop).tolist() == expected[start:stop]


def test_a_child_process_and_its_parent_read_the_same_ids(tmp_path: Path) -> None:
    """Processes share no file position, and none closes what another reads."""
    chunks, expected = stored_corpus(tmp_path, random_text(3))
    stream = TokenStream(chunks, np.zeros(1, np.int64))

    def read() -> None:
        assert stream.read(0, len(stream)).tolist() == expected

    read()
    assert in_child(read) == 0
    read()


def test_more_files_than_may_be_open_are_read_in_any_order() -> None:
    found = [FakeShard((f"text number {n}",), n) for n in range(170)]
    chunks = store_tokens(found, get_encoding("bytes")).chunks
    assert len({chunk.file for chunk in chunks}) == 170
    rng = random.Random(0)
    own = len(list(Path("/proc/self/fd").iterdir())) - stored_arrays.open_file.cache_info().currsize
    for number in [*range(170), *rng.choices(range(170), k=300)]:
        assert bytes(np.asarray(chunks[number][:-1]).tolist()) == f"text number {number}".encode()
    assert stored_arrays.open_file.cache_info().currsize == 128
    assert len(list(Path("/proc/self/fd").iterdir())) <= own + 128


def test_ids_that_were_read_are_not_kept_in_memory(tmp_path: Path, cache: Path) -> None:
    chunks, expected = stored_corpus(tmp_path, random_text(4, words=2000))
    stream = TokenStream(chunks, np.zeros(1, np.int64))
    assert stream.read(0, len(stream)).tolist() == expected
    assert str(cache) not in Path("/proc/self/maps").read_text()
    # The look does see files that are mapped.
    with pa.memory_map(chunks[0].file):
        assert str(cache) in Path("/proc/self/maps").read_text()
