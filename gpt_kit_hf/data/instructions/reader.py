"""Reads instruction rows from JSON, CSV, Parquet and datasets; each row comes with its place in the source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from gpt_kit_hf.data.instructions.json_rows import NOT_UTF8, json_rows, not_utf8_row, open_text
from gpt_kit_hf.data.instructions.rows import BadRow, PlacedRow, RowError, repeated, shown, with_columns
from gpt_kit_hf.data.text.dataset_shards import load_split
from gpt_kit_hf.data.text.files.file_types import suffixes_of
from gpt_kit_hf.data.text.files.tables import table_rows
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import RowOptions
from gpt_kit_hf.options.files import find_files

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_TABLE_SUFFIXES = (".csv", ".tsv")
ROW_SUFFIXES = (*_JSON_SUFFIXES, *_TABLE_SUFFIXES, ".parquet")


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
    """Yield the rows of all files in order, or of the dataset, with the columns that `options.columns` maps.

    JSON is read strictly by RFC 8259: a key that occurs twice, NaN, Infinity and a number out of range are faults of
    their row. With on_bad_row="skip" such a row is added to `skipped`; otherwise DataError names file:line or
    file:line:column. DataError is also raised for what cannot be skipped: a file that is empty, cannot be read or
    decompressed, and a syntax error that hides where the next row begins, in an array or a quoted cell.
    """
    skipped = SkippedRows() if skipped is None else skipped
    columns = options.column_of
    for source, items in _sources(options):
        empty = True
        for item in items:
            empty = False
            skipped.n_read += 1
            if isinstance(item, PlacedRow) and columns:
                item = _mapped(item, columns)
            if isinstance(item, PlacedRow):
                yield item
            else:
                skip_or_raise(item, options.on_bad_row, skipped)
        if empty:
            raise DataError(f"{source}: holds no row")


def _mapped(placed: PlacedRow, columns: dict[str, str]) -> PlacedRow | BadRow:
    try:
        return PlacedRow(placed.place, with_columns(placed.row, columns))
    except RowError as error:
        return BadRow(placed.place, error.kind, str(error))


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
    # A wrong name is an error before the first file is read.
    readers = [_reader(file, options.encoding_of_files) for file in files]
    for file, reader in zip(files, readers, strict=True):
        yield str(file), reader(file)


def _reader(file: Path, encoding: str | None) -> Callable[[Path], Found]:
    suffix, compression = suffixes_of(file.name)
    if suffix in _JSON_SUFFIXES:
        return partial(json_rows, suffix=suffix, encoding=encoding)
    if suffix in _TABLE_SUFFIXES:
        return partial(_csv_rows, tabs=suffix == ".tsv", encoding=encoding)
    if suffix == ".parquet" and not compression:
        return _parquet_rows
    if suffix == ".arrow":
        raise UsageError(f"rows {str(file)!r}: a folder that datasets saved is read by --dataset_name {file.parent}")
    raise UsageError(
        f"rows {str(file)!r}: the name must end in one of {', '.join(ROW_SUFFIXES)}; all but .parquet may be followed "
        "by .gz or .zst; plain text is trained on by gpt-kit train"
    )


# --- Tables


def _csv_rows(file: Path, tabs: bool, encoding: str | None) -> Found:
    for row in table_rows(partial(open_text, file, encoding, ""), str(file), tabs=tabs, faults=True):
        place = f"{file}:{row.line}"
        if bad := NOT_UTF8.search("\n".join(row.cells.values())):
            yield not_utf8_row(place, bad)
        elif row.fault:
            yield BadRow(place, "number of cells", row.fault)
        else:
            yield PlacedRow(place, {name.strip(): cell for name, cell in row.cells.items()})


def _parquet_rows(file: Path) -> Found:
    try:
        with pq.ParquetFile(file) as parquet:
            if twice := repeated(parquet.schema_arrow.names):
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
