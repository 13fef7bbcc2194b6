"""Parts of files: their bytes, decompressed, or the row groups of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gpt_kit_hf.data.text.files.file_types import COMPRESSIONS, ROWS, suffixes_of
from gpt_kit_hf.errors import DataError

_BLOCK = 1 << 20


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
    def ends_file(self) -> bool:
        """Whether the file of bytes ends with it."""
        with suppress(OSError):  # reading it reports the error
            return self.compression is not None or self.stop == self.file.stat().st_size
        return True

    @property
    def size(self) -> int:
        """Its approximate size on the disk, in bytes."""
        return self.stop - self.start if self.is_of_bytes else self.file.stat().st_size

    def blocks(self, place: int) -> Iterator[bytes]:
        """Yield the bytes of a span from `place` on, counted after decompression."""
        if self.compression is None:
            yield from raw_blocks(self.file, place, self.stop)
            return
        try:
            with pa.input_stream(str(self.file), compression=self.compression) as stream:
                while place and (skipped := len(stream.read(min(place, _BLOCK)))):
                    place -= skipped
                while block := stream.read(_BLOCK):
                    yield block
        except OSError as error:
            raise DataError(f"{self.label}: cannot be decompressed: {error}") from None

    def ends(self) -> Iterator[bytes]:
        """Yield its first and last bytes, or those of a file that is read as a whole."""
        first, last = (self.start, self.stop) if self.is_of_bytes else (0, self.file.stat().st_size)
        for start, stop in ((first, first + _BLOCK // 16), (max(first, last - _BLOCK // 16), last)):
            yield b"".join(raw_blocks(self.file, start, min(stop, last)))

    def where(self, place: int) -> str:
        """Return the file and the line that holds a byte, for an error."""
        return f"{self.label}:{self._line_at(place)}"

    def parquet(self, column: str) -> Any:
        """Return the opened Parquet file. Raises DataError if it is none, or lacks the column."""
        try:
            opened = pq.ParquetFile(self.file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.label}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        if column not in opened.schema_arrow.names:
            known = ", ".join(opened.schema_arrow.names)
            raise DataError(f"{self.label}: no column {column!r} (text_column); its columns: {known}")
        return opened

    def row_group_bytes(self) -> tuple[int, int]:
        """Return the first byte of the row groups in a Parquet file, and the byte after the last."""
        groups = pq.ParquetFile(self.file).metadata
        rows = [groups.row_group(number) for number in range(self.start, self.stop)]
        columns = [row_group.column(number) for row_group in rows for number in range(groups.num_columns)]
        firsts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in columns]
        ends = [first + column.total_compressed_size for first, column in zip(firsts, columns, strict=True)]
        return min(firsts, default=0), max(ends, default=0)

    def _line_at(self, place: int) -> int:
        """Return the number of the line that holds a byte, for an error."""
        line, seen = 1, 0
        for block in FileSpan(self.file, 0, self.stop).blocks(0):
            line += block[: max(0, place - seen)].count(b"\n")
            seen += len(block)
            if seen >= place:
                break
        return line


def raw_blocks(file: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes start..stop-1 of a file. Raises DataError."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            while block := stream.read(max(0, min(stop - start, _BLOCK))):
                start += len(block)
                yield block
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
