"""The token cache: ids of text shards in Arrow files, encoded once and read without holding them in memory."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiktoken

from gpt_kit_hf.data.text.dataset_shards import RowsShard
from gpt_kit_hf.data.text.documents import Policy
from gpt_kit_hf.data.text.shards import CHUNK_BYTES, FileShard
from gpt_kit_hf.data.text.tokens.stored_arrays import Pieces, StoredIds, open_file
from gpt_kit_hf.data.text.tokens.token_stream import DocumentStarts
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.storage.atomic_files import replace_file
from gpt_kit_hf.text import duration, short
from gpt_kit_hf.tokenization import encodings

_LAYOUT = "ids-3"  # in every key, so that another layout of the files is another file
_ROWS = b"rows"
_SECONDS_A_DAY = 24 * 60 * 60
_LOGGED, _FIRST_LOGGED = 60, 10  # seconds between two lines on the progress, and before the first


@dataclass(frozen=True, kw_only=True)
class StoredTokens:
    """The ids of a corpus in consecutive chunks, and the positions where its documents begin.

    `key` changes with the text, the vocabulary and the way documents are read. `made` is the number of shards that
    were encoded now, to `made_tokens` ids; the others were in the cache. `tally` counts what was found in all of them.
    """

    chunks: list[StoredIds]
    document_starts: DocumentStarts
    key: str
    made: int
    made_tokens: int
    tally: Counter[str]


@dataclass(frozen=True)
class _Entry:
    """A shard's place in the cache.

    `content` digests the text and how it is cut. What was found in the text is kept in `note`. The ids lie under a
    name that depends on the reading policy only where that changed what was read: so a policy that changes nothing
    changes no fingerprint.
    """

    folder: Path
    vocabulary: str
    content: str
    policy: Policy

    @property
    def note(self) -> Path:
        name = hashlib.sha256(f"{self.content} {self.policy}".encode()).hexdigest()[:32]
        return self.folder / "seen" / f"{name}.json"

    def key(self, tally: Counter[str]) -> str:
        effect = self.policy.effect(tally)
        return hashlib.sha256(f"{_LAYOUT} {self.vocabulary} {self.content}{effect}".encode()).hexdigest()[:32]

    def ids(self, tally: Counter[str]) -> Path:
        return self.folder / f"{self.key(tally)}.arrow"

    def tally(self, shard: FileShard | RowsShard) -> Counter[str] | None:
        """Return what was found in the shard if its ids are in the cache."""
        with suppress(OSError, ValueError):
            tally = Counter(json.loads(self.note.read_text()))
            return tally if _is_whole(self.ids(tally)) else None
        if not _is_whole(self.ids(Counter())):
            return None
        tally = Counter()  # ids of a version that kept no notes: EOS marks in the text were text
        for _ in shard.chunks(None, tally):
            pass
        self.keep(tally)
        return tally if not self.policy.effect(tally) else None

    def keep(self, tally: Counter[str]) -> None:
        self.note.parent.mkdir(exist_ok=True)
        replace_file(self.note, json.dumps(dict(tally)))


def cache_folder(named: str | None = None) -> Path:
    """Return the folder of the token cache: the one that an option names, or the one in the cache of `datasets`.

    It is made if it is missing. Raises UsageError if it cannot be.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "gpt-kit-tokens" if named is None else Path(named).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"token_cache_dir {str(folder)!r} cannot be written: {error.strerror}") from None
    return folder


def store_tokens(
    shards: Sequence[FileShard | RowsShard],
    encoding: tiktoken.Encoding,
    num_proc: int = 1,
    folder: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> StoredTokens:
    """Return the ids of all shards; those in the cache, also of an interrupted run, are not encoded again.

    `num_proc` threads encode at once: tiktoken releases Python's lock. `folder` is that of the cache. `log` gets a
    line at the start and on the progress, the first after ten seconds, then every minute. Raises DataError for text
    that cannot be read or encoded; the shards that were encoded before stay in the cache.
    """
    folder = cache_folder() if folder is None else folder
    for stage in folder.glob(".*.arrow.*"):  # left by a killed process, if it is that old
        if time.time() - stage.stat().st_mtime > _SECONDS_A_DAY:
            stage.unlink(missing_ok=True)
    vocabulary = encodings.fingerprint(encoding)
    with ThreadPoolExecutor(num_proc) as pool:
        try:
            contents = pool.map(lambda shard: _content(shard, folder), shards)
            pairs = zip(shards, contents, strict=True)
            entries = [_Entry(folder, vocabulary, content, shard.policy) for shard, content in pairs]
            tallies = dict(zip(entries, pool.map(_Entry.tally, entries, shards), strict=True))
            missing = {e: shard for e, shard in zip(entries, shards, strict=True) if tallies[e] is None}
            encoded, made_tokens = _encode_all(missing, encoding, pool, log)
            found = {**tallies, **encoded}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    each = [(entry, found[entry] or Counter()) for entry in entries]
    key = hashlib.sha256(" ".join(entry.key(tally) for entry, tally in each).encode()).hexdigest()[:16]
    chunks, starts = _join([entry.ids(tally) for entry, tally in each])
    total = sum((tally for _, tally in each), Counter[str]())
    return StoredTokens(
        chunks=chunks, document_starts=starts, key=key, made=len(missing), made_tokens=made_tokens, tally=total
    )


def _content(shard: FileShard | RowsShard, folder: Path) -> str:
    """Return the shard's content key; those of files are kept by the shards' stamps."""
    stamp = shard.stamp()
    note = None if stamp is None else folder / "seen" / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    content = note.read_text() if note is not None and note.is_file() else ""
    if not content:
        content = shard.content_key()
        if note is not None and stamp == shard.stamp():
            note.parent.mkdir(exist_ok=True)
            replace_file(note, content)
    return content


def _encode_all(
    missing: dict[_Entry, FileShard | RowsShard],
    encoding: tiktoken.Encoding,
    pool: ThreadPoolExecutor,
    log: Callable[[str], None] | None,
) -> tuple[dict[_Entry, Counter[str]], int]:
    """Write the ids of the shards; return what was found in each, and the number of ids."""
    found: dict[_Entry, Counter[str]] = {}
    if not missing:
        return found, 0
    began, tokens, done = time.perf_counter(), 0, 0
    said, total = began - _LOGGED + _FIRST_LOGGED, sum(shard.size for shard in missing.values())
    if log is not None:
        log(f"tokenizing {short(total)} bytes")
    jobs = {pool.submit(_encode_shard, shard, encoding, entry): entry for entry, shard in missing.items()}
    with datasets.utils.tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing") as bar:
        for job in as_completed(jobs):
            entry = jobs[job]
            size, found[entry] = job.result()
            tokens, done, now = tokens + size, done + missing[entry].size, time.perf_counter()
            rate = f"{tokens / max(now - began, 1e-9):,.0f} tokens/s"
            bar.set_postfix_str(rate)
            bar.update(missing[entry].size)
            if log is not None and now - said >= _LOGGED:
                left = duration((now - began) * (total - done) / max(1, done))
                log(f"tokenized {done / max(1, total):.0%}, {rate}, {left} left")
                said = now
    return found, tokens


def _encode_shard(
    shard: FileShard | RowsShard, encoding: tiktoken.Encoding, entry: _Entry
) -> tuple[int, Counter[str]]:
    """Write the ids of a shard, one row per document, of which the last may go on.

    Returns the number of ids, and what was found in the text.
    """
    end = encoding.encode_single_token(encodings.EOS_TOKEN)
    arrays: list[npt.NDArray[Any]] = []
    pending: list[tuple[str, bool]] = []
    size, ends, tally = 0, True, Counter[str]()
    for text, ends, _ in shard.chunks(None, tally):
        pending.append((text, ends))
        size += len(text)
        if size >= CHUNK_BYTES:
            arrays.append(encodings.encode_documents(encoding, pending, shard.name))
            pending, size = [], 0
    arrays.append(encodings.encode_documents(encoding, pending, shard.name))
    ids = np.concatenate(arrays)
    bounds = np.concatenate(([0], np.flatnonzero(ids == end) + 1, [] if ends else [ids.size])).astype(np.int64)
    rows = pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(ids))
    whole = np.ones(len(rows), bool)
    whole[-1:] = ends
    table = pa.table({"input_ids": rows, "ends_document": whole}).replace_schema_metadata({_ROWS: str(len(rows))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    replace_file(entry.ids(tally), sink.getvalue().to_pybytes())
    entry.keep(tally)
    open_file.cache_clear()  # a damaged file of this name may be open
    return int(ids.size), tally


def _is_whole(file: Path) -> bool:
    """Return whether a file of ids exists and is complete."""
    with suppress(OSError, pa.ArrowException), pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
        # A stream that was cut after its schema reads as one without rows.
        return (table.schema.metadata or {}).get(_ROWS) == str(len(table)).encode()
    return False


def _join(files: Sequence[Path]) -> tuple[list[StoredIds], DocumentStarts]:
    """Return the ids in the files, and the positions in all of them together where documents begin."""
    chunks: list[StoredIds] = []
    starts: list[StoredIds] = []
    begins, total, ended = [], 0, True
    for file in files:
        with pa.memory_map(str(file)) as source:
            base = source.read_buffer(1).address
            source.seek(0)
            for batch in pa.ipc.open_stream(source):
                rows = batch.column("input_ids")
                if not len(rows):
                    continue
                chunks.append(_stored(file, base, rows.values))
                # The first row may go on from the file before; all but the last end a document.
                starts.append(_stored(file, base, rows.offsets)[int(not ended) : len(rows)])
                begins.append(total)
                total, ended = total + len(rows.values), batch.column("ends_document")[-1].as_py()
    kept = [number for number, each in enumerate(starts) if each.size]
    shift = np.array([begins[number] for number in kept], np.int64)
    return chunks, DocumentStarts(Pieces.whole([starts[number] for number in kept]), shift, shift)


def _stored(file: Path, base: int, values: Any) -> StoredIds:
    """Return where an Arrow array lies in its file, which begins at the address `base`."""
    dtype = np.dtype(values.type.to_pandas_dtype())
    first_byte = values.buffers()[1].address - base + values.offset * dtype.itemsize
    return StoredIds(str(file), first_byte, len(values), dtype)
