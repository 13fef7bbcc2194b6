"""Shards of text files: parts of a corpus, read by themselves, from any position, in chunks that fit in memory."""

from __future__ import annotations

import json
import mmap
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import xxhash

from gpt_kit_hf.data.text.documents import (
    AS_IT_IS,
    NO_COLUMN,
    NOT_A_ROW,
    NOT_UTF8,
    READ,
    SEPARATORS_WITH_CRLF,
    BadTextError,
    DocumentEnds,
    Piece,
    Policy,
    arrow_values,
    check_value,
    document_ends,
    left_out,
    undecodable,
)
from gpt_kit_hf.data.text.files.file_types import likely_encoding
from gpt_kit_hf.data.text.files.spans import FileSpan, raw_blocks
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization.export import EOS_TOKEN

# A shard is read by one worker and cached in one file: large enough that opening it costs little, small enough that
# an interrupted run repeats little.
SHARD_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# A count of each thing found, by the names of `documents`.
Tally: TypeAlias = Counter[str]
# A position in a shard, as JSON.
Position: TypeAlias = Any
# Text, whether it ends a document, and the place after it: the bytes or rows read, and 1 inside a document or the
# number of documents that were read of the row there.
_Read: TypeAlias = Iterator[tuple[str, bool, int, int]]


class TextChunk(NamedTuple):
    """Consecutive text of one document, whether the document ends with it, and the position after it."""

    text: str
    ends_document: bool
    next: Position


@dataclass(frozen=True, kw_only=True)
class FileShard:
    """Consecutive spans of files.

    A text file is one document, or one up to each `separator`; JSON Lines and Parquet files have one per row, in
    `column`. With `may_cut`, a long document comes in several chunks, cut where a token begins in any context. The
    `policy` says what happens to EOS marks in the text and to bad text.
    """

    spans: tuple[FileSpan, ...]
    column: str
    separator: str | None
    may_cut: bool
    policy: Policy = AS_IT_IS

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
            first, last = span.row_group_bytes() if span.form == "parquet" else (span.start, span.stop)
            for block in raw_blocks(span.file, first, last):
                digest.update(block)
        return digest.hexdigest()

    def sketch(self) -> str:
        """Return a digest that usually changes with the text: of the first and last bytes of each span."""
        digest = xxhash.xxh3_128(repr((self.column, self.separator, self.may_cut)).encode())
        for span in self.spans:
            digest.update(repr((span.form, span.start, span.stop, span.file.stat().st_size)).encode())
            digest.update(b"".join(span.ends()))
        return digest.hexdigest()

    def stamp(self) -> str | None:
        """Return the files' inodes and change times, which no user can set; None if a file has just changed.

        While the stamp stays, so does the content key, which is slower to get. Machines that share a file system see
        the same stamp: the number of the device is not in it.
        """
        stats = [span.file.stat() for span in self.spans]
        # A second change within the resolution of the clock would not show.
        if time.time_ns() - max(stat.st_ctime_ns for stat in stats) < 2 * 10**9:
            return None
        changes = [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        return repr((self.column, self.separator, self.may_cut, self.spans, changes))

    def chunks(self, position: Position | None = None, tally: Tally | None = None) -> Iterator[TextChunk]:
        """Yield the text from the start, or from the `next` of an earlier chunk; count in `tally` what is found.

        A position is [span, place in the span, 1 inside a document, or documents read of a row]. Raises DataError
        with the file and the line.
        """
        first, begin, inside = position or [0, -1, 0]
        tally = Counter() if tally is None else tally
        for index in range(first, len(self.spans)):
            span = self.spans[index]
            read = {"text": self._read_text, "jsonl": self._read_lines, "parquet": self._read_rows}[span.form]
            place = begin if index == first and begin >= 0 else 0 if span.form == "parquet" else span.start
            for text, ends, after, within in read(span, place, inside if index == first else 0, tally):
                yield TextChunk(text, ends, [index, after, within])

    def _read_text(self, span: FileSpan, place: int, inside: int, tally: Tally) -> _Read:
        ends = document_ends(self.separator, self.policy.eos_in_text == "split")
        # No chunk of the pending document was yielded yet, by this shard or the one before.
        whole = not inside and (self.separator is not None or place == 0 or place != span.start)
        bad = self._bad_documents(span)
        pieces = ends.pieces(
            span.blocks(place),
            place,
            tally,
            whole=whole,
            ends_file=span.ends_file,
            chunk_bytes=CHUNK_BYTES if self.may_cut else None,
        )
        for piece in pieces:
            if bad and _holds(bad, piece.place):
                tally.update({READ: piece.ends, left_out(NOT_UTF8): piece.ends})
                continue
            text = self._decoded(span, piece, tally)
            if text.strip() or not piece.whole:
                if EOS_TOKEN in text:
                    self.policy.count_marks(text, tally, partial(span.where, piece.place))
                tally[READ] += piece.ends
                if ends.with_crlf is not None:
                    tally[SEPARATORS_WITH_CRLF] += piece.data.count(ends.with_crlf)
                yield text, piece.ends, piece.after, int(not piece.ends)

    def _decoded(self, span: FileSpan, piece: Piece, tally: Tally) -> str:
        if (zero := piece.data.find(0)) >= 0:
            at = piece.place + zero
            raise DataError(f"{span.where(at)}: no text (a NUL byte at offset {at})")
        try:
            return piece.data.decode("utf-8-sig" if piece.place == 0 else "utf-8")
        except UnicodeDecodeError as error:
            # The error does not count a byte order mark.
            at = piece.place + error.start + (len(piece.data) - len(error.object))
            where = f"(byte 0x{error.object[error.start]:02x} at offset {at}); {likely_encoding(bytes(piece.data))}"
            bad = undecodable(f"not UTF-8 text {where}", error.object)
            return self.policy.repair(bad, tally, partial(span.where, at)) or ""

    def _bad_documents(self, span: FileSpan) -> tuple[tuple[int, int], ...]:
        """Return the bounds of the documents in a span's file that are to be left out as they are not UTF-8."""
        if self.policy.on_bad_text != "skip":
            return ()
        stat = span.file.stat()
        ends = document_ends(self.separator, self.policy.eos_in_text == "split")
        return _not_utf8(FileSpan(span.file, 0, stat.st_size, span.shown), stat.st_mtime_ns, ends, self.may_cut)

    def _read_lines(self, span: FileSpan, place: int, inside: int, tally: Tally) -> _Read:
        pending, first = b"", place
        for block in chain(span.blocks(place), [b"\n"]):  # the last line may lack its line break
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                after = place + len(line) + 1
                if line.strip():
                    row = partial(_row_text, line.removeprefix(_BYTE_ORDER_MARK) if place == 0 else line, self.column)
                    skip = inside if place == first else 0
                    for text, done in self.policy.row_documents(row, tally, partial(span.where, place), skip):
                        yield text, True, place if done else after, done
                place = after

    def _read_rows(self, span: FileSpan, place: int, inside: int, tally: Tally) -> _Read:
        file, number, first = span.parquet(self.column), 0, place
        try:
            for batch in file.iter_batches(256, range(span.start, span.stop), columns=[self.column]):
                for value in arrow_values(batch.column(0)):
                    if number >= place:
                        row = partial(check_value, value, f"{self.column!r}")
                        where = partial("{}: row {} from row group {} on".format, span.label, number, span.start)
                        skip = inside if number == first else 0
                        for text, done in self.policy.row_documents(row, tally, where, skip):
                            yield text, True, number if done else number + 1, done
                    number += 1
        except (OSError, pa.ArrowException) as error:
            where_ = f"row {number} from row group {span.start} on"
            raise DataError(f"{span.label}: {where_} cannot be read: {str(error).splitlines()[0]}") from None


def file_shards(
    files: Sequence[Path],
    *,
    column: str,
    separator: str | None,
    may_cut: bool,
    shard_bytes: int | None = None,
    names: Mapping[Path, str] | None = None,
    policy: Policy = AS_IT_IS,
) -> list[FileShard]:
    """Divide files into shards of about `shard_bytes`, by default SHARD_BYTES; the same ones at each call.

    `names` has the names in messages of files that are copies of others.
    """
    shown = names or {}
    limit = shard_bytes or SHARD_BYTES
    ends = document_ends(separator, policy.eos_in_text == "split")
    spans = [span for file in files for span in _spans(file, shown.get(file, ""), column, ends, may_cut, limit)]
    return [
        FileShard(spans=tuple(spans[start:stop]), column=column, separator=separator, may_cut=may_cut, policy=policy)
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


def _spans(file: Path, shown: str, column: str, ends: DocumentEnds, may_cut: bool, limit: int) -> list[FileSpan]:
    """Divide one file where its format allows."""
    size = file.stat().st_size
    whole = FileSpan(file, 0, size, shown)
    if whole.form == "parquet":
        groups = whole.parquet(column).metadata
        sizes = [groups.row_group(index).total_byte_size for index in range(groups.num_row_groups)]
        return [FileSpan(file, *bounds, shown) for bounds in _groups(sizes, limit)]
    ends = document_ends("\n", marks=False) if whole.form == "jsonl" else ends
    if whole.compression or size <= limit or (ends.separator is None and not may_cut):
        return [whole]
    # At most 256 spans per file, or there would be too many files of ids.
    step = max(limit, size // 256)
    cuts = [0]
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while (target := cuts[-1] + step) < size and (cut := ends.cut_after(data, target)) < size:
            cuts.append(cut)
    return [FileSpan(file, first, last, shown) for first, last in pairwise([*cuts, size])]


@lru_cache(maxsize=1024)
def _not_utf8(span: FileSpan, changed: int, ends: DocumentEnds, may_cut: bool) -> tuple[tuple[int, int], ...]:
    """Return the bounds of the documents in a whole text file that are not UTF-8; `changed`: when it was written."""
    found, start, bad, chunk = [], 0, False, CHUNK_BYTES if may_cut else None
    for piece in ends.pieces(span.blocks(0), 0, Counter(), whole=True, ends_file=True, chunk_bytes=chunk):
        try:
            piece.data.decode()
        except UnicodeDecodeError:
            bad = True
        if piece.ends:
            found += [(start, piece.after)] * bad
            start, bad = piece.after, False
    return tuple(found)


def _holds(bounds: Sequence[tuple[int, int]], place: int) -> bool:
    """Return whether a place lies within one of the bounds, which ascend."""
    index = bisect_right(bounds, (place, sys.maxsize)) - 1
    return index >= 0 and place < bounds[index][1]


def _row_text(line: bytes, column: str) -> str:
    """Return the text of a JSON row. Raises BadTextError with the reason."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        repaired = None
        with suppress(BadTextError):
            repaired = _row_text(line.decode("utf-8", "replace").encode(), column)
        reason = f"not UTF-8 text (byte 0x{line[error.start]:02x}); {likely_encoding(line)}"
        raise BadTextError(NOT_UTF8, reason, repaired) from None
    except (ValueError, RecursionError) as error:
        raise BadTextError(NOT_A_ROW, f"not a JSON row: {error}") from None
    if not isinstance(row, dict):
        raise BadTextError(NOT_A_ROW, f"a row must be a JSON object, got {type(row).__name__}")
    if column not in row:
        has = ", ".join(map(repr, row)) or "nothing"
        raise BadTextError(NO_COLUMN, f"no {column!r} (text_column); the row has {has}")
    return check_value(row[column], f"{column!r}")
