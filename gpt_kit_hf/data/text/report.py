"""What is said about a text before training: its documents, their lengths, and what was left out or is doubtful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import tiktoken

from gpt_kit_hf.data.text.dataset_shards import DatasetShard, RowsShard
from gpt_kit_hf.data.text.documents import (
    MARKS_AT_LINE_ENDS,
    MARKS_IN_TEXT,
    READ,
    SEPARATORS,
    SEPARATORS_WITH_CRLF,
    left_out,
    replaced,
)
from gpt_kit_hf.data.text.shards import FileShard
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.text import escaped
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, begin_of_text

Shards = Sequence[FileShard | RowsShard | DatasetShard]
_WIDTH = 60  # characters of a line that is shown
_ENDS = 200  # tokens at the beginning and at the end of a document in which its first and last line are looked for
_SEARCHED = 64 << 20  # characters in which other separators are looked for
_SAMPLED = 200  # documents of each shard of a stream that are measured
_OTHER_SEPARATORS = (EOS_TOKEN, "\r\n\r\n", "\n\n\n", "\n\n", "</s>", "<eos>", "<|end_of_text|>", "\n---\n", "\f")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was found when a text was read; `used` documents of it became tokens."""

    tally: Counter[str]
    used: int
    warnings: tuple[str, ...] = ()

    @property
    def left_out(self) -> dict[str, int]:
        """The number of documents that were left out, by kind."""
        return _of_kind(self.tally, left_out(""))

    @property
    def replaced(self) -> dict[str, int]:
        """The number of characters that were replaced by U+FFFD, by kind."""
        return _of_kind(self.tally, replaced(""))

    def facts(self) -> dict[str, Any]:
        """Return the counts as JSON; the documents read are those used and those left out."""
        read = self.tally[READ]
        assert read == self.used + sum(self.left_out.values()), (read, self.used, self.left_out)
        counts = {"documents_read": read, "documents_used": self.used, "left_out": self.left_out}
        marks = {"ended_documents": self.tally[MARKS_AT_LINE_ENDS], "read_as_text": self.tally[MARKS_IN_TEXT]}
        return {**counts, "replaced_characters": self.replaced, "eos_in_text": marks}

    def lines(self, options: TextOptions, of: str = "text") -> list[str]:
        """Return log lines about what the text holds besides good documents; none for a text of nothing else."""
        found, tally = [], self.tally
        if gone := sum(self.left_out.values()):
            found.append(f"left out {gone:,} of {tally[READ]:,} documents of the {of}: {_listed(self.left_out)}")
        if self.replaced:
            found.append(f"replaced characters of the {of} by U+FFFD: {_listed(self.replaced)}")
        if marks := [*self._marks(options)]:
            found.append(f"eos      {EOS_TOKEN} in the {of}: {'; '.join(marks)}")
        where = "" if of == "text" else f"{of}: "
        return [*found, *(f"warning  {where}{warning}" for warning in self.warnings)]

    def _marks(self, options: TextOptions) -> Iterator[str]:
        if ended := self.tally[MARKS_AT_LINE_ENDS]:
            yield f"{ended:,} at line ends, which end documents"
        if kept := self.tally[MARKS_IN_TEXT]:
            where = " within lines" if options.eos_in_text == "split" else ""
            separate = "" if options.dataset_name else f" (--document_separator '{EOS_TOKEN}' ends a document at each)"
            yield f"{kept:,}{where}, read as text{separate}"


def _of_kind(tally: Counter[str], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): n for name, n in sorted(tally.items()) if name.startswith(prefix) and n}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


# --- documents


def describe_documents(stream: TokenStream, encoding: tiktoken.Encoding, *, of_ids: bool = False) -> list[str]:
    """Return log lines with the lengths of the documents, and the first and last lines of three of them.

    With `of_ids` the lengths are of all ids: which of them end or begin a text is up to the program that wrote them.
    """
    documents = len(stream.document_starts)
    ends = []
    for number in sorted({0, documents // 2, documents - 1}):
        start, *after = stream.document_starts.read(number, min(number + 2, documents)).tolist()
        stop = after[0] if after else len(stream)
        head = _text(encoding, stream.read(start, min(stop, start + _ENDS)))
        tail = _text(encoding, stream.read(max(start, stop - _ENDS), stop))
        ends.append((number + 1, head, tail))
    added = 0 if of_ids else 1 if begin_of_text(encoding) is None else 2  # EOS, and what a document starts with
    counted = "ids" if of_ids else "tokens"
    # One is counted in the line before.
    lengths = [_lengths(_counted_lengths(stream, added), f"{counted} per document")] if documents > 1 else []
    return [*lengths, *(_shown(*each) for each in ends)]


def describe_stream(shards: Shards, encoding: tiktoken.Encoding, separator: str | None = None) -> list[str]:
    """Return such lines about the first documents of the first, the middle and the last shard of a stream."""
    lengths, shown, tally = [], [], Counter[str]()
    sampled = {number: shards[number] for number in (0, len(shards) // 2, len(shards) - 1)}
    for number, shard in sampled.items():
        with suppress(DataError):  # training reports it
            for index, (text, ends, _) in enumerate(islice(shard.chunks(None, tally), _SAMPLED)):
                if index == 0:
                    shown.append((number + 1, text, text if ends else ""))
                if ends:
                    lengths.append(len(encoding.encode_ordinary(text)))
    measured = f"tokens per document, of {len(lengths):,} document{'s' * (len(lengths) != 1)}"
    return [
        *([_lengths(Counter(lengths), measured)] if lengths else []),
        *(_shown(*each, "shard") for each in shown),
        *(f"warning  {warning}" for warning in separator_warnings(separator, tally, [*sampled.values()])),
    ]


def _counted_lengths(stream: TokenStream, added: int) -> Counter[int]:
    """Return how many documents have each length, without `added` tokens."""
    counted = Counter[int]()
    for starts in stream.document_starts.blocks(len(stream)):
        lengths, counts = np.unique(np.diff(starts) - added, return_counts=True)
        counted.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
    return counted


def _lengths(counted: Counter[int], of: str) -> str:
    lengths = sorted(counted)
    reached = np.cumsum([counted[length] for length in lengths])
    places = [round(share * (int(reached[-1]) - 1)) for share in (0, 0.5, 0.9, 1)]
    low, median, most, high = (lengths[int(np.searchsorted(reached, place, side="right"))] for place in places)
    return f"lengths  {of}: min {low:,}, median {median:,}, 90% up to {most:,}, max {high:,}"


def _shown(number: int, head: str, tail: str, of: str = "document") -> str:
    lines = [[line.strip() for line in text.splitlines() if line.strip()] or [""] for text in (head, tail)]
    first, last = escaped(lines[0][0]), escaped(lines[1][-1])
    first = first if len(first) <= _WIDTH else f"{first[:_WIDTH]}…"
    last = last if len(last) <= _WIDTH else f"…{last[-_WIDTH:]}"
    both = f"'{first}'" if first == last else f"'{first}' to '{last}'"
    return f"shown    {of} {number:,}: {both}"


def _text(encoding: tiktoken.Encoding, ids: Any) -> str:
    end = encoding.encode_single_token(EOS_TOKEN)
    # A character may begin before these tokens or end after them.
    return encoding.decode_bytes([token for token in ids.tolist() if token != end]).decode("utf-8", "ignore")


# --- separators


def separator_warnings(separator: str | None, tally: Counter[str], shards: Shards) -> list[str]:
    """Return a line if a document separator stands nowhere in plain text files, or has other line ends there."""
    files = [shard for shard in shards if isinstance(shard, FileShard) and shard.spans[0].form == "text"]
    if separator is None or not files:
        return []
    if tally[SEPARATORS]:
        if not (crlf := tally[SEPARATORS_WITH_CRLF]):
            return []
        other = separator.replace("\n", "\r\n")
        return [
            f"document_separator {separator!r} does not end documents where lines end in CRLF, {crlf:,} times: "
            f"convert these files, or train with --document_separator {_typed(other)} if all are so"
        ]
    found = _other_separators(separator, files)
    hint = f"; the text has {', '.join(f'{_typed(mark)} {n:,} times' for mark, n in found)}" if found else ""
    return [f"document_separator {_typed(separator)} stands nowhere in the text: a file is one document{hint}"]


def _other_separators(separator: str, shards: Iterable[FileShard]) -> list[tuple[str, int]]:
    """Return similar and usual separators that the text has, with how often, the similar ones first."""
    similar = [separator.replace("\n", "\r\n"), separator.replace("\r\n", "\n"), separator.strip()]
    similar += [separator.strip().lower(), separator.strip().upper()]
    marks = [mark for mark in dict.fromkeys([*similar, *_OTHER_SEPARATORS]) if mark and mark != separator]
    counts, left = Counter[str](), _SEARCHED
    for text in (chunk.text for shard in shards for chunk in shard.chunks()):
        counts.update({mark: text.count(mark) for mark in marks})
        if (left := left - len(text)) <= 0:
            break
    return [(mark, counts[mark]) for mark in marks if counts[mark]][:3]


def _typed(separator: str) -> str:
    """Return a separator as it is typed in a shell."""
    return "'" + escaped(separator.replace("\\", "\\\\")).replace("'", "'\\''") + "'"
