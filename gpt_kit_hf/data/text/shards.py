"""Text in units of work: each can be read by itself, from any place in it, in pieces that fit in memory."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from gpt_kit_hf.errors import DataError

# A unit is what one worker reads and one file of ids holds: large enough that opening it costs nothing, small enough
# that a run that was stopped does little again.
UNIT_BYTES = 4 << 20
PIECE_BYTES = 1 << 20
_BLOCK = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Between a character that is no white space and a blank, the vocabularies known here begin a new token. In UTF-8 that
# is printable ASCII, or the last byte of a longer character that is none of Unicode's spaces.
_SAFE_CUT = re.compile(
    rb"(?:[!-~]|[\x80-\xbf](?<!\xc2\x85)(?<!\xc2\xa0)(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80))(?=[ \n])"
)

# A place in a unit, as JSON.
Position: TypeAlias = Any


class TextPart(NamedTuple):
    """A piece of a document: its text, whether the document ends with it, and where the next one begins."""

    text: str
    ends_document: bool
    next: Position


class ReadableUnit(Protocol):
    """A share of a corpus."""

    @property
    def name(self) -> str:
        """Where it is, for an error."""

    def parts(self, position: Position | None = None) -> Iterator[TextPart]:
        """Yield the text from its beginning, or from a part's `next`."""

    def sketch(self) -> str:
        """Return what usually changes when the text does, without reading all of it."""


class TextUnit(ReadableUnit, Protocol):
    """A share of a corpus that lies on the disk."""

    @property
    def size(self) -> int:
        """About how many bytes it holds, for progress."""

    def content_key(self) -> str:
        """Return what changes when the text does."""

    def stamp(self) -> str | None:
        """Return what changes whenever the files were touched, None if that is not known; cheap, unlike the key."""


class FileSpan(NamedTuple):
    """Bytes start..stop-1 of a file, or all of a compressed one, or the row groups start..stop-1 of Parquet."""

    file: Path
    start: int
    stop: int

    @property
    def compression(self) -> str | None:
        """How the file is compressed as a whole."""
        return COMPRESSIONS.get(self.file.suffix.lower())

    @property
    def is_of_bytes(self) -> bool:
        """Whether start and stop count bytes of the file."""
        return self.compression is None and self.form != "parquet"

    @property
    def form(self) -> str:
        """How documents lie in the file: "text", "jsonl" or "parquet"."""
        name = Path(self.file.stem) if self.compression else self.file
        return {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}.get(
            name.suffix.lower(), "text"
        )


@dataclass(frozen=True, kw_only=True)
class FileUnit:
    """Spans of files that follow each other.

    Text is a document a file, or a document up to each `separator`; JSON Lines and Parquet hold a document a row, in
    `column`. With `may_cut` a long document comes in several parts, cut where a token begins whatever stands around.
    """

    spans: tuple[FileSpan, ...]
    column: str
    separator: str | None
    may_cut: bool

    @property
    def name(self) -> str:
        """Its beginning and its end."""
        first, last = self.spans[0], self.spans[-1]
        return f"{first.file}:{first.start} to {last.file.name}:{last.stop}"

    @property
    def size(self) -> int:
        """About how many bytes it holds: those on the disk."""
        return sum(s.stop - s.start if s.is_of_bytes else s.file.stat().st_size for s in self.spans)

    def content_key(self) -> str:
        """Return a digest of the bytes and of how they are read."""
        digest = xxhash.xxh3_128(repr((self.column, self.separator, self.may_cut)).encode())
        for span in self.spans:
            whole, length = not span.is_of_bytes, span.file.stat().st_size
            # What the same bytes mean: the beginning and the end of a document, and where the next span begins.
            place = (
                (span.start, span.stop) if whole else (span.stop - span.start, span.start == 0, span.stop == length)
            )
            digest.update(repr((span.form, span.compression, length if whole else 0, place)).encode())
            first, last = _row_group_bytes(span) if span.form == "parquet" else (span.start, span.stop)
            for block in _raw_blocks(span.file, first, last):
                digest.update(block)
        return digest.hexdigest()

    def sketch(self) -> str:
        """Return a digest of where each span lies in its file, and of its first and last bytes."""
        digest = xxhash.xxh3_128(repr((self.column, self.separator, self.may_cut)).encode())
        for span in self.spans:
            size = span.file.stat().st_size
            first, last = (span.start, span.stop) if span.is_of_bytes else (0, size)
            digest.update(repr((span.form, span.start, span.stop, size)).encode())
            for start, stop in ((first, first + _BLOCK // 16), (max(first, last - _BLOCK // 16), last)):
                digest.update(b"".join(_raw_blocks(span.file, start, min(stop, last))))
        return digest.hexdigest()

    def stamp(self) -> str | None:
        """Return the files' inodes and times of change, which nobody can set; None if one has only just changed."""
        stats = [span.file.stat() for span in self.spans]
        # A second change within a tick of the clock would not show.
        if time.time_ns() - max(stat.st_ctime_ns for stat in stats) < 2 * 10**9:
            return None
        changes = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        return repr((self.column, self.separator, self.may_cut, self.spans, changes))

    def parts(self, position: Position | None = None) -> Iterator[TextPart]:
        """Yield the text; a position is [span, place in it, 1 if inside a document]. DataError names file and line."""
        first, begin, inside = position or [0, -1, 0]
        for index in range(first, len(self.spans)):
            span = self.spans[index]
            read = {"text": self._text, "jsonl": self._lines, "parquet": self._rows}[span.form]
            place = begin if index == first and begin >= 0 else 0 if span.form == "parquet" else span.start
            for text, ends, after in read(span, place, index == first and bool(inside)):
                yield TextPart(text, ends, [index, after, int(not ends)])

    def _text(self, span: FileSpan, place: int, inside: bool) -> Iterator[tuple[str, bool, int]]:
        mark = None if self.separator is None else self.separator.encode()
        # whole: no part of the document that waits was handed over, by this unit or the one before.
        waiting, whole = bytearray(), not inside and (mark is not None or place == 0)
        searched = PIECE_BYTES
        held = len(mark or b"x") - 1  # so many bytes at the end may begin a mark
        for block in _blocks(span, place):
            waiting += block
            *documents, waiting = [waiting] if mark is None else waiting.split(mark)
            for piece, ends in [*((d, True) for d in documents), (waiting, False)]:
                # At the first place beyond a piece's size, so that the same parts come wherever reading began.
                while self.may_cut and (cut := _safe_cut(piece, searched, len(piece) if ends else len(piece) - held)):
                    yield from self._part(span, piece[:cut], place, place + cut, ends=False, whole=False)
                    place, piece, whole, searched = place + cut, piece[cut:], False, PIECE_BYTES
                if ends:
                    after = place + len(piece) + len(mark or b"")
                    yield from self._part(span, piece, place, after, ends=True, whole=whole)
                    place, whole, searched = after, True, PIECE_BYTES
                waiting = piece
            searched = max(PIECE_BYTES, len(waiting) - held)
        if waiting:
            ends = bool(span.compression) or span.stop == span.file.stat().st_size or mark is not None
            yield from self._part(span, waiting, place, place + len(waiting), ends=ends, whole=whole and ends)

    def _part(
        self, span: FileSpan, data: bytearray, place: int, after: int, *, ends: bool, whole: bool
    ) -> Iterator[tuple[str, bool, int]]:
        try:
            text = data.decode("utf-8-sig" if place == 0 else "utf-8")
        except UnicodeDecodeError as error:
            bad = place + error.start + (len(data) - len(error.object))  # the mark at the beginning is not counted
            raise DataError(
                f"{span.file}:{_line_at(span, bad)}: not UTF-8 text (byte 0x{error.object[error.start]:02x} "
                f"at offset {bad})"
            ) from None
        if text.strip() or not whole:  # blanks inside a document belong to it
            yield text, ends, after

    def _lines(self, span: FileSpan, place: int, inside: bool) -> Iterator[tuple[str, bool, int]]:
        assert not inside  # a row is read as a whole
        waiting = b""
        for block in chain(_blocks(span, place), [b"\n"]):  # the last line may lack its end
            *lines, waiting = (waiting + block).split(b"\n")
            for line in lines:
                if line.strip():
                    yield self._column_of(span, line, place), True, place + len(line) + 1
                place += len(line) + 1

    def _column_of(self, span: FileSpan, line: bytes, place: int) -> str:
        try:
            row = json.loads(line.removeprefix(_BYTE_ORDER_MARK) if place == 0 else line)
        except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
            raise DataError(f"{span.file}:{_line_at(span, place)}: not a JSON row: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(self.column), str):
            raise DataError(f"{span.file}:{_line_at(span, place)}: {_no_text(row, self.column)}")
        text: str = row[self.column]
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"U+{ord(text[error.start]):04X}"
                raise DataError(
                    f"{span.file}:{_line_at(span, place)}: {self.column!r} has half a character, {half}"
                ) from None
        return text

    def _rows(self, span: FileSpan, place: int, inside: bool) -> Iterator[tuple[str, bool, int]]:
        assert not inside  # a row is read as a whole
        file = _parquet(span.file, self.column)
        number = 0
        try:
            for batch in file.iter_batches(256, range(span.start, span.stop), columns=[self.column]):
                for value in batch.column(0):
                    if number >= place:
                        text = value.as_py()
                        if not isinstance(text, str):
                            where = f"row {number} from row group {span.start} on"
                            raise DataError(f"{span.file}: {where}: {self.column!r} must be text, got {text!r:.60}")
                        yield text, True, number + 1
                    number += 1
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            where = f"row {number} from row group {span.start} on"
            raise DataError(f"{span.file}: {where} cannot be read: {str(error).splitlines()[0]}") from None


def file_units(
    files: list[Path], *, column: str, separator: str | None, may_cut: bool, unit_bytes: int | None = None
) -> list[FileUnit]:
    """Cut files into units of about `unit_bytes`, UNIT_BYTES if not given, the same ones at each call."""
    units: list[list[FileSpan]] = [[]]
    room = unit_bytes = unit_bytes or UNIT_BYTES
    for file in files:
        for span in _spans(file, column, separator, may_cut, unit_bytes):
            size = FileUnit(spans=(span,), column=column, separator=separator, may_cut=may_cut).size
            if units[-1] and size > room:
                units.append([])
                room = unit_bytes
            units[-1].append(span)
            room -= size
    made = [FileUnit(spans=tuple(u), column=column, separator=separator, may_cut=may_cut) for u in units if u]
    return made


def _safe_cut(data: bytes | bytearray, searched: int = 1, stop: int | None = None) -> int:
    """Return the first place from `searched` on where text can be cut and keep its tokens, 0 if there is none."""
    found = _SAFE_CUT.search(data, searched - 1, len(data) if stop is None else max(0, stop))
    return found.end() if found else 0


def _spans(file: Path, column: str, separator: str | None, may_cut: bool, unit_bytes: int) -> list[FileSpan]:
    """Cut one file where its form allows."""
    size = file.stat().st_size
    whole = FileSpan(file, 0, size)
    if whole.form == "parquet":
        groups = _parquet(file, column).metadata
        sizes = [groups.row_group(index).total_byte_size for index in range(groups.num_row_groups)]
        firsts, room = [0], unit_bytes
        for index, group in enumerate(sizes):
            if index > firsts[-1] and group > room:
                firsts.append(index)
                room = unit_bytes
            room -= group
        return [FileSpan(file, first, last) for first, last in pairwise([*firsts, len(sizes)])]
    if whole.compression or size <= unit_bytes:
        return [whole]
    mark = b"\n" if whole.form == "jsonl" else None if separator is None else separator.encode()
    if mark is None and not may_cut:
        return [whole]
    # Very large files have larger units, or there would be too many files of ids.
    step = max(unit_bytes, size // 256)
    cuts = [0]
    with file.open("rb") as stream:
        while (target := cuts[-1] + step) < size and (cut := _cut_after(stream, target, mark)) < size:
            cuts.append(cut)
    return [FileSpan(file, first, last) for first, last in pairwise([*cuts, size])]


def _cut_after(stream: BinaryIO, target: int, mark: bytes | None) -> int:
    """Return the first place after `target` where a document ends, or without a mark where a cut is safe."""
    # As many bytes before a block as a mark, or a character before a blank, may begin in.
    before = 4 if mark is None else len(mark) - 1
    begin = max(0, target - before)
    stream.seek(begin)
    data, place = b"", target - begin
    while block := stream.read(_BLOCK):
        data += block
        if mark is None:
            if cut := _safe_cut(data, max(1, place)):
                return begin + cut
        else:
            while (place := data.find(mark, place)) >= 0:
                # A mark that begins earlier and reaches into this one takes its bytes.
                if data.find(mark, max(0, place - before), place + before) < 0:
                    return begin + place + len(mark)
                place += 1
        kept = min(len(data), 2 * before + 1)
        begin, data, place = begin + len(data) - kept, data[len(data) - kept :], kept - before
    return begin + len(data)


def _blocks(span: FileSpan, place: int) -> Iterator[bytes]:
    """Yield the bytes of a span from `place` on, which counts uncompressed ones."""
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
        raise DataError(f"{span.file}: cannot be uncompressed: {error}") from None


def _raw_blocks(file: Path, start: int, stop: int | None) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            left = -1 if stop is None else stop - start
            while block := stream.read(_BLOCK if left < 0 else min(left, _BLOCK)):
                left -= len(block) if left >= 0 else 0
                yield block
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _line_at(span: FileSpan, place: int) -> int:
    """Return the number of the line that holds a byte, for an error."""
    line, seen = 1, 0
    for block in _blocks(FileSpan(span.file, 0, span.stop), 0):
        line += block[: max(0, place - seen)].count(b"\n")
        seen += len(block)
        if seen >= place:
            break
    return line


def _parquet(file: Path, column: str) -> Any:
    try:
        opened = pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    if column not in opened.schema_arrow.names:
        known = ", ".join(opened.schema_arrow.names)
        raise DataError(f"{file}: no column {column!r} (text_column); its columns: {known}")
    return opened


def _row_group_bytes(span: FileSpan) -> tuple[int, int]:
    """Return where in a Parquet file the bytes of a span's row groups begin and end."""
    groups = pq.ParquetFile(span.file).metadata
    columns = [
        groups.row_group(group).column(column)
        for group in range(span.start, span.stop)
        for column in range(groups.num_columns)
    ]
    firsts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in columns]
    ends = [first + column.total_compressed_size for first, column in zip(firsts, columns, strict=True)]
    return min(firsts, default=0), max(ends, default=0)


def _no_text(row: Any, column: str) -> str:
    if not isinstance(row, dict):
        return f"a row must be a JSON object, got {type(row).__name__}"
    if column not in row:
        return f"no {column!r} (text_column); the row has {', '.join(map(repr, row)) or 'nothing'}"
    return f"{column!r} must be text, got {row[column]!r:.60}"
