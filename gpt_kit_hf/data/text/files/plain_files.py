"""Files as the readers of shards take them: text in UTF-8, JSON Lines or Parquet.

Archives, CSV, other encodings and pipes are converted once, into the cache of `datasets`, under a name that depends on
their content. What is no text is refused.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from gpt_kit_hf.data.text.files.archives import Member, is_hidden, open_file, tar_members, zip_members
from gpt_kit_hf.data.text.files.file_cache import Index, PlainFile, converted, head_of, spooled, unreadable
from gpt_kit_hf.data.text.files.file_types import (
    COMPRESSED,
    HEAD_BYTES,
    READ_ERRORS,
    ROWS,
    container_of,
    marked_encoding,
    not_text,
    suffixes_of,
)
from gpt_kit_hf.data.text.files.tables import table_rows
from gpt_kit_hf.errors import DataError

_BLOCK = 1 << 20
_DEEPEST = 3  # archives within archives
# An archive that unpacks to more than both is no archive of text, which compresses to a tenth or so.
_MOST_UNPACKED = 64 << 20
_MOST_RATIO = 200
_UTF8 = ("utf-8", "utf-8-sig", "ascii")
_ANOTHER = "name the right encoding by --encoding_of_files, or keep what can be read by --on_bad_text replace"
_BAD_BYTES = "gpt-kit-bad-bytes"
codecs.register_error(_BAD_BYTES, lambda error: ("\udcff", getattr(error, "end", 0)))  # no byte 0xff is in UTF-8
_ARRAY_OF_ROWS = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|$)")
_NAMES_SHOWN = 3
_LONGEST_NAME = 60


@dataclass(frozen=True, kw_only=True)
class FileReading:
    """How files are read: the column of tables, and the codec of text without a byte-order mark (None: UTF-8).

    With `keep_bad`, bytes that are none of the codec become bytes that are not UTF-8, so that the readers of shards
    find them; otherwise they are an error.
    """

    column: str
    encoding: str | None = None
    keep_bad: bool = False

    @property
    def errors(self) -> str:
        """The error handler of decoding."""
        return _BAD_BYTES if self.keep_bad else "strict"

    def codec(self, head: bytes) -> str:
        """Return the codec of a file that begins with `head`."""
        return marked_encoding(head) or (codecs.lookup(self.encoding).name if self.encoding else "utf-8")


def plain_files(files: list[Path], remote: list[PlainFile], reading: FileReading) -> tuple[list[PlainFile], list[str]]:
    """Return the files to read in place of `files` and of the copies of `remote` ones.

    Also returns a line on each of which something was left out or chosen.

    Raises DataError, with what would work, for a file that is no text.
    """
    found: list[PlainFile] = []
    notes: list[str] = []
    for file in files:
        # A shell's "< rows.jsonl" makes /dev/stdin the file itself, whose name tells its form.
        named = file.resolve() if file.is_relative_to("/dev") else file
        place = PlainFile(named, str(named)) if named.is_file() else spooled(file)
        found += _plain(place, reading, notes, 0)
    for place in remote:
        found += _plain(place, reading, notes, 0)
    return found, notes


def _plain(place: PlainFile, reading: FileReading, notes: list[str], depth: int) -> list[PlainFile]:
    how, write = _conversion(place, reading, notes, depth)
    if write is None:
        return [place]
    folder, index = converted(place, how, write)
    if index.note or index.left_out:
        notes.append(f"{place.name}: {index.note or _counts(index)}")
    made = [
        PlainFile(folder / name, f"{place.name}/{member}" if member else place.name) for name, member in index.files
    ]
    if how[0] not in ("tar", "zip"):
        return made
    return [plain for member in made for plain in _plain(member, reading, notes, depth + 1)]


def _conversion(
    place: PlainFile, reading: FileReading, notes: list[str], depth: int
) -> tuple[tuple[object, ...], Callable[[Path], Index] | None]:
    """Return how a file is to be converted, for the name of its copy, and what does it, or None if it is not.

    Raises DataError if it is no text.
    """
    file, label = place
    form, compression = suffixes_of(file.name)
    head = head_of(place, "")
    container = container_of(head)
    if compression == ".gz" and container != "gzip":
        raise DataError(f"{label}: its name ends in .gz, but it is not compressed by gzip: rename it to what it is")
    if container in COMPRESSED:
        _check_compression(label, compression, container)
        head = head_of(place, compression)
        container = container_of(head)
    if form in (".tar", ".zip") or container in ("tar", "zip"):
        kind = container if container in ("tar", "zip") else form[1:]
        if depth == _DEEPEST:
            raise DataError(f"{label}: archives within archives, more than {_DEEPEST} deep: unpack them")
        if kind == "zip" and compression:
            raise DataError(f"{label}: a compressed ZIP archive: decompress it first")
        return (kind, compression), partial(_unpack, place, kind, compression, reading)
    if container is not None:
        raise DataError(f"{label}: compressed twice: decompress it first")
    if form == ".parquet":
        return (), None
    codec = _check_head(head, label, reading)
    if form in ROWS and _ARRAY_OF_ROWS.match(head):
        raise DataError(f"{label}: a JSON array of rows: write one row per line, such as by jq -c '.[]' FILE")
    if form in (".csv", ".tsv"):
        how = (form, compression, codec, reading.errors, reading.column)
        return how, partial(_tabulate, place, form, compression, codec, reading)
    if form not in ROWS and _is_json_lines(head):
        notes.append(
            f"{label}: its lines are JSON and are trained as they stand: rename it to .jsonl to read their text"
        )
    if codec in _UTF8:
        return (), None
    errors = reading.errors
    return (form, compression, codec, errors), partial(_transcode, place, form, compression, codec, errors)


def _is_json_lines(head: bytes) -> bool:
    """Return whether the first two lines are JSON objects."""
    lines = [line for line in head.split(b"\n")[:-1] if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _check_compression(label: str, compression: str, container: str) -> None:
    """Refuse a compressed file whose name does not say so, and a compression that is not read."""
    suffix = COMPRESSED[container]
    if compression == suffix:
        return
    if suffix in (".bz2", ".xz"):
        raise DataError(f"{label}: compressed by {container}, which is read as .tar{suffix} only: decompress it first")
    raise DataError(f"{label}: compressed by {container}, which its name does not say: rename it to end in {suffix}")


def _check_head(head: bytes, label: str, reading: FileReading) -> str:
    """Return the codec of a file that begins with `head`. Raises DataError if that is no text."""
    codec = reading.codec(head)
    reason = None if codec.startswith(("utf-16", "utf-32")) else not_text(head)
    if reason is None and codec not in _UTF8:
        try:
            decoded = codecs.getincrementaldecoder(codec)("replace").decode(head)
        except (UnicodeError, LookupError):  # the decoder of the whole file reports it
            decoded = ""
        reason = not_text(decoded.encode("utf-8", "replace"))
    if reason is not None:
        raise DataError(f"{label}: {reason}")
    return codec


# --- what converts; each writes into `stage` and returns an index


def _unpack(place: PlainFile, kind: str, compression: str, reading: FileReading, stage: Path) -> Index:
    """Write the members of an archive."""
    members = tar_members(place.file, compression) if kind == "tar" else zip_members(place.file, place.name)
    index, room = Index(), max(_MOST_UNPACKED, _MOST_RATIO * place.file.stat().st_size)
    try:
        for name, stream in members:
            reason = "hidden" if is_hidden(name) else "no regular file" if stream is None else ""
            if not reason and stream is not None:
                made = f"{len(index.files):06}{''.join(suffixes_of(name))}"
                size = _write_member(Member(name, stream), stage / made, place.name, reading, room)
                room -= size
                reason = "" if size else "empty"
                if size:
                    index.files.append((made, name))
            if reason:
                index.left_out.setdefault(reason, []).append(name)
    except READ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        archive = "a ZIP archive" if kind == "zip" else "a tar archive"
        raise unreadable(place.name, error, f"be read as {archive}, which may be cut short") from None
    if not index.files:
        raise DataError(f"{place.name}: {_counts(index)}, there is no text to train on")
    return index


def _write_member(member: Member, file: Path, archive: str, reading: FileReading, room: int) -> int:
    """Write a member and return its size; one that is no text is refused at its beginning."""
    assert member.stream is not None
    head, size = member.stream.read(HEAD_BYTES), 0
    if head and container_of(head) is None and not file.name.endswith(".parquet"):
        _check_head(head, f"{archive}/{member.name}", reading)
    with file.open("wb") as target:
        while head:
            size += len(head)
            if size > room:
                raise DataError(
                    f"{archive}: unpacks to more than {_MOST_RATIO} times its size, which archives of text do not: "
                    "unpack it and name the files if it is one"
                )
            target.write(head)
            head = member.stream.read(_BLOCK)
    return size


def _tabulate(place: PlainFile, form: str, compression: str, codec: str, reading: FileReading, stage: Path) -> Index:
    """Write a column of a table as JSON Lines, each row on the line on which it begins in the table."""

    def opened() -> TextIO:
        errors = "surrogateescape" if codec in _UTF8 else reading.errors
        stream = io.BufferedReader(open_file(place.file, compression), _BLOCK)
        return io.TextIOWrapper(stream, "utf-8-sig" if codec in _UTF8 else codec, errors, newline="")

    column, line = reading.column, 1
    found: str | None = None
    with (stage / "rows.jsonl").open("wb") as target, _reported(place, codec):
        for row in table_rows(opened, place.name, tabs=form == ".tsv", wanted=column):
            found = _column_of(row.cells, column, place.name) if found is None else found
            text = row.cells[found]
            if "\0" in text:
                raise DataError(f"{place.name}:{row.line}: a NUL character, so it is no text")
            written = json.dumps({column: text}, ensure_ascii=False).encode("utf-8", "surrogateescape")
            target.write(b"\n" * (row.line - line) + written)
            line = row.line
    if found is None:
        raise DataError(f"{place.name}: holds no row below its header")
    return Index(
        files=[("rows.jsonl", "")],
        note="" if found == column else f"its only column, {found!r}, is the text",
    )


def _column_of(cells: dict[str, str], column: str, label: str) -> str:
    if column in cells:
        return column
    if len(cells) == 1:
        return next(iter(cells))
    raise DataError(f"{label}: no column {column!r} (text_column); its columns: {', '.join(cells)}")


def _transcode(place: PlainFile, form: str, compression: str, codec: str, errors: str, stage: Path) -> Index:
    """Write a file in UTF-8."""
    made = f"text{form}"
    decoder = codecs.getincrementaldecoder(codec)(errors)
    before = 0
    with (stage / made).open("wb") as target, _reported(place, codec):
        stream = open_file(place.file, compression)
        while True:
            block = stream.read(_BLOCK)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = before - held + error.start
                raise DataError(f"{place.name}: not text in {codec} at byte {at:,}; {_ANOTHER}") from None
            target.write(text.encode("utf-8", "surrogateescape"))
            before += len(block)
            if not block:
                return Index(files=[(made, "")])


@contextmanager
def _reported(place: PlainFile, codec: str) -> Iterator[None]:
    """Raise DataError for what decompressing and decoding raise."""
    try:
        yield
    except UnicodeError:
        raise DataError(f"{place.name}: not text in {codec}; {_ANOTHER}") from None
    except READ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise unreadable(place.name, error, "be read") from None


def _counts(index: Index) -> str:
    """Return what was read of an archive and what was left out."""
    read, left = len(index.files), sum(map(len, index.left_out.values()))
    kinds = [
        f"{reason} {', '.join(map(_short, names[:_NAMES_SHOWN]))}{', ...' * (len(names) > _NAMES_SHOWN)}"
        for reason, names in index.left_out.items()
    ]
    return f"{read} member{'s' * (read != 1)} read, {left} left out" + (f" ({'; '.join(kinds)})" if kinds else "")


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"
