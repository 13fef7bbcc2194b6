"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, TextIO, TypeAlias

from gpt_kit_hf.errors import DataError

_Opened: TypeAlias = Callable[[], AbstractContextManager[TextIO]]
_Quoting: TypeAlias = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
_DELIMITERS = ",;\t|"
_LONGEST_CELL = 2**31 - 1
_DELIMITER_LINE = re.compile(r'"?sep=(.)"?\r?\n?')  # Excel's first line


class TableRow(NamedTuple):
    """The number of the line where a row begins, its cells by column, and what is wrong with it.

    An empty cell is empty text. A row with a fault has the cells that have a column.
    """

    line: int
    cells: dict[str, str]
    fault: str = ""


def table_rows(
    opened: _Opened, label: str, *, tabs: bool, wanted: str = "", faults: bool = False
) -> Iterator[TableRow]:
    """Yield the rows of a CSV file, whose first row names the columns; with `tabs` it is a TSV file.

    `opened` opens it with newline="". A CSV file's delimiter is the one that makes `wanted` a column, or else the one
    that makes the most columns. Quotes of a TSV file that do not enclose cells are text. Raises DataError, with the
    line, for a quote that does not end and, unless `faults` are yielded, for a row of another width.
    """
    quoting: _Quoting = csv.QUOTE_MINIMAL
    if tabs:
        try:
            for _ in _rows(opened, label, "\t", quoting, faults=faults):
                pass
        except DataError:
            quoting = csv.QUOTE_NONE
    with opened() as stream:
        first = stream.readline()
        marked = _DELIMITER_LINE.fullmatch(first)
        delimiter = "\t" if tabs else marked[1] if marked else _delimiter(first, wanted)
    yield from _rows(opened, label, delimiter, quoting, faults=faults, skip=bool(marked) and not tabs)


def _delimiter(header: str, wanted: str) -> str:
    columns = {mark: next(csv.reader([header], delimiter=mark), []) for mark in _DELIMITERS}
    return max(_DELIMITERS, key=lambda mark: (wanted in columns[mark], len(columns[mark])))


def _rows(
    opened: _Opened, label: str, delimiter: str, quoting: _Quoting, *, faults: bool, skip: bool = False
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
                else:
                    fault = _width_fault(len(cells), len(names)) if len(cells) != len(names) else ""
                    if fault and not faults:
                        raise DataError(f"{label}:{line}: {fault}")
                    yield TableRow(line, dict(zip(names, cells, strict=False)), fault)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{label}:{line}: not a row of CSV: {error}") from None


def _checked_names(names: list[str], place: str) -> list[str]:
    if not any(name.strip() for name in names):
        raise DataError(f"{place}: there is no header: the first row must name the columns")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{place}: the column {twice!r} occurs more than once")
    return names


def _width_fault(found: int, wanted: int) -> str:
    cells, columns = (f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((found, "cell"), (wanted, "column")))
    return f"a row of {cells} under {columns}: a cell that holds a delimiter or a line break must be quoted"
