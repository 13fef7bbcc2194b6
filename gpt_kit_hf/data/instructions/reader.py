"""Reads instruction rows from JSON, JSON Lines, Parquet and datasets; each row comes with its place in the source."""

from __future__ import annotations

import io
import json
import math
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from gpt_kit_hf.data.text.dataset_shards import load_split
from gpt_kit_hf.data.text.formats import COMPRESSIONS
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import RowOptions
from gpt_kit_hf.options.files import find_files

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_MAX_DIGITS = 4300  # Python's own limit for converting an integer
_SPACE = re.compile(r"[ \t\n\r]*")
# Files are decoded with "surrogateescape": these characters stand for bytes that are not UTF-8, and for nothing else.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


class PlacedRow(NamedTuple):
    """A row and its place: file:line where it begins for JSON, "name row 5", counted from 0, for tables."""

    place: str
    row: dict[str, Any]


class BadRow(NamedTuple):
    """A row that is left out: its place, the kind of fault, by which rows are counted, and the reason."""

    place: str
    kind: str
    reason: str


class RowError(DataError):
    """A fault of one row, with its kind; the message names no place, the caller adds it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class SkippedRows:
    """Rows that were left out: `counts` by kind of fault, and the first `keep` rows of each kind.

    `n_read` is the number of all rows, good and bad, that `read_rows` came across.
    """

    def __init__(self, keep: int = 5) -> None:
        self.n_read = 0
        self.counts: Counter[str] = Counter()
        self._keep = keep
        self._first: dict[str, list[BadRow]] = {}

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, row: BadRow) -> None:
        """Count a row."""
        self.counts[row.kind] += 1
        if self.counts[row.kind] <= self._keep:
            self._first.setdefault(row.kind, []).append(row)

    def first(self, kind: str) -> list[BadRow]:
        """Return the first rows of a kind."""
        return list(self._first.get(kind, ()))


def skip_or_raise(row: BadRow, on_bad_row: str, skipped: SkippedRows) -> None:
    """Add a bad row to `skipped` if `on_bad_row` is "skip"; raise DataError with its place otherwise."""
    if on_bad_row != "skip":
        raise DataError(f"{row.place}: {row.reason}")
    skipped.add(row)


def read_rows(options: RowOptions, skipped: SkippedRows | None = None) -> Iterator[PlacedRow]:
    """Yield the rows of all files in order, or of the dataset.

    JSON is read strictly by RFC 8259: a key that occurs twice, NaN, Infinity and a number out of range are faults of
    their row. With on_bad_row="skip" such a row is added to `skipped`; otherwise DataError names file:line or
    file:line:column. DataError is also raised for what cannot be skipped: a file that is empty, cannot be read or
    decompressed, and an array with a syntax error that hides where the next row begins.
    """
    skipped = SkippedRows() if skipped is None else skipped
    for source, items in _sources(options):
        empty = True
        for item in items:
            empty = False
            skipped.n_read += 1
            if isinstance(item, PlacedRow):
                yield item
            else:
                skip_or_raise(item, options.on_bad_row, skipped)
        if empty:
            raise DataError(f"{source}: holds no row")


Found: TypeAlias = Iterator["PlacedRow | BadRow"]


def _sources(options: RowOptions) -> Iterator[tuple[str, Found]]:
    if options.rows is None:
        name = str(options.dataset_name)
        yield (
            f"dataset_name {name!r}",
            _dataset_rows(name, options.dataset_config, options.dataset_train_split or "train"),
        )
        return
    files = find_files(options.rows, "rows")
    readers = [_reader(file) for file in files]  # a wrong name is an error before the first file is read
    for file, reader in zip(files, readers, strict=True):
        yield str(file), reader(file)


def _reader(file: Path) -> Callable[[Path], Found]:
    if _format_suffix(file) in _JSON_SUFFIXES:
        return _json_rows
    if file.suffix == ".parquet":
        return _parquet_rows
    known = ", ".join((*_JSON_SUFFIXES, ".parquet"))
    raise UsageError(f"rows {str(file)!r}: the name must end in one of {known}; the JSON ones may end in .gz or .zst")


def _format_suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


# --- JSON


def _json_rows(file: Path) -> Found:
    """Yield the rows of an array if a .json begins with "[", otherwise of one object a line."""
    try:
        with pa.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix)) as stream:
            buffered = io.BufferedReader(stream, 1 << 20)
            # newline="\n": lines end there only, and a carriage return stays.
            text = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
            empty = True
            for number, line in enumerate(text, start=1):
                if not line.strip(" \t\n\r\v\f"):
                    continue
                if empty and _format_suffix(file) == ".json" and line.lstrip(" \t\n\r").startswith("["):
                    yield from _array_rows(file, number, line + text.read())
                    return
                empty = False
                yield _line_row(file, number, line.rstrip("\r\n"))
            if empty:
                raise DataError(f"{file}: empty or only white space, there is no row")
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {_first_line(error)}") from None


def _line_row(file: Path, number: int, line: str) -> PlacedRow | BadRow:
    place = f"{file}:{number}"
    if not_utf8 := _NOT_UTF8.search(line):
        return _not_utf8_row(place, not_utf8)
    try:
        row, end = _decode_row(line, _skip_space(line, 0), place)
    except json.JSONDecodeError as error:
        reason = f"broken JSON: {error.msg}"
        if number == 1 and line.strip() == "{":
            reason += "; one row is one line here, or the file is an array of rows"
        return BadRow(f"{place}:{error.pos + 1}", "broken JSON", reason)
    rest = _skip_space(line, end)
    if rest < len(line):
        return BadRow(f"{place}:{rest + 1}", "broken JSON", "broken JSON: more text after the row")
    return row


def _array_rows(file: Path, first_line: int, text: str) -> Found:
    """Yield an array's elements; raise DataError if a syntax error hides where the next one begins."""
    line_starts = array("q", (match.end() for match in re.finditer("\n", text)))  # without the first line's

    def place(position: int) -> str:
        return f"{file}:{first_line + bisect_right(line_starts, position)}"

    def unreadable(position: int, reason: str) -> DataError:
        not_utf8 = _NOT_UTF8.match(text, position)
        reason = _not_utf8_row("", not_utf8).reason if not_utf8 else f"broken JSON: {reason}"
        column = position - text.rfind("\n", 0, position)
        hint = "the rest of the array cannot be read, so no row of it can be skipped"
        return DataError(f"{place(position)}:{column}: {reason}; {hint}")

    position = _skip_space(text, text.index("[") + 1)
    more = not text.startswith("]", position)
    while more:
        try:
            row, end = _decode_row(text, position, place(position))
        except json.JSONDecodeError as error:
            raise unreadable(error.pos, error.msg) from None
        yield row
        position = _skip_space(text, end)
        more = text.startswith(",", position)
        if more:
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            raise unreadable(position, "a ',' or the array's ']' must follow a row")
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise DataError(f"{place(rest)}: broken JSON: more text after the array's end")


def _decode_row(text: str, position: int, place: str) -> tuple[PlacedRow | BadRow, int]:
    """Return the row at a position, and its end; raises JSONDecodeError if the end cannot be found."""
    decoder = _StrictDecoder()
    value, end = decoder.raw_decode(text, position)
    if not_utf8 := _NOT_UTF8.search(text, position, end):
        return _not_utf8_row(place, not_utf8), end
    if decoder.faults:
        return BadRow(place, *decoder.faults[0]), end
    if not isinstance(value, dict):
        return BadRow(place, "not an object", f"a row is a JSON object, got {shown(value)}"), end
    return PlacedRow(place, value), end


class _StrictDecoder(json.JSONDecoder):
    """The standard decoder, which also notes what Python accepts and RFC 8259 does not.

    Faults are noted, not raised, so that decoding reaches the end of the row and the next row can be read.
    """

    def __init__(self) -> None:
        super().__init__(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=self._integer,
            parse_float=self._float,
        )
        self.faults: list[tuple[str, str]] = []

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Return the value at `idx` and its end; raises JSONDecodeError."""
        try:
            return super().raw_decode(s, idx)
        except RecursionError:
            raise json.JSONDecodeError("nested too deep", s, idx) from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := _repeated(key for key, _ in pairs):
            self.faults.append(("duplicate key", f"the key {shown(twice[0])} occurs more than once in one object"))
        return dict(pairs)

    def _constant(self, name: str) -> float:
        self.faults.append(("NaN or infinity", f"{name} is no JSON value"))
        return math.nan

    def _integer(self, digits: str) -> int:
        if len(digits) <= _MAX_DIGITS:
            return int(digits)
        self.faults.append(("number out of range", f"an integer of {len(digits)} digits"))
        return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self.faults.append(("NaN or infinity", f"the number {digits:.40} is beyond the largest float"))
        return value


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern also matches nothing
    return match.end()


def _not_utf8_row(place: str, escaped: re.Match[str]) -> BadRow:
    return BadRow(place, "not UTF-8", f"not UTF-8 text (byte 0x{ord(escaped[0]) - 0xDC00:02x})")


# --- Tables


def _parquet_rows(file: Path) -> Found:
    try:
        with pq.ParquetFile(file) as parquet:
            if twice := _repeated(parquet.schema_arrow.names):
                raise DataError(f"{file}: the column {shown(twice[0])} occurs more than once")
            first = 0
            for batch in parquet.iter_batches(batch_size=64):
                yield from _table_rows(str(file), first, batch.num_rows, partial(_batch_row, batch))
                first += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {_first_line(error)}") from None


def _batch_row(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    return row


def _dataset_rows(name: str, config: str | None, split: str) -> Found:
    rows = load_split(f"dataset_name {name!r}", name, config, split)
    yield from _table_rows(name, 0, len(rows), rows.__getitem__)


def _table_rows(name: str, first: int, n_rows: int, row_at: Callable[[int], dict[str, Any]]) -> Found:
    """Yield the rows of a table; each is converted alone, so that an error has a place."""
    for index in range(n_rows):
        place = f"{name} row {first + index}"
        try:
            row = row_at(index)
        except UnicodeDecodeError as error:
            yield BadRow(place, "not UTF-8", f"not UTF-8 text (byte 0x{error.object[error.start]:02x})")
        except (ValueError, OverflowError, pa.ArrowException) as error:
            yield BadRow(place, "unreadable value", f"a value cannot be read: {_first_line(error)}")
        else:
            yield PlacedRow(place, row)


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def shown(value: Any, width: int = 60) -> str:
    """Return a value on one line of at most `width` characters, for a message."""
    if isinstance(value, str):
        value = value[: width + 1]  # before repr, which is slow for 10 MB
    written = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value)}"
    return written if len(written) <= width else written[: width - 3] + "..."
