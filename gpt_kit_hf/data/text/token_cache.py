"""Token ids of a corpus, made once and kept in Arrow files, and read from there without holding them in memory."""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
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

from gpt_kit_hf.data.text.shards import PIECE_BYTES, TextUnit
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.storage.atomic_files import sync_path
from gpt_kit_hf.tokenization import encodings

_LAYOUT = "ids-3"  # part of every key: another layout is another file
_MOST_OPEN_FILES = 128
_ROWS = b"rows"
_SECONDS_A_DAY = 24 * 60 * 60


@dataclass(frozen=True)
class StoredIds:
    """Ids in a file: as much of an array as reading a slice of it takes.

    Read, not mapped: what a run has once looked at does not stay in its memory.
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
        length = self.size * self.dtype.itemsize
        data = os.pread(_open_file(self.file), length, self.first_byte)
        while len(data) < length and (
            more := os.pread(_open_file(self.file), length - len(data), self.first_byte + len(data))
        ):
            data += more  # one read gives 2 GB at most
        if len(data) < length:
            raise DataError(f"{self.file} was cut short; remove it, and it is made again")
        return np.frombuffer(data, self.dtype).astype(dtype or self.dtype, copy=False)


_open_files: OrderedDict[tuple[int, str], int] = OrderedDict()


def _open_file(name: str) -> int:
    """Return a file's descriptor in this process; the ones not used for longest are closed."""
    key = (os.getpid(), name)
    if key in _open_files:
        _open_files.move_to_end(key)
        return _open_files[key]
    if len(_open_files) >= _MOST_OPEN_FILES:
        os.close(_open_files.popitem(last=False)[1])
    _open_files[key] = os.open(name, os.O_RDONLY)
    return _open_files[key]


def _close_file(name: str) -> None:
    descriptor = _open_files.pop((os.getpid(), name), None)
    if descriptor is not None:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class StoredTokens:
    """The ids of a corpus in pieces, where its documents begin, and what they were made of.

    `key` changes with the text, the vocabulary and the way documents are read. `made` says how many units were
    encoded now; the others were there.
    """

    pieces: list[StoredIds]
    document_starts: npt.NDArray[np.int64]
    key: str
    made: int


def store_tokens(units: Sequence[TextUnit], encoding: tiktoken.Encoding, num_proc: int = 1) -> StoredTokens:
    """Return the ids of all units; those that were encoded before, by a run that was stopped too, are not again.

    `num_proc` threads encode at once: tiktoken works outside Python's lock. Raises DataError for text that cannot be
    read or encoded; what was encoded until then stays.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "gpt-kit-tokens"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.arrow.*"):  # of a process that was killed; one that writes is never that old
        if time.time() - left.stat().st_mtime > _SECONDS_A_DAY:
            left.unlink(missing_ok=True)
    vocabulary = encodings.fingerprint(encoding)
    with ThreadPoolExecutor(num_proc) as pool:
        try:
            keys = list(pool.map(lambda unit: _key(unit, vocabulary, folder), units))
            files = [folder / f"{key}.arrow" for key in keys]
            missing = {file: unit for file, unit in zip(files, units, strict=True) if not _is_whole(file)}
            _encode_all(missing, encoding, pool)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    key = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]
    pieces, starts = _join(files)
    return StoredTokens(pieces=pieces, document_starts=starts, key=key, made=len(missing))


def _key(unit: TextUnit, vocabulary: str, folder: Path) -> str:
    """Return the name that a unit's ids are kept under."""
    stamp = unit.stamp()
    note = None if stamp is None else folder / "seen" / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    content = note.read_text() if note is not None and note.is_file() else ""
    if not content:
        content = unit.content_key()
        if note is not None and stamp == unit.stamp():
            note.parent.mkdir(exist_ok=True)
            _write_at_once(note, lambda stage: stage.write_text(content))
    return hashlib.sha256(f"{_LAYOUT} {vocabulary} {content}".encode()).hexdigest()[:32]


def _encode_all(missing: dict[Path, TextUnit], encoding: tiktoken.Encoding, pool: ThreadPoolExecutor) -> None:
    if not missing:
        return
    began, tokens = time.perf_counter(), 0
    total = sum(unit.size for unit in missing.values())
    jobs = {pool.submit(_encode_unit, unit, encoding, file): unit for file, unit in missing.items()}
    with datasets.utils.tqdm(total=total, unit="B", unit_scale=True, desc="tokenising") as bar:
        for job in as_completed(jobs):
            tokens += job.result()
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):,.0f} tokens/s")
            bar.update(jobs[job].size)


def _encode_unit(unit: TextUnit, encoding: tiktoken.Encoding, file: Path) -> int:
    """Write the ids of a unit, a row for each document or part of one; return how many."""
    end = encoding.encode_single_token(encodings.END_OF_TEXT)
    pieces: list[npt.NDArray[Any]] = []
    waiting: list[tuple[str, bool]] = []
    size, ends = 0, True
    for text, ends, _ in unit.parts():
        waiting.append((text, ends))
        size += len(text)
        if size >= PIECE_BYTES:
            pieces.append(encodings.encode_documents(encoding, waiting, unit.name))
            waiting, size = [], 0
    pieces.append(encodings.encode_documents(encoding, waiting, unit.name))
    ids = np.concatenate(pieces)
    bounds = np.concatenate(([0], np.flatnonzero(ids == end) + 1, [] if ends else [ids.size])).astype(np.int64)
    rows = pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(ids))
    whole = np.ones(len(rows), bool)
    whole[-1:] = ends
    table = pa.table({"input_ids": rows, "ends_document": whole})
    table = table.replace_schema_metadata({_ROWS: str(len(rows))})

    def write(stage: Path) -> None:
        with pa.OSFile(str(stage), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    _write_at_once(file, write)
    _close_file(str(file))  # what lay there before may be open
    return int(ids.size)


def _write_at_once(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file that appears under its name when it is whole."""
    stage = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(stage)
        sync_path(stage)
        stage.replace(file)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise


def _is_whole(file: Path) -> bool:
    """Return whether a file of ids is there and can be read to its end."""
    with suppress(OSError, pa.ArrowException):
        table = _read_table(file)
        # A stream that was cut after its schema reads as one without rows.
        return (table.schema.metadata or {}).get(_ROWS) == str(len(table)).encode()
    return False


def _read_table(file: Path) -> pa.Table:
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def _join(files: Sequence[Path]) -> tuple[list[StoredIds], npt.NDArray[np.int64]]:
    """Return the ids in the files, and where documents begin in all of them together."""
    pieces, starts, total, ended = [], [], 0, True
    for file in files:
        with pa.memory_map(str(file)) as source:
            base = source.read_buffer(1).address
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
            for batch in table.to_batches():
                rows, whole = batch.column("input_ids"), batch.column("ends_document").to_numpy(zero_copy_only=False)
                if not len(rows):
                    continue
                bounds, ids = rows.offsets.to_numpy(), rows.values
                buffer = ids.buffers()[1]
                dtype = np.dtype(ids.type.to_pandas_dtype())
                pieces.append(
                    StoredIds(str(file), buffer.address - base + ids.offset * dtype.itemsize, len(ids), dtype)
                )
                begins = np.concatenate(([ended], whole[:-1]))
                starts.append(total + bounds[:-1][begins])
                total, ended = total + len(ids), bool(whole[-1])
    return pieces, np.concatenate(starts).astype(np.int64) if starts else np.empty(0, np.int64)
