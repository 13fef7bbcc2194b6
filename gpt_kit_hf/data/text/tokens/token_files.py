"""Token files of other programs, read where they lie: of nanoGPT, llm.c, Megatron-LM and datatrove.

| Program | Files | Documents |
|---|---|---|
| nanoGPT | .bin: uint16 | end with the end of text |
| llm.c, modded-nanogpt | .bin: 256 int32, which begin with 20240520, 1, number of ids; then uint16 | begin with it |
| the same for Llama 3 | with 20240801, 7; then uint32 | begin with it |
| Megatron-LM | .bin, and .idx that begins with MMIDIDX: a document is one or more sequences | in the index |
| datatrove | .ds, .ds.index: uint64 ends of documents, .ds.metadata: tokenizer, or tokenizer|id bytes | in the index |
"""

from __future__ import annotations

import json
import secrets
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
import xxhash

from gpt_kit_hf.data.text.documents import READ
from gpt_kit_hf.data.text.tokens.stored_arrays import Ints, Pieces, StoredIds
from gpt_kit_hf.data.text.tokens.token_stream import DocumentStarts, TokenStream, join_streams
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.files import find_files
from gpt_kit_hf.storage.atomic_files import replace_file
from gpt_kit_hf.tokenization import encodings

_LAYOUT = "token-files-1"
_BLOCK = 1 << 20
_PAIRS_CHECKED, _HIGH_HALVES = 256, 4  # no vocabulary has more than 2**18 ids
_LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): type of an id
_MEGATRON = b"MMIDIDX\0\0"
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}

# Yields the positions where documents begin, in blocks; takes the id that ends a text.
_Starts = Callable[[int], Iterator[Ints]]


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """A file of ids, with the program whose form it has; `beside` are the files that belong to it."""

    program: str
    ids: StoredIds
    starts: _Starts
    beside: tuple[Path, ...] = ()
    tokenizer: str | None = None

    @property
    def name(self) -> str:
        """The name in messages."""
        return self.ids.file

    def stamp(self) -> str:
        """Return what changes whenever one of the files does."""
        stats = [file.stat() for file in (Path(self.ids.file), *self.beside)]
        changes = [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        return repr((_LAYOUT, self.program, self.ids, self.beside, changes))


def find_token_files(patterns: list[str], option: str = "token_files") -> list[TokenFile]:
    """Return the token files that the patterns name. Raises DataError for one that is none, or is damaged."""
    found = []
    for pattern in patterns:
        named = [file for file in find_files([pattern], option) if file.suffix in (".bin", ".ds")]
        if not named:
            raise DataError(f"{option} {pattern!r}: no file of ids, whose name ends in .bin or .ds")
        found += named
    return [_open(file) for file in dict.fromkeys(found)]


def read_token_files(
    files: list[TokenFile], encoding: tiktoken.Encoding, folder: Path
) -> tuple[TokenStream, str, Counter[str]]:
    """Return the ids, a key that changes with them and with their documents, and the number of documents.

    What a file holds is digested once and kept in `folder`, as are the positions of the documents. Raises DataError
    for an id that the encoding does not have.
    """
    end = encoding.encode_single_token(encodings.EOS_TOKEN)
    streams, keys = [], []
    for file in files:
        seen = _seen(file, end, folder)
        if seen["low"] < 0 or seen["high"] >= encoding.n_vocab:
            wrong = seen["low"] if seen["low"] < 0 else seen["high"]
            raise DataError(
                f"{file.name}: holds the id {wrong}, and the encoding {encoding.name!r} has the ids 0 to "
                f"{encoding.n_vocab - 1}: name the encoding that the file was made with"
            )
        starts = StoredIds(str(_starts_file(folder, seen)), 0, seen["documents"], np.dtype("<i8"))
        none = np.zeros(1, np.int64)
        streams.append(TokenStream([file.ids], DocumentStarts(Pieces.whole([starts]), none, none)))
        keys.append(seen["key"])
    stream = join_streams(streams)
    return stream, xxhash.xxh3_64_hexdigest(" ".join(keys).encode()), Counter({READ: len(stream.document_starts)})


def stated_tokenizer(files: list[TokenFile], option: str = "token_files") -> str | None:
    """Return the name of the tokenizer that the files state, if they do. Raises UsageError if it is not one."""
    names = {file.tokenizer for file in files} - {None}
    if len(names) > 1:
        raise UsageError(f"{option} were made with several tokenizers: {', '.join(sorted(map(str, names)))}")
    return names.pop() if names else None


def describe_files(files: list[TokenFile]) -> list[str]:
    """Return a line on the files of each program, with the tokenizer that they state."""
    counts = Counter((file.program, file.ids.dtype.name, file.tokenizer) for file in files)
    return [
        f"{n:,} token file{'s' * (n != 1)} of {program}, {kind}" + f", made with {tokenizer}" * (tokenizer is not None)
        for (program, kind, tokenizer), n in counts.items()
    ]


# --- the forms


def _open(file: Path) -> TokenFile:
    try:
        if file.suffix == ".ds":
            found = _datatrove(file)
        elif file.with_suffix(".idx").is_file():
            found = _megatron(file, file.with_suffix(".idx"))
        else:
            found = _plain(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if not found.ids.size:
        raise DataError(f"{file}: holds no ids")
    return found


def _plain(file: Path) -> TokenFile:
    with file.open("rb") as stream:
        header = stream.read(12)
    magic, version, count = struct.unpack("<3i", header) if len(header) == 12 else (0, 0, 0)
    if magic in {magic for magic, _ in _LLMC} and (magic, version) not in _LLMC:
        known = ", ".join(f"{version} with {magic}" for magic, version in _LLMC)
        raise DataError(f"{file}: version {version} of llm.c's header with {magic} is not read; known: {known}")
    if (magic, version) not in _LLMC:
        ids = _ids_in(file, "<u2")
        _refuse_wider(ids)
        return TokenFile(program="nanoGPT", ids=ids, starts=partial(_after_ends, ids))
    ids = _ids_in(file, _LLMC[magic, version], first_byte=1024)
    if ids.size != count:
        raise DataError(f"{file}: has {ids.size:,} ids, and its header says {count:,}: it was cut short")
    return TokenFile(program="llm.c", ids=ids, starts=partial(_at_ends, ids))


def _refuse_wider(ids: StoredIds) -> None:
    """Raise DataError for ids of 32 bits that would be read as pairs of 16 bits, the second of which is almost 0."""
    pairs = np.asarray(ids[: 2 * _PAIRS_CHECKED]).reshape(-1, 2) if ids.size >= 2 * _PAIRS_CHECKED else None
    if pairs is not None and pairs[:, 1].max() < _HIGH_HALVES <= pairs[:, 0].max():
        raise DataError(
            f"{ids.file}: holds ids of 32 bits without a header, which are not read: every second number of 16 bits "
            f"is below {_HIGH_HALVES}"
        )


def _megatron(file: Path, index: Path) -> TokenFile:
    with index.open("rb") as stream:
        header = stream.read(34)
    if len(header) < 34 or header[:9] != _MEGATRON:
        raise DataError(f"{index}: no index of Megatron-LM, which begins with MMIDIDX")
    version, code, sequences, documents = struct.unpack("<QBQQ", header[9:])
    if version != 1 or code not in _MEGATRON_TYPES:
        raise DataError(f"{index}: version {version} with ids of type {code} is not read; known: version 1, integers")
    ids, place = _ids_in(file, _MEGATRON_TYPES[code]), 34 + 12 * sequences
    if index.stat().st_size < place + 8 * documents:
        raise DataError(f"{index}: was cut short")
    if not documents:
        raise DataError(f"{index}: counts no documents")
    lengths = StoredIds(str(index), 34, sequences, np.dtype("<i4"))
    firsts = StoredIds(str(index), place, documents, np.dtype("<i8"))
    starts = partial(_of_sequences, ids.size, lengths, firsts, str(index))
    return TokenFile(program="Megatron-LM", ids=ids, starts=starts, beside=(index,))


def _datatrove(file: Path) -> TokenFile:
    index, side = Path(f"{file}.index"), Path(f"{file}.metadata")
    if Path(f"{file}.loss").exists():
        raise DataError(f"{file}: {file.name}.loss, a mask of the loss, is not read: write without save_loss_metadata")
    if not index.is_file():
        raise DataError(f"{file}: {index.name} is missing, which says where documents end")
    ends = _ids_in(index, "<u8")
    total = int(np.asarray(ends[ends.size - 1 : ends.size])[0]) if ends.size else 0
    width, rest = divmod(file.stat().st_size, max(1, total))
    if rest or width not in (2, 4):
        raise DataError(f"{file}: has {file.stat().st_size:,} bytes for the {total:,} ids that {index.name} counts")
    ids = _ids_in(file, f"<u{width}")
    # Not strictly: a name that cannot be read is shown, and the encoding must be named.
    stated = side.read_text(encoding="utf-8", errors="replace").split("\n")[0] if side.is_file() else ""
    name, bar, size = stated.rpartition("|")
    name = name if bar and size.isdigit() else stated
    known = None if name in ("", "Unknown Tokenizer") else name
    beside = (index, side) if side.is_file() else (index,)
    return TokenFile(
        program="datatrove", ids=ids, starts=partial(_behind, ids.size, ends), beside=beside, tokenizer=known
    )


def _ids_in(file: Path, dtype: str, first_byte: int = 0) -> StoredIds:
    kind = np.dtype(dtype)
    size, rest = divmod(max(0, file.stat().st_size - first_byte), kind.itemsize)
    if rest:
        raise DataError(f"{file}: {rest} bytes more than a whole number of ids of {kind.itemsize} bytes")
    return StoredIds(str(file), first_byte, size, kind)


# --- where documents begin


def _after_ends(ids: StoredIds, end: int) -> Iterator[Ints]:
    """Yield the positions after the end of text, and the first."""
    yield np.zeros(1, np.int64)
    for first, block in _blocks(ids):
        found = np.flatnonzero(block == end) + first + 1
        yield found[found < ids.size]


def _at_ends(ids: StoredIds, end: int) -> Iterator[Ints]:
    """Yield the positions of the end of text, which begins documents here, and the first."""
    yield np.zeros(1, np.int64)
    for first, block in _blocks(ids):
        found = np.flatnonzero(block == end) + first
        yield found[found > 0]


def _behind(size: int, ends: StoredIds, _: int) -> Iterator[Ints]:
    """Yield the ends of all documents but the last, and 0; an empty document has no beginning of its own."""
    last = -1
    for first, block in _blocks(ends):
        starts = np.append(0, block).astype(np.int64) if first == 0 else block.astype(np.int64)
        if (np.diff(starts) < 0).any() or (starts[:1] < last).any():
            raise DataError(f"{ends.file}: the ends of its documents do not ascend")
        fresh = starts[(np.diff(starts, prepend=last) > 0) & (starts < size)]
        last = int(starts[-1])
        yield fresh


def _of_sequences(size: int, lengths: StoredIds, firsts: StoredIds, index: str, _: int) -> Iterator[Ints]:
    """Yield the positions of the sequences that are the first of a document, which has one or more."""
    bounds = np.asarray(firsts).astype(np.int64)
    total, last = 0, -1
    for first, block in _blocks(lengths):
        begins = total + np.append(0, np.cumsum(block, dtype=np.int64))
        inside = bounds[(bounds >= first) & (bounds < first + block.size)]
        starts, total = begins[inside - first], int(begins[-1])
        fresh = starts[(np.diff(starts, prepend=last) > 0) & (starts < size)]
        last = int(fresh[-1]) if fresh.size else last
        yield fresh
    if total != size:
        raise DataError(f"{index}: counts {total:,} ids, and the file beside it has {size:,}")


def _blocks(ids: StoredIds) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    for first in range(0, ids.size, _BLOCK):
        yield first, np.asarray(ids[first : first + _BLOCK])


# --- what a file holds, read once


def _seen(file: TokenFile, end: int, folder: Path) -> dict[str, Any]:
    """Return the key of a file, its lowest and highest id and the number of documents, as kept or found now."""
    note = folder / "seen" / xxhash.xxh3_128_hexdigest(repr((file.stamp(), end)).encode())
    if note.is_file():
        kept: dict[str, Any] = json.loads(note.read_text())
        starts = _starts_file(folder, kept)
        if starts.is_file() and starts.stat().st_size == 8 * kept["documents"]:
            return kept
    stamp = file.stamp()
    digest, low, high = xxhash.xxh3_128(repr((_LAYOUT, file.program, str(file.ids.dtype), end)).encode()), 0, 0
    for _, block in _blocks(file.ids):
        digest.update(block.tobytes())
        low, high = min(low, int(block.min())), max(high, int(block.max()))
    note.parent.mkdir(parents=True, exist_ok=True)
    stage = folder / f".{secrets.token_hex(8)}.starts"
    try:
        documents = 0
        with stage.open("wb") as stream:
            for block in file.starts(end):
                data = block.astype("<i8").tobytes()
                digest.update(data)
                stream.write(data)
                documents += block.size
        seen = {"key": digest.hexdigest(), "low": low, "high": high, "documents": documents}
        stage.replace(_starts_file(folder, seen))
    finally:
        stage.unlink(missing_ok=True)
    # A change within the resolution of the clock would not show in a stamp.
    if stamp == file.stamp() and time.time_ns() - Path(file.ids.file).stat().st_ctime_ns > 2 * 10**9:
        replace_file(note, json.dumps(seen))
    return seen


def _starts_file(folder: Path, seen: dict[str, Any]) -> Path:
    return folder / f"{seen['key']}.starts"
