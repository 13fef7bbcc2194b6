"""Instruction rows from JSON, JSON Lines, Parquet and datasets: each with its place, none changed in silence."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gpt_kit_hf.data.text.dataset_shards import load_split
from gpt_kit_hf.data.text.shards import COMPRESSIONS
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import RowOptions
from gpt_kit_hf.options.files import find_files

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
# Python's own bound for the conversion of an integer; more is no number of a row.
_MOST_DIGITS = 4300
_WHITE_SPACE = " \t\n\r"
# Where a file is decoded with "surrogateescape", these stand for bytes that are not UTF-8, and for nothing else.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


class PlacedRow(NamedTuple):
    """A row and where it stands.

    The place is file:line for JSON, where the row begins, and "name row 5", counted from 0, for Parquet and datasets.
    """

    place: str
    row: dict[str, Any]


class BadRow(NamedTuple):
    """A row that was left out: where it stands, the kind of fault, by which rows are counted, and what it is."""

    place: str
    kind: str
    reason: str


class RowError(DataError):
    """A fault of one row, of a kind by which skipped rows are counted; the message has no place yet."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class SkippedRows:
    """Rows that were left out: how many of each kind, and the first ones of each."""

    def __init__(self, keep: int = 5) -> None:
        self.counts: Counter[str] = Counter()
        self._keep = keep
        self._first: dict[str, list[BadRow]] = {}

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, row: BadRow) -> None:
        """Count a row; it is kept as an example where it is among the first of its kind."""
        self.counts[row.kind] += 1
        first = self._first.setdefault(row.kind, [])
        if len(first) < self._keep:
            first.append(row)

    def first(self, kind: str) -> list[BadRow]:
        """Return the first rows of a kind."""
        return list(self._first.get(kind, ()))


OnFault = Callable[[BadRow], None]


def stop_or_skip(on_bad_row: str, skipped: SkippedRows) -> OnFault:
    """Return what is to be done with a bad row: add it to `skipped`, or raise DataError with its place."""
    if on_bad_row == "skip":
        return skipped.add

    def stop(row: BadRow) -> None:
        raise DataError(f"{row.place}: {row.reason}")

    return stop


def read_rows(options: RowOptions, skipped: SkippedRows | None = None) -> Iterator[PlacedRow]:
    """Yield the rows of all files, in their order, or of the dataset.

    JSON is read as RFC 8259 has it: a key that occurs twice, NaN, Infinity and a number too large are faults of their
    row. With on_bad_row="skip" such a row is added to `skipped`. Raises DataError, with file:line or file:line:column,
    at the first fault otherwise; and always for what cannot be left out: a file that is empty, cannot be read or
    unpacked, and an array in which a fault of the syntax hides where the next row begins.
    """
    on_fault = stop_or_skip(options.on_bad_row, SkippedRows() if skipped is None else skipped)
    if options.rows is None:
        yield from _read_dataset(options, on_fault)
        return
    files = find_files(options.rows, "rows")
    readers = [_reader(file) for file in files]  # all names are looked at before the first file is read
    for file, read in zip(files, readers, strict=True):
        found = 0
        for item in read(file):
            found += 1
            if isinstance(item, BadRow):
                on_fault(item)
            else:
                yield item
        if not found:
            raise DataError(f"{file}: holds no row")


Found = Iterator["PlacedRow | BadRow"]


def _reader(file: Path) -> Callable[[Path], Found]:
    if _format_suffix(file) in _JSON_SUFFIXES:
        return _read_json_file
    if file.suffix == ".parquet":
        return _read_parquet
    known = ", ".join((*_JSON_SUFFIXES, ".parquet"))
    raise UsageError(f"rows {str(file)!r}: the name must end in one of {known}; the JSON ones may end in .gz or .zst")


def _format_suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


def _read_json_file(file: Path) -> Found:
    """Yield the rows of an array, or of one object a line; which of the two a .json holds its first character says."""
    try:
        with pa.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix)) as unpacked:
            stream = io.BufferedReader(unpacked, 1 << 20)
            lines = _numbered_lines(stream)
            first = next(lines, None)
            if first is None:
                raise DataError(f"{file}: empty or only white space, there is no row")
            is_array = _format_suffix(file) == ".json" and first[1].lstrip().startswith(b"[")
            if is_array:
                yield from _array_rows(file, first[0], first[1] + stream.read())
                return
            yield from (_line_row(file, number, line) for number, line in _chain(first, lines))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {_first_line(error)}") from None


def _chain(first: tuple[int, bytes], lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield first
    yield from lines


def _numbered_lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank with their number, the first without a byte order mark."""
    for number, line in enumerate(stream, start=1):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield number, content


def _line_row(file: Path, number: int, line: bytes) -> PlacedRow | BadRow:
    place = f"{file}:{number}"
    try:
        text = line.decode().rstrip("\r\n")  # the column of a row that ends too early is on its own line
    except UnicodeDecodeError as error:
        return _not_utf8(place, line[error.start])
    decoder = _StrictDecoder()
    try:
        value, end = decoder.decode(text, _skip_space(text, 0))
    except _SyntaxFault as fault:
        reason = f"broken JSON: {fault.reason}"
        if number == 1 and text.strip() == "{":
            reason += "; one row is one line here, or the file is an array of rows"
        return BadRow(f"{place}:{fault.position + 1}", "broken JSON", reason)
    rest = _skip_space(text, end)
    if rest < len(text):
        return BadRow(f"{place}:{rest + 1}", "broken JSON", "broken JSON: more text after the row")
    return _checked_row(place, value, decoder.faults)


def _array_rows(file: Path, first_line: int, content: bytes) -> Found:
    """Yield an array's elements; raise DataError where the syntax does not tell where the next one begins."""
    text = content.decode(errors="surrogateescape")
    line, line_start = first_line, 0  # of `position`, kept up step by step: counting anew would be quadratic
    counted = 0

    def place(position: int) -> str:
        nonlocal line, line_start, counted
        line += text.count("\n", counted, position)
        line_start = max(line_start, text.rfind("\n", counted, position) + 1)
        counted = position
        return f"{file}:{line}"

    def unreadable(position: int, reason: str) -> DataError:
        where = place(position)
        escaped = _NOT_UTF8.match(text, position)
        reason = f"not UTF-8 text (byte 0x{ord(escaped[0]) - 0xDC00:02x})" if escaped else f"broken JSON: {reason}"
        hint = "; the rest of the array cannot be read, so no row of it can be skipped"
        return DataError(f"{where}:{position - line_start + 1}: {reason}{hint}")

    position = _skip_space(text, _skip_space(text, 0) + 1)
    is_empty = text.startswith("]", position)
    while not is_empty:
        decoder = _StrictDecoder()
        try:
            value, end = decoder.decode(text, position)
        except _SyntaxFault as fault:
            raise unreadable(fault.position, fault.reason) from None
        where = place(position)
        escaped = _NOT_UTF8.search(text, position, end)
        yield _not_utf8(where, ord(escaped[0]) - 0xDC00) if escaped else _checked_row(where, value, decoder.faults)
        position = _skip_space(text, end)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise unreadable(position, "a ',' or the array's ']' must follow a row")
        position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise DataError(f"{place(rest)}: broken JSON: more text after the array's end")


class _SyntaxFault(Exception):  # noqa: N818 (no error to the user: it becomes a BadRow or a DataError)
    """JSON that cannot be read on, and the position of it in the text."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


class _StrictDecoder:
    """The standard library's decoder, which notes what RFC 8259 does not allow and Python does.

    Faults are noted, not raised, so that the decoder comes to the row's end, and the next row can be read.
    """

    def __init__(self) -> None:
        self.faults: list[tuple[str, str]] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int, parse_float=self._float
        )

    def decode(self, text: str, position: int) -> tuple[Any, int]:
        """Return the value at `position` and where it ends."""
        try:
            return self._decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _SyntaxFault(error.pos, error.msg) from None
        except RecursionError:
            raise _SyntaxFault(position, "nested too deep") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self.faults.append(("duplicate key", f"the key {shown(twice)} occurs more than once in one object"))
        return found

    def _constant(self, name: str) -> float:
        self.faults.append(("NaN or infinity", f"{name} is no JSON value"))
        return math.nan

    def _int(self, digits: str) -> int:
        if len(digits) <= _MOST_DIGITS:
            return int(digits)
        self.faults.append(("number out of range", f"an integer of {len(digits)} digits"))
        return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self.faults.append(("NaN or infinity", f"the number {digits:.40} is beyond the largest float"))
        return value


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITE_SPACE:
        position += 1
    return position


def _checked_row(place: str, value: Any, faults: list[tuple[str, str]]) -> PlacedRow | BadRow:
    if faults:
        return BadRow(place, *faults[0])
    if not isinstance(value, dict):
        return BadRow(place, "not an object", f"a row is a JSON object, got {shown(value)}")
    return PlacedRow(place, value)


def _not_utf8(place: str, byte: int) -> BadRow:
    return BadRow(place, "not UTF-8", f"not UTF-8 text (byte 0x{byte:02x})")


def _read_parquet(file: Path) -> Found:
    try:
        with pq.ParquetFile(file) as parquet:
            _check_columns(file, parquet.schema_arrow.names)
            number = 0
            for batch in parquet.iter_batches(batch_size=64):
                for index in range(batch.num_rows):
                    yield _table_row(f"{file} row {number}", partial(_batch_row, batch, index))
                    number += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {_first_line(error)}") from None


def _batch_row(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    return row


def _check_columns(file: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{file}: the column {shown(twice[0])} occurs more than once")


def _read_dataset(options: RowOptions, on_fault: OnFault) -> Iterator[PlacedRow]:
    name = options.dataset_name
    rows = load_split(
        f"dataset_name {name!r}", str(name), options.dataset_config, options.dataset_train_split or "train"
    )
    if not len(rows):
        raise DataError(f"dataset_name {name!r}: holds no row")
    for number in range(len(rows)):
        item = _table_row(f"{name} row {number}", partial(rows.__getitem__, number))
        if isinstance(item, BadRow):
            on_fault(item)
        else:
            yield item


def _table_row(place: str, fetch: Callable[[], dict[str, Any]]) -> PlacedRow | BadRow:
    """Return a row of a table; its values become Python objects one row at a time, so that a fault has a place."""
    try:
        return PlacedRow(place, fetch())
    except UnicodeDecodeError as error:
        return _not_utf8(place, error.object[error.start])
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return BadRow(place, "unreadable value", f"a value cannot be read: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def shown(value: Any, width: int = 60) -> str:
    """Return a value on one line of at most `width` characters, for a message."""
    if isinstance(value, str):
        value = value[: width + 1]  # or a value of 10 MB is written out to be cut
    written = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value)}"
    return written if len(written) <= width else written[: width - 3] + "..."
