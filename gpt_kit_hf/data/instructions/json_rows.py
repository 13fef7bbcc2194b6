"""Reads rows of JSON and JSON Lines, strictly by RFC 8259, each with its place."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from gpt_kit_hf.data.instructions.rows import FIELD_NAMES, BadRow, PlacedRow, keys_of, listed, repeated, shown
from gpt_kit_hf.data.text.files.file_types import COMPRESSIONS, likely_encoding, marked_encoding, unmarked_utf16
from gpt_kit_hf.errors import DataError

_MAX_DIGITS = 4300  # Python's own limit for converting an integer
_SPACE = re.compile(r"[ \t\n\r]*")
# Files are decoded with "surrogateescape": these characters stand for bytes that are not UTF-8, and for nothing else.
NOT_UTF8 = re.compile("[\udc80-\udcff]")
# An array of rows; a line of JSON Lines that is another array is a fault of that line.
_ARRAY = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(\{|$)")
# Keys of an object that wraps a list of rows: {"data": [...]}.
_WRAPPERS = (
    *("data", "rows", "examples", "samples", "instances", "items", "records", "dataset"),
    *("train", "validation", "valid", "val", "dev", "test", "eval"),
)
_WRAPPED = re.compile(rf'"({"|".join(_WRAPPERS)})"[ \t]*:[ \t]*(\[|$)')

_TABLE = 'the file is a table, not rows: write it by df.to_json(file, orient="records", lines=True)'
_ONE_LINE = "one row is one line here, without a comma after it, or the file is an array of rows in [ ]"
_NEAR = 1000  # characters around a byte that is not UTF-8, to guess the encoding from

_Found: TypeAlias = Iterator["PlacedRow | BadRow"]


@contextlib.contextmanager
def open_text(file: Path, encoding: str | None = None, newline: str = "\n") -> Iterator[io.TextIOWrapper]:
    """Open a file of text, decompressed, in the encoding of its byte-order mark, the one named, or UTF-8.

    Bytes that are not UTF-8 become lone surrogates ("surrogateescape"); those of no other encoding are a DataError.
    Lines end at line feeds only, and a carriage return stays; newline="" is for CSV.
    """
    codec = encoding
    try:
        with pa.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix.lower())) as stream:
            buffered = io.BufferedReader(stream, 1 << 20)
            codec = marked_encoding(buffered.peek(4)) or encoding or "utf-8"
            if codec == "utf-8" and unmarked_utf16(buffered.peek(2000)):
                raise DataError(f"{file}: {likely_encoding(buffered.peek(2000))}")
            is_utf8 = codecs.lookup(codec).name == "utf-8"
            codec, errors = ("utf-8-sig", "surrogateescape") if is_utf8 else (codec, "strict")
            yield io.TextIOWrapper(buffered, encoding=codec, errors=errors, newline=newline)
    except UnicodeError:
        raise DataError(f"{file}: not text in {codec}: name its encoding by --encoding_of_files") from None
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DataError(f"{file}: cannot be read: {reason}") from None


def json_rows(file: Path, suffix: str, encoding: str | None = None) -> _Found:
    """Yield the rows of an array, also of one within an object such as {"data": [...]}, or of one object a line."""
    with open_text(file, encoding) as text:
        empty = True
        for number, line in enumerate(text, start=1):
            if not line.strip(" \t\n\r\v\f"):
                continue
            if empty and (found := _list_at(file, number, line, text, suffix)) is not None:
                yield from found
                return
            empty = False
            yield _line_row(file, number, line.rstrip("\r\n"))
        if empty:
            raise DataError(f"{file}: empty or only white space, there is no row")


def _list_at(file: Path, number: int, line: str, rest: io.TextIOWrapper, suffix: str) -> _Found | None:
    """Return the rows of a file whose first line begins one list of them, or None if a line is a row."""
    opened = line.lstrip(" \t\n\r")
    if opened.startswith("[") if suffix == ".json" else _ARRAY.match(opened):
        text = line + rest.read()
        return _array_rows(file, number, text, text.index("["))
    if not opened.startswith("{") or (opened.rstrip().endswith("}") and not _WRAPPED.search(opened)):
        return None  # a row
    text = line + rest.read()
    start = _wrapped_list(file, number, text)
    if start is not None:
        return _array_rows(file, number, text, start)
    lines = io.StringIO(text, newline="\n")
    return (
        _line_row(file, at, each.rstrip("\r\n"))
        for at, each in enumerate(lines, start=number)
        if each.strip(" \t\n\r\v\f")
    )


def _wrapped_list(file: Path, first_line: int, text: str) -> int | None:
    """Return where the list of rows begins if the text is an object around one; raises DataError for several."""
    lists: dict[str, int] = {}
    decoder, position = json.JSONDecoder(), text.index("{")
    while not text.startswith("}", position):
        key, start = None, 0
        try:
            key, end = decoder.raw_decode(text, _skip_space(text, position + 1))
            start = _skip_space(text, _skip_space(text, end) + 1)
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            # A fault within the list is reported with its place by reading the rows.
            return start if key in _WRAPPERS and text.startswith("[", start) else None
        if key in FIELD_NAMES:
            return None  # a row
        if key in _WRAPPERS and isinstance(value, list) and any(isinstance(row, dict) for row in value or [{}]):
            lists[key] = start
        position = _skip_space(text, end)
        if not text.startswith((",", "}"), position):
            return None  # broken, or not an object
    if _skip_space(text, position + 1) < len(text):
        return None  # more follows: a row a line
    if len(lists) > 1:
        raise DataError(f"{file}: holds several lists of rows, {listed([*lists])}: write each to a file of its own")
    return next(iter(lists.values()), None)


def _line_row(file: Path, number: int, line: str) -> PlacedRow | BadRow:
    place = f"{file}:{number}"
    if not_utf8 := NOT_UTF8.search(line):
        return not_utf8_row(place, not_utf8)
    try:
        row, end = _decode_row(line, _skip_space(line, 0), place)
    except json.JSONDecodeError as error:
        hint = f"; {_ONE_LINE}" if number == 1 and error.pos >= len(line.rstrip()) else ""
        return BadRow(f"{place}:{error.pos + 1}", "broken JSON", f"broken JSON: {error.msg}{hint}")
    rest = _skip_space(line, end)
    if rest < len(line):
        hint = f", a comma; {_ONE_LINE}" if line[rest:].strip() == "," else ""
        return BadRow(f"{place}:{rest + 1}", "broken JSON", f"broken JSON: more text after the row{hint}")
    return row


def _array_rows(file: Path, first_line: int, text: str, start: int) -> _Found:
    """Yield the elements of the array at `start`; raises DataError if a syntax error hides where the next begins."""
    line_starts = array("q", (match.end() for match in re.finditer("\n", text)))  # without the first line's

    def place(position: int) -> str:
        return f"{file}:{first_line + bisect_right(line_starts, position)}"

    def unreadable(position: int, reason: str) -> DataError:
        not_utf8 = NOT_UTF8.match(text, position)
        reason = not_utf8_row("", not_utf8).reason if not_utf8 else f"broken JSON: {reason}"
        column = position - text.rfind("\n", 0, position)
        hint = "the rest of the array cannot be read, so no row of it can be skipped"
        return DataError(f"{place(position)}:{column}: {reason}; {hint}")

    position = _skip_space(text, start + 1)
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
    if rest < len(text) and not text[:start].strip().startswith("{"):
        raise DataError(f"{place(rest)}: broken JSON: more text after the array's end")


def _decode_row(text: str, position: int, place: str) -> tuple[PlacedRow | BadRow, int]:
    """Return the row at a position, and its end; raises JSONDecodeError if the end cannot be found."""
    decoder = _StrictDecoder()
    value, end = decoder.raw_decode(text, position)
    if not_utf8 := NOT_UTF8.search(text, position, end):
        return not_utf8_row(place, not_utf8), end
    if decoder.faults:
        return BadRow(place, *decoder.faults[0]), end
    if not isinstance(value, dict):
        return BadRow(place, "not an object", f"a row is a JSON object, got {shown(value)}"), end
    if _is_table(value):
        return BadRow(place, "table", f"{keys_of(value)}: {_TABLE}"), end
    return PlacedRow(place, value), end


def _is_table(value: dict[str, Any]) -> bool:
    """Return whether an object is a table as pandas writes it: by columns, by its index, or split."""
    if value.keys() <= {"columns", "index", "data"} and "data" in value:
        return "columns" in value
    columns = list(value.values())
    if not columns or not all(columns):
        return False
    if all(isinstance(column, dict) for column in columns):
        keys = [key for column in columns for key in column]
        return all(key.isdecimal() for key in keys) or all(key.isdecimal() for key in value)
    lists = len(columns) > 1 and all(isinstance(column, list) for column in columns)
    return lists and all(isinstance(each, str | None) for column in columns for each in column)


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
        if twice := repeated(key for key, _ in pairs):
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


def not_utf8_row(place: str, escaped: re.Match[str]) -> BadRow:
    """Return the fault of a row with a byte that is not UTF-8."""
    near = escaped.string[max(0, escaped.start() - _NEAR) : escaped.end() + _NEAR]
    guess = likely_encoding(near.encode("utf-8", "surrogateescape"))
    return BadRow(place, "not UTF-8", f"not UTF-8 text (byte 0x{ord(escaped[0]) - 0xDC00:02x}); {guess}")
