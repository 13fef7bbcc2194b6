"""Documents: where one ends in plain text, which documents the value of a row holds, and what is left out."""

from __future__ import annotations

import functools
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from gpt_kit_hf.errors import DataError
from gpt_kit_hf.options.data import EosInText, OnBadText
from gpt_kit_hf.tokenization.export import EOS_TOKEN

# What a tally counts, besides `left_out(kind)` and `replaced(kind)`. A document that is left out was read, too.
READ = "documents read"
MARKS_AT_LINE_ENDS = "EOS marks at line ends"
MARKS_IN_TEXT = "EOS marks read as text"
SEPARATORS = "separators"
SEPARATORS_WITH_CRLF = "separators with CRLF line ends"
# Why a text is bad.
NULL, NOT_TEXT, SURROGATE, NOT_UTF8 = "null", "not a string", "half a surrogate", "not UTF-8"
NOT_A_ROW, NO_COLUMN = "not a JSON row", "without the column"

_MARK = EOS_TOKEN.encode()
_ROW_END = re.compile(re.escape(EOS_TOKEN) + r"[ \t]*\r?(?:\n|\Z)")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Before a blank that follows a character other than white space, every vocabulary of this package begins a new token.
# In UTF-8, such a character is printable ASCII, or ends in a byte that ends none of Unicode's longer spaces.
_PLACE = (
    rb"(?:[!-~]|[\x80-\xbf](?<!\xc2\x85)(?<!\xc2\xa0)(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80))%b(?=[ \n])"
)
_SAFE_CUT = re.compile(_PLACE % b"")
# Not between a mark and the end of its line. Within a file that is known only in part, not after any mark.
_SAFE_CUT_BESIDE_MARKS = re.compile(_PLACE % (b"(?<!" + re.escape(_MARK) + b")"))
_SAFE_CUT_IN_LINES = re.compile(_PLACE % (b"(?!(?<=" + re.escape(_MARK) + rb")[ \t]*\r?(?:\n|\Z))"))


def left_out(kind: str) -> str:
    """Return the name under which a tally counts the documents that were left out for being bad in this way."""
    return f"left out: {kind}"


def replaced(kind: str) -> str:
    """Return the name under which a tally counts the characters that were replaced by U+FFFD."""
    return f"replaced: {kind}"


@dataclass(frozen=True)
class Policy:
    """What happens to EOS marks that are written in the text, and to text that is bad."""

    eos_in_text: EosInText = "keep"
    on_bad_text: OnBadText = "stop"

    def effect(self, tally: Counter[str]) -> str:
        """Return what of the policy changed the documents of this tally, "" for none; part of a cache entry's name."""
        bad = any(name.startswith((left_out(""), replaced(""))) for name, count in tally.items() if count)
        split = self.eos_in_text == "split" and tally[MARKS_AT_LINE_ENDS]
        return " eos_in_text=split" * bool(split) + f" on_bad_text={self.on_bad_text}" * bad

    def documents(self, text: str, tally: Counter[str], where: Callable[[], str]) -> list[str]:
        """Return the documents that the text of a row holds: one, unless EOS marks at line ends divide it."""
        found = [text]
        if EOS_TOKEN in text and self.eos_in_text == "split":
            parts = _ROW_END.split(text)
            tally[MARKS_AT_LINE_ENDS] += len(parts) - 1
            found = [part for part in parts if part.strip()] if len(parts) > 1 else parts
        tally[READ] += len(found)
        for document in found:
            self.count_marks(document, tally, where)
        return found

    def count_marks(self, text: str, tally: Counter[str], where: Callable[[], str]) -> None:
        """Count the EOS marks in a text; raise DataError for one if the policy is "error"."""
        if count := text.count(EOS_TOKEN):
            if self.eos_in_text == "error":
                raise DataError(
                    f"{where()}: {EOS_TOKEN} is written in the text (eos_in_text=error); split ends documents there, "
                    "keep reads it as text"
                )
            tally[MARKS_IN_TEXT] += count

    def row_documents(
        self, read: Callable[[], str], tally: Counter[str], where: Callable[[], str], skip: int = 0
    ) -> Iterator[tuple[str, int]]:
        """Yield the documents of a row, without the first `skip`, each with the number read, 0 after the last."""
        tally = Counter() if skip else tally  # the row was counted when its first document was read
        try:
            text: str | None = read()
        except BadTextError as bad:
            text = self.repair(bad, tally, where)
        documents = [] if text is None else self.documents(text, tally, where)
        for number, document in enumerate(documents[skip:], start=skip + 1):
            yield document, number % len(documents)

    def repair(self, bad: BadTextError, tally: Counter[str], where: Callable[[], str]) -> str | None:
        """Return the text with its bad characters replaced, or None if it is left out. Raises DataError to stop."""
        if self.on_bad_text == "stop":
            raise DataError(f"{where()}: {bad}; --on_bad_text skip leaves such text out") from None
        if self.on_bad_text == "replace" and bad.repaired is not None:
            tally[replaced(bad.kind)] += bad.repaired.count("\ufffd") - bad.before
            return bad.repaired
        tally[READ] += 1
        tally[left_out(bad.kind)] += 1
        return None


AS_IT_IS = Policy()


class BadTextError(Exception):
    """A text that is none; `repaired` has U+FFFD in place of what is bad, if only characters are."""

    def __init__(self, kind: str, message: str, repaired: str | None = None, before: int = 0) -> None:
        super().__init__(message)
        self.kind, self.repaired, self.before = kind, repaired, before


def check_value(value: Any, name: str) -> str:
    """Return the value of a row's column `name` if it is text. Raises BadTextError."""
    if value is None:
        raise BadTextError(NULL, f"{name} must be text, got None")
    if isinstance(value, Undecoded):
        raise undecodable(f"{name} is not UTF-8 text", value)
    if not isinstance(value, str):
        raise BadTextError(NOT_TEXT, f"{name} must be text, got {value!r:.60}")
    if (found := _SURROGATES.search(value)) is not None:
        message = f"{name} has a lone surrogate, U+{ord(found[0]):04X}"
        raise BadTextError(SURROGATE, message, _SURROGATES.sub("\ufffd", value), value.count("\ufffd"))
    return value


def undecodable(message: str, data: bytes | bytearray) -> BadTextError:
    """Return the error for bytes that are not UTF-8."""
    return BadTextError(NOT_UTF8, message, data.decode("utf-8", "replace"), data.count(b"\xef\xbf\xbd"))


class Undecoded(bytes):
    """The bytes of an Arrow string that are not UTF-8."""


def arrow_values(column: Any) -> Iterator[Any]:
    """Yield the values of an Arrow column; a string that is not UTF-8 as `Undecoded`."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for value in column:
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                yield Undecoded(value.as_buffer().to_pybytes())


class Piece(NamedTuple):
    """Consecutive bytes of one document, at `place`, and whether the document ends with them, at `after`.

    `whole`: they are the whole document.
    """

    data: bytes | bytearray
    place: int
    after: int
    ends: bool
    whole: bool


@functools.lru_cache(maxsize=64)
def document_ends(separator: str | None, marks: bool) -> DocumentEnds:
    """Return the one object for these rules."""
    return DocumentEnds(separator, marks)


class DocumentEnds:
    """Where documents end in plain text: at each separator, and with `marks` at each EOS mark at the end of a line.

    The line break after a mark belongs to it, and so does a separator after it: neither begins another document.
    """

    def __init__(self, separator: str | None, marks: bool) -> None:
        self.separator = None if separator is None else separator.encode()
        # No mark is left in a document that ends wherever a part of one stands.
        self.marks = marks and (self.separator is None or self.separator not in _MARK)
        at = b"" if self.separator is None else re.escape(self.separator)
        also = rb"[ \t]*?\r?" + at + b"|" if at else b""
        marked = (at + b"|" if at else b"") + b"(?P<mark>" + re.escape(_MARK) + b"(?:" + also + rb"[ \t]*\r?"
        self._separators = re.compile(at) if at else None
        self._inside = re.compile(marked + rb"\n))")
        self._at_end = re.compile(marked + rb"(?:\n|\Z)))")
        # This many bytes at the end of what was read may belong to a separator that is not yet read.
        self.held = len(self.separator or b"x") - 1
        self.with_crlf = None
        if self.separator and b"\n" in self.separator and b"\r" not in self.separator:
            self.with_crlf = self.separator.replace(b"\n", b"\r\n")

    def find(self, data: bytearray, tally: Counter[str], *, more: bool, ends_file: bool) -> list[tuple[int, int]]:
        """Return (end of a document, beginning of the next) for each in the data; `more`: other data follows it."""
        if not self.marks or _MARK not in data:
            spans = [] if self._separators is None else [match.span() for match in self._separators.finditer(data)]
            tally[SEPARATORS] += len(spans)
            return spans
        found: list[tuple[int, int]] = []
        for match in (self._at_end if ends_file and not more else self._inside).finditer(data):
            marked = match["mark"] is not None
            separated = self.separator is not None and (not marked or self.separator in match[0])
            if marked and more and not separated and match.end() > len(data) - self.held:
                break  # a separator may begin here, and is not yet read
            tally[MARKS_AT_LINE_ENDS] += marked
            tally[SEPARATORS] += separated
            found.append(match.span())
        return found

    def safe_cut(self, data: bytearray, searched: int, stop: int) -> int:
        """Return the first place after `searched` where a cut keeps the tokens and the EOS marks, or 0."""
        pattern = _SAFE_CUT_BESIDE_MARKS if self.marks else _SAFE_CUT
        found = pattern.search(data, searched - 1, max(0, stop))
        return found.end() if found else 0

    def cut_after(self, data: mmap.mmap, target: int) -> int:
        """Return the first place after `target` where a document ends, or, without a separator, a cut is safe."""
        mark = self.separator
        if mark is None:
            found = (_SAFE_CUT_IN_LINES if self.marks else _SAFE_CUT).search(data, target - 1)
            return found.end() if found else len(data)
        place, before = target, len(mark) - 1
        while (place := data.find(mark, place)) >= 0:
            # A separator that begins earlier and overlaps this one is the one that counts.
            if data.find(mark, max(0, place - before), place + before) < 0:
                return place + len(mark)
            place += 1
        return len(data)

    def pieces(
        self,
        blocks: Iterable[bytes],
        place: int,
        tally: Counter[str],
        *,
        whole: bool,
        ends_file: bool,
        chunk_bytes: int | None,
    ) -> Iterator[Piece]:
        """Yield the documents of blocks of bytes from `place` on.

        With `chunk_bytes`, a longer document comes in several pieces. `whole`: a document begins at `place`.
        `ends_file`: the file ends with the last block.
        """
        pending, searched, held = bytearray(), chunk_bytes or 0, self.held
        for block in chain(blocks, (None,)):
            pending += block or b""
            ends = self.find(pending, tally, more=block is not None, ends_file=ends_file)
            begin, data = 0, pending
            for stop, after in [*ends, (len(pending), -1)]:
                data, ended = pending[begin:stop], after >= 0
                # At the first safe place after chunk_bytes, so that the pieces do not depend on where reading began.
                while chunk_bytes and (cut := self.safe_cut(data, searched, len(data) - (0 if ended else held))):
                    yield Piece(data[:cut], place, place + cut, False, False)
                    place, data, whole, searched = place + cut, data[cut:], False, chunk_bytes
                if ended:
                    end = place + len(data) + after - stop
                    yield Piece(data, place, end, True, whole)
                    place, whole, searched, begin = end, True, chunk_bytes or 0, after
            pending = data
            searched = max(chunk_bytes or 0, len(pending) - held)
        if pending:
            ended = ends_file or self.separator is not None
            yield Piece(pending, place, place + len(pending), ended, whole and ended)
