"""Shards of text files: parts of a corpus, read by themselves, from any position, in chunks that fit in memory."""

from __future__ import annotations

import json
import mmap
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from gpt_kit_hf.data.text.formats import COMPRESSIONS, ROWS, likely_encoding, suffixes_of
from gpt_kit_hf.errors import DataError

# A shard is read by one worker and cached in one file: large enough that opening it costs little, small enough that
# an interrupted run repeats little.
SHARD_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20
_BLOCK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Before a blank that follows a character other than white space, every vocabulary of this package begins a new token.
# In UTF-8, such a character is printable ASCII, or ends in a byte that ends none of Unicode's longer spaces.
_SAFE_CUT = re.compile(
    rb"(?:[!-~]|[\x80-\xbf](?<!\xc2\x85)(?<!\xc2\xa0)(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80))(?=[ \n])"
)

# A position in a shard, as JSON.
Position: TypeAlias = Any
_Read: TypeAlias = Iterator[tuple[str, bool, int]]  # text, whether it ends a document, the place after it


class TextChunk(NamedTuple):
    """Consecutive text of one document, whether the document ends with it, and the position after it."""

    text: str
    ends_document: bool
    next: Position


class FileSpan(NamedTuple):
    """Bytes start..stop-1 of a file, a whole compressed file, or row groups start..stop-1 of a Parquet file.

    `shown` is the file's name in messages if that is another one.
    """

    file: Path
    start: int
    stop: int
    shown: str = ""

    @property
    def label(self) -> str:
        """The name of the file in messages."""
        return self.shown or str(self.file)

    @property
    def compression(self) -> str | None:
        """The compression of the whole file, if any."""
        return COMPRESSIONS.get(suffixes_of(self.file.name)[1])

    @property
    def form(self) -> str:
        """The format of the file: "text", "jsonl" or "parquet"."""
        return ROWS.get(suffixes_of(self.file.name)[0], "text")

    @property
    def is_of_bytes(self) -> bool:
        """Whether start and stop count bytes of the file."""
        return self.compression is None and self.form != "parquet"

    @property
    def size(self) -> int:
        """Its approximate size on the disk, in bytes."""
        return self.stop - self.start if self.is_of_bytes else self.file.stat().st_size


@dataclass(frozen=True, kw_only=True)
class FileShard:
    """Consecutive spans of files.

    A text file is one document, or one up to each `separator`; JSON Lines and Parquet files have one per row, in
    `column`. With `may_cut`, a long document comes in several chunks, cut where a token begins in any context.
    """

    spans: tuple[FileSpan, ...]
    column: str
    separator: str | None
    may_cut: bool

    @property
    def name(self) -> str:
        """The name in error messages: the first and the last file, with the bounds."""
        first, last = self.spans[0], self.spans[-1]
        return f"{first.label}:{first.start} to {Path(last.label).name}:{last.stop}"

    @property
    def size(self) -> int:
        """The approximate size on the disk in bytes, for progress."""
        return sum(span.size for span in self.spans)

    def content_key(self) -> str:
        """Return a digest of the bytes and of how they are read."""
        digest = xxhash.xxh3_128(repr((self.column, self.separator, self.may_cut)).encode())
        for span in self.spans:
            whole, length = not span.is_of_bytes, span.file.stat().st_size
            # The same bytes are other text at the start or the end of a file.
            part = (span.stop - span.start, span.start == 0, span.stop == length)
            place = (span.start, span.stop) if whole else part
            digest.update(repr((span.form, span.compression, length if whole else 0, place)).encode())
            first, last = _row_group_bytes(span) if span.form == "parquet" else (span.start, span.stop)
            for block in _raw_blocks(span.file, first, last):
                digest.update(block)
        return digest.hexdigest()

    def sketch(self) -> str:
        """Return a digest that usually changes with the text: of the first and last bytes of each span."""
        digest = xxhash.xxh3_128(repr((self.column, self.separator, self.may_cut)).encode())
        for span in self.spans:
            size = span.file.stat().st_size
            first, last = (span.start, span.stop) if span.is_of_bytes else (0, size)
            digest.update(repr((span.form, span.start, span.stop, size)).encode())
            for start, stop in ((first, first + _BLOCK // 16), (max(first, last - _BLOCK // 16), last)):
                digest.update(b"".join(_raw_blocks(span.file, start, min(stop, last))))
        return digest.hexdigest()

    def stamp(self) -> str | None:
        """Return the files' inodes and change times, which no user can set; None if a file has just changed.

        While the stamp stays, so does the content key, which is slower to get.
        """
        stats = [span.file.stat() for span in self.spans]
        # A second change within the resolution of the clock would not show.
        if time.time_ns() - max(stat.st_ctime_ns for stat in stats) < 2 * 10**9:
            return None
        changes = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        return repr((self.column, self.separator, self.may_cut, self.spans, changes))

    def chunks(self, position: Position | None = None) -> Iterator[TextChunk]:
        """Yield the text from the start, or from the `next` of an earlier chunk.

        A position is [span, place in the span, 1 inside a document]. Raises DataError with the file and the line.
        """
        first, begin, inside = position or [0, -1, 0]
        for index in range(first, len(self.spans)):
            span = self.spans[index]
            read = {"text": self._read_text, "jsonl": self._read_lines, "parquet": self._read_rows}[span.form]
            place = begin if index == first and begin >= 0 else 0 if span.form == "parquet" else span.start
            for text, ends, after in read(span, place, index == first and bool(inside)):
                yield TextChunk(text, ends, [index, after, int(not ends)])

    def _read_text(self, span: FileSpan, place: int, inside: bool) -> _Read:
        mark = None if self.separator is None else self.separator.encode()
        # `whole`: no chunk of the pending document was yielded yet, by this shard or the one before.
        pending, whole = bytearray(), not inside and (mark is not None or place == 0)
        searched = CHUNK_BYTES
        held = len(mark or b"x") - 1  # this many bytes at the end may begin a separator
        for block in _blocks(span, place):
            pending += block
            *documents, pending = [pending] if mark is None else pending.split(mark)
            for data, ends in [*((document, True) for document in documents), (pending, False)]:
                # At the first safe place after CHUNK_BYTES, so that the chunks do not depend on where reading began.
                while self.may_cut and (cut := _safe_cut(data, searched, len(data) if ends else len(data) - held)):
                    yield from _decoded(span, data[:cut], place, place + cut, ends=False, whole=False)
                    place, data, whole, searched = place + cut, data[cut:], False, CHUNK_BYTES
                if ends:
                    after = place + len(data) + len(mark or b"")
                    yield from _decoded(span, data, place, after, ends=True, whole=whole)
                    place, whole, searched = after, True, CHUNK_BYTES
                pending = data
            searched = max(CHUNK_BYTES, len(pending) - held)
        if pending:
            ends = bool(span.compression) or span.stop == span.file.stat().st_size or mark is not None
            yield from _decoded(span, pending, place, place + len(pending), ends=ends, whole=whole and ends)

    def _read_lines(self, span: FileSpan, place: int, inside: bool) -> _Read:
        assert not inside  # a row is one chunk
        pending = b""
        for block in chain(_blocks(span, place), [b"\n"]):  # the last line may lack its line break
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                if line.strip():
                    try:
                        text = _row_text(line.removeprefix(_BYTE_ORDER_MARK) if place == 0 else line, self.column)
                    except ValueError as error:
                        raise DataError(f"{span.label}:{_line_at(span, place)}: {error}") from None
                    yield text, True, place + len(line) + 1
                place += len(line) + 1

    def _read_rows(self, span: FileSpan, place: int, inside: bool) -> _Read:
        assert not inside  # a row is one chunk
        file, number = _parquet(span, self.column), 0
        try:
            for batch in file.iter_batches(256, range(span.start, span.stop), columns=[self.column]):
                for value in batch.column(0):
                    if number >= place:
                        text = value.as_py()
                        if not isinstance(text, str):
                            where = f"row {number} from row group {span.start} on"
                            raise DataError(f"{span.label}: {where}: {self.column!r} must be text, got {text!r:.60}")
                        yield text, True, number + 1
                    number += 1
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            where = f"row {number} from row group {span.start} on"
            raise DataError(f"{span.label}: {where} cannot be read: {str(error).splitlines()[0]}") from None


def file_shards(
    files: Sequence[Path],
    *,
    column: str,
    separator: str | None,
    may_cut: bool,
    shard_bytes: int | None = None,
    names: Mapping[Path, str] | None = None,
) -> list[FileShard]:
    """Divide files into shards of about `shard_bytes`, by default SHARD_BYTES; the same ones at each call.

    `names` has the names in messages of files that are copies of others.
    """
    shown = names or {}
    limit = shard_bytes or SHARD_BYTES
    spans = [span for file in files for span in _spans(file, shown.get(file, ""), column, separator, may_cut, limit)]
    return [
        FileShard(spans=tuple(spans[start:stop]), column=column, separator=separator, may_cut=may_cut)
        for start, stop in _groups([span.size for span in spans], limit)
        if start < stop
    ]


def _groups(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Return the bounds of consecutive groups that hold at most `limit` together, or a single larger member."""
    bounds, left = [0], limit
    for index, size in enumerate(sizes):
        if index > bounds[-1] and size > left:
            bounds.append(index)
            left = limit
        left -= size
    return [*pairwise([*bounds, len(sizes)])]


def _spans(file: Path, shown: str, column: str, separator: str | None, may_cut: bool, limit: int) -> list[FileSpan]:
    """Divide one file where its format allows."""
    size = file.stat().st_size
    whole = FileSpan(file, 0, size, shown)
    if whole.form == "parquet":
        groups = _parquet(whole, column).metadata
        sizes = [groups.row_group(index).total_byte_size for index in range(groups.num_row_groups)]
        return [FileSpan(file, *bounds, shown) for bounds in _groups(sizes, limit)]
    mark = b"\n" if whole.form == "jsonl" else None if separator is None else separator.encode()
    if whole.compression or size <= limit or (mark is None and not may_cut):
        return [whole]
    # At most 256 spans per file, or there would be too many files of ids.
    step = max(limit, size // 256)
    cuts = [0]
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while (target := cuts[-1] + step) < size and (cut := _cut_after(data, target, mark)) < size:
            cuts.append(cut)
    return [FileSpan(file, first, last, shown) for first, last in pairwise([*cuts, size])]


def _safe_cut(data: bytearray | mmap.mmap, searched: int, stop: int) -> int:
    """Return the first place after `searched` where a cut keeps the tokens of the text, or 0."""
    found = _SAFE_CUT.search(data, searched - 1, max(0, stop))
    return found.end() if found else 0


def _cut_after(data: mmap.mmap, target: int, mark: bytes | None) -> int:
    """Return the first place after `target` where a document ends, or, without a mark, where a cut is safe."""
    if mark is None:
        return _safe_cut(data, target, len(data)) or len(data)
    place, before = target, len(mark) - 1
    while (place := data.find(mark, place)) >= 0:
        # A mark that begins earlier and overlaps this one is the separator.
        if data.find(mark, max(0, place - before), place + before) < 0:
            return place + len(mark)
        place += 1
    return len(data)


def _blocks(span: FileSpan, place: int) -> Iterator[bytes]:
    """Yield the bytes of a span from `place` on, counted after decompression."""
    if span.compression is None:
        yield from _raw_blocks(span.file, place, span.stop)
        return
    try:
        with pa.input_stream(str(span.file), compression=span.compression) as stream:
            while place and (skipped := len(stream.read(min(place, _BLOCK)))):
                place -= skipped
            while block := stream.read(_BLOCK):
                yield block
    except OSError as error:
        raise DataError(f"{span.label}: cannot be decompressed: {error}") from None


def _raw_blocks(file: Path, start: int, stop: int) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            while block := stream.read(max(0, min(stop - start, _BLOCK))):
                start += len(block)
                yield block
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _decoded(span: FileSpan, data: bytearray, place: int, after: int, *, ends: bool, whole: bool) -> _Read:
    """Yield the text of bytes, unless they are a whole document of white space."""
    if (zero := data.find(0)) >= 0:
        where = f"{span.label}:{_line_at(span, place + zero)}"
        raise DataError(f"{where}: no text (a NUL byte at offset {place + zero})")
    try:
        text = data.decode("utf-8-sig" if place == 0 else "utf-8")
    except UnicodeDecodeError as error:
        bad = place + error.start + (len(data) - len(error.object))  # the error does not count a byte order mark
        raise DataError(
            f"{span.label}:{_line_at(span, bad)}: not UTF-8 text (byte 0x{error.object[error.start]:02x} "
            f"at offset {bad}); {likely_encoding(bytes(data))}"
        ) from None
    if text.strip() or not whole:
        yield text, ends, after


def _row_text(line: bytes, column: str) -> str:
    """Return the text of a JSON row. Raises ValueError with the reason."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
        raise ValueError(f"not a JSON row: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, got {type(row).__name__}")
    if column not in row:
        raise ValueError(f"no {column!r} (text_column); the row has {', '.join(map(repr, row)) or 'nothing'}")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{column!r} must be text, got {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{column!r} has a lone surrogate, U+{ord(text[error.start]):04X}") from None
    return text


def _line_at(span: FileSpan, place: int) -> int:
    """Return the number of the line that holds a byte, for an error."""
    line, seen = 1, 0
    for block in _blocks(FileSpan(span.file, 0, span.stop), 0):
        line += block[: max(0, place - seen)].count(b"\n")
        seen += len(block)
        if seen >= place:
            break
    return line


def _parquet(span: FileSpan, column: str) -> Any:
    try:
        opened = pq.ParquetFile(span.file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{span.label}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    if column not in opened.schema_arrow.names:
        known = ", ".join(opened.schema_arrow.names)
        raise DataError(f"{span.label}: no column {column!r} (text_column); its columns: {known}")
    return opened


def _row_group_bytes(span: FileSpan) -> tuple[int, int]:
    """Return the first byte of a span's row groups in a Parquet file, and the byte after the last."""
    groups = pq.ParquetFile(span.file).metadata
    rows = [groups.row_group(number) for number in range(span.start, span.stop)]
    columns = [row_group.column(number) for row_group in rows for number in range(groups.num_columns)]
    firsts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in columns]
    ends = [first + column.total_compressed_size for first, column in zip(firsts, columns, strict=True)]
    return min(firsts, default=0), max(ends, default=0)
