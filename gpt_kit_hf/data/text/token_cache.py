"""The token cache: ids of text shards in Arrow files, encoded once and read without holding them in memory."""

from __future__ import annotations

import functools
import hashlib
import os
import time
import weakref
from collections.abc import Sequence
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
from gpt_kit_hf.data.text.shards import CHUNK_BYTES, FileShard
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.storage.atomic_files import replace_file
from gpt_kit_hf.tokenization import encodings

_LAYOUT = "ids-3"  # in every key, so that another layout of the files is another file
_ROWS = b"rows"
_SECONDS_A_DAY = 24 * 60 * 60


class _OpenFile:
    """A file's descriptor, closed with the last reference to it."""

    def __init__(self, name: str) -> None:
        self.descriptor = os.open(name, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


# Opening a file for each window is slow where the cache lies on a network file system.
_open_file = functools.lru_cache(maxsize=128)(_OpenFile)


@dataclass(frozen=True)
class StoredIds:
    """Ids in a file, sliced and read like an array.

    Read, not memory-mapped: pages that a run has read do not count as its memory.
    """

    file: str
    first_byte: int
    size: int
    dtype: np.dtype[Any]

    def __getitem__(self, wanted: slice) -> StoredIds:
        start, stop, step = wanted.indices(self.size)
        assert step == 1
        return StoredIds(self.file, self.first_byte + start * self.dtype.itemsize, max(0, stop - start), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        file, length, data = _open_file(self.file), self.size * self.dtype.itemsize, b""
        while left := length - len(data):  # one call reads at most 2 GB
            block = os.pread(file.descriptor, left, self.first_byte + len(data))
            if not block:
                raise DataError(f"{self.file} was cut short; remove it, and it is made again")
            data = data + block if data else block
        return np.frombuffer(data, self.dtype).astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True, kw_only=True)
class StoredTokens:
    """The ids of a corpus in consecutive chunks, and the positions where its documents begin.

    `key` changes with the text, the vocabulary and the way documents are read. `made` is the number of shards that
    were encoded now; the others were in the cache.
    """

    chunks: list[StoredIds]
    document_starts: npt.NDArray[np.int64]
    key: str
    made: int


def store_tokens(
    shards: Sequence[FileShard | RowsShard], encoding: tiktoken.Encoding, num_proc: int = 1
) -> StoredTokens:
    """Return the ids of all shards; those in the cache, also of an interrupted run, are not encoded again.

    `num_proc` threads encode at once: tiktoken releases Python's lock. Raises DataError for text that cannot be read
    or encoded; the shards that were encoded before stay in the cache.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "gpt-kit-tokens"
    folder.mkdir(parents=True, exist_ok=True)
    for stage in folder.glob(".*.arrow.*"):  # left by a killed process, if it is that old
        if time.time() - stage.stat().st_mtime > _SECONDS_A_DAY:
            stage.unlink(missing_ok=True)
    vocabulary = encodings.fingerprint(encoding)
    with ThreadPoolExecutor(num_proc) as pool:
        try:
            keys = list(pool.map(lambda shard: _key(shard, vocabulary, folder), shards))
            files = [folder / f"{key}.arrow" for key in keys]
            missing = {file: shard for file, shard in zip(files, shards, strict=True) if not _is_whole(file)}
            _encode_all(missing, encoding, pool)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    key = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]
    chunks, starts = _join(files)
    return StoredTokens(chunks=chunks, document_starts=starts, key=key, made=len(missing))


def _key(shard: FileShard | RowsShard, vocabulary: str, folder: Path) -> str:
    """Return the name of a shard's file; content keys are kept by the shards' stamps."""
    stamp = shard.stamp()
    note = None if stamp is None else folder / "seen" / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    content = note.read_text() if note is not None and note.is_file() else ""
    if not content:
        content = shard.content_key()
        if note is not None and stamp == shard.stamp():
            note.parent.mkdir(exist_ok=True)
            replace_file(note, content)
    return hashlib.sha256(f"{_LAYOUT} {vocabulary} {content}".encode()).hexdigest()[:32]


def _encode_all(
    missing: dict[Path, FileShard | RowsShard], encoding: tiktoken.Encoding, pool: ThreadPoolExecutor
) -> None:
    if not missing:
        return
    began, tokens = time.perf_counter(), 0
    total = sum(shard.size for shard in missing.values())
    jobs = {pool.submit(_encode_shard, shard, encoding, file): shard for file, shard in missing.items()}
    with datasets.utils.tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing") as bar:
        for job in as_completed(jobs):
            tokens += job.result()
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):,.0f} tokens/s")
            bar.update(jobs[job].size)


def _encode_shard(shard: FileShard | RowsShard, encoding: tiktoken.Encoding, file: Path) -> int:
    """Write the ids of a shard, one row per document, of which the last may go on; return the number of ids."""
    end = encoding.encode_single_token(encodings.EOS_TOKEN)
    arrays: list[npt.NDArray[Any]] = []
    pending: list[tuple[str, bool]] = []
    size, ends = 0, True
    for text, ends, _ in shard.chunks():
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
    replace_file(file, sink.getvalue().to_pybytes())
    _open_file.cache_clear()  # a damaged file of this name may be open
    return int(ids.size)


def _is_whole(file: Path) -> bool:
    """Return whether a file of ids exists and is complete."""
    with suppress(OSError, pa.ArrowException), pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
        # A stream that was cut after its schema reads as one without rows.
        return (table.schema.metadata or {}).get(_ROWS) == str(len(table)).encode()
    return False


def _join(files: Sequence[Path]) -> tuple[list[StoredIds], npt.NDArray[np.int64]]:
    """Return the ids in the files, and the positions in all of them together where documents begin."""
    chunks, starts, total, ended = [], [np.empty(0, np.int64)], 0, True
    for file in files:
        with pa.memory_map(str(file)) as source:
            base = source.read_buffer(1).address
            source.seek(0)
            for batch in pa.ipc.open_stream(source):
                rows, whole = batch.column("input_ids"), batch.column("ends_document").to_numpy(zero_copy_only=False)
                if not len(rows):
                    continue
                ids, dtype = rows.values, np.dtype(rows.values.type.to_pandas_dtype())
                first_byte = ids.buffers()[1].address - base + ids.offset * dtype.itemsize
                chunks.append(StoredIds(str(file), first_byte, len(ids), dtype))
                begins = np.concatenate(([ended], whole[:-1]))
                starts.append(total + rows.offsets.to_numpy()[:-1][begins])
                total, ended = total + len(ids), bool(whole[-1])
    return chunks, np.concatenate(starts).astype(np.int64)
