"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TextIO, TypeAlias

from gpt_kit_hf.errors import DataError

_Quoting: TypeAlias = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
_DELIMITERS = ",;\t|"
_LONGEST_CELL = 2**31 - 1
_DELIMITER_LINE = re.compile(r'"?sep=(.)"?\r?\n?')  # Excel's first line


class TableRow(NamedTuple):
    """The number of the line where a row begins, and its cells by column; an empty cell is empty text."""

    line: int
    cells: dict[str, str]


def table_rows(opened: Callable[[], TextIO], label: str, *, tabs: bool, wanted: str = "") -> Iterator[TableRow]:
    """Yield the rows of a CSV file, whose first row names the columns; with `tabs` it is a TSV file.

    `opened` opens it with newline="". A CSV file's delimiter is the one that makes `wanted` a column, or else the one
    that makes the most columns. Quotes of a TSV file that do not enclose cells are text. Raises DataError, with the
    line, for a row of another width and for a quote that does not end.
    """
    quoting: _Quoting = csv.QUOTE_MINIMAL
    if tabs:
        try:
            for _ in _rows(opened, label, "\t", quoting):
                pass
        except DataError:
            quoting = csv.QUOTE_NONE
    with opened() as stream:
        first = stream.readline()
        marked = _DELIMITER_LINE.fullmatch(first)
        delimiter = "\t" if tabs else marked[1] if marked else _delimiter(first, wanted)
    yield from _rows(opened, label, delimiter, quoting, skip=bool(marked) and not tabs)


def _delimiter(header: str, wanted: str) -> str:
    columns = {mark: next(csv.reader([header], delimiter=mark), []) for mark in _DELIMITERS}
    return max(_DELIMITERS, key=lambda mark: (wanted in columns[mark], len(columns[mark])))


def _rows(
    opened: Callable[[], TextIO], label: str, delimiter: str, quoting: _Quoting, *, skip: bool = False
) -> Iterator[TableRow]:
    csv.field_size_limit(_LONGEST_CELL)
    with opened() as stream:
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
        names: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                if skip:
                    skip = False
                elif not cells:  # a blank line
                    pass
                elif names is None:
                    names = _checked_names(cells, f"{label}:{line}")
                elif len(cells) != len(names):
                    raise DataError(f"{label}:{line}: {_width_fault(len(cells), len(names))}")
                else:
                    yield TableRow(line, dict(zip(names, cells, strict=True)))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{label}:{line}: not a row of CSV: {error}") from None


def _checked_names(names: list[str], place: str) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{place}: the column {twice!r} occurs more than once")
    return names


def _width_fault(found: int, wanted: int) -> str:
    cells, columns = (f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((found, "cell"), (wanted, "column")))
    return f"a row of {cells} under {columns}: a cell that holds a delimiter or a line break must be quoted"
