"""What training would see of instruction rows, counted from the labels themselves, and shown before it starts."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpt_kit_hf.data.instructions.reader import SkippedRows
from gpt_kit_hf.data.instructions.tokenized import SupervisedRows, best_fit_decreasing
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization.encodings import token_ids_to_text

if TYPE_CHECKING:
    from gpt_kit_hf.tokenization.encodings import AnyTokenizer

Ids = npt.NDArray[np.int64]
Example = tuple["Ids | Sequence[int]", "npt.NDArray[np.bool_] | Sequence[bool]"]

_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_BAR = 40
_SHOWN_CHARACTERS = 700


class LeftOut(NamedTuple):
    """Rows that were left out for one kind of fault: how many, and the first of them, each "place: reason"."""

    rows: int
    first: tuple[str, ...]


class Segment(NamedTuple):
    """A run of a shown row: its text, and whether it is trained."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class SupervisionReport:
    """Counts of rows and tokens.

    An answer is a run of trained tokens. It has its end where its last token is the end of text.

    Attributes:
        rows_read: rows met; `rows_used` of them make the data, the others are in `skipped` and `dropped`.
        skipped: rows that could not be used, and `dropped`: rows that were too long, by the kind of fault.
        rows_truncated: rows whose prompt lost its beginning.
        tokens: ids of the rows used; `tokens_trained` of them are targets, `ends_trained` of these ends of text.
        rows_without_label: rows in which nothing is trained.
        rows_end_untrained: rows with an answer that has no end; of these, `rows_end_masked` have the end of text
            right after the answer, untrained, and `rows_cut_off` stop with the answer.
        rows_prompt_trained: rows trained from their first token on, so that no prompt is left out.
        padding: tokens of padding where each row is filled up to the longest of its batch of `batch_size` rows, in the
            rows' order; `padding_packed`: where rows are packed to `max_length`. None if the lengths are not known.
        length_histogram: (most tokens, rows) for each power of two, ascending.
        examples: some rows, as runs of trained and other text.

    """

    rows_read: int
    rows_used: int
    skipped: Mapping[str, LeftOut]
    dropped: Mapping[str, LeftOut]
    rows_truncated: int
    tokens: int
    tokens_trained: int
    ends_trained: int
    rows_without_label: int
    rows_end_untrained: int
    rows_end_masked: int
    rows_cut_off: int
    rows_prompt_trained: int
    batch_size: int
    padding: int
    padding_packed: int | None
    max_length: int | None
    length_histogram: tuple[tuple[int, int], ...]
    examples: tuple[tuple[Segment, ...], ...]
    trains_everything: bool = False

    @property
    def share_trained(self) -> float:
        """Trained tokens among all."""
        return self.tokens_trained / self.tokens if self.tokens else 0.0

    @property
    def padding_saved(self) -> int | None:
        """Tokens of padding that packing saves."""
        return None if self.padding_packed is None else self.padding - self.padding_packed

    def to_dict(self) -> dict[str, Any]:
        """Return all counts as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("skipped", "dropped"):
            values[name] = {kind: rows._asdict() for kind, rows in getattr(self, name).items()}
        values["examples"] = [[segment._asdict() for segment in example] for example in self.examples]
        values |= {"share_trained": self.share_trained, "padding_saved": self.padding_saved}
        as_json: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists
        return as_json

    def findings(self) -> list[str]:
        """Return a sentence for each thing that is likely not meant; empty where all is well."""
        rows = self.rows_used
        other = self.rows_end_untrained - self.rows_end_masked - self.rows_cut_off
        prompts = 0 if self.trains_everything else self.rows_prompt_trained
        sentences = (
            (self.rows_without_label, "train nothing: all their labels are masked"),
            (self.rows_end_masked, "mask the end of text after an answer, as where padding is the end of text"),
            (self.rows_cut_off, "stop inside an answer, without an end of text: cut off"),
            (other, "have an answer that goes on, untrained, without an end of text"),
            (prompts, "train from their first token on: the prompt is trained, too"),
        )
        return [f"{count:,} of {rows:,} rows {sentence}" for count, sentence in sentences if count]

    def check(self) -> None:
        """Raise DataError if no row is left, nothing would be trained, or no end of text would be."""
        if not self.rows_used:
            left_out = sum(kind.rows for kind in (*self.skipped.values(), *self.dropped.values()))
            raise DataError(f"no row to train on: {self.rows_read} read, {left_out} of them left out")
        if not self.tokens_trained:
            raise DataError(
                f"nothing would be trained: all labels of {self.rows_used} rows are masked; a chat template needs "
                "{% generation %} marks around what the assistant says"
            )
        if not self.ends_trained:
            raise DataError(
                f"no end of text would be trained in {self.rows_used} rows, so the model would not learn to stop; "
                "mask labels by position, not by the padding's id, and end each answer with the end of text"
            )

    def text(self, color: bool = False) -> str:
        """Return the report for a terminal; trained text of the examples is green, or between ⟦ and ⟧."""
        lines = [f"rows      {self.rows_read:,} read, {self.rows_used:,} used{self._left_out_in_short()}"]
        lines += [*_left_out_lines("skipped", self.skipped), *_left_out_lines("dropped", self.dropped)]
        if self.rows_truncated:
            lines.append(f"  {self.rows_truncated:,} rows lost the beginning of their prompt")
        lines.append(
            f"tokens    {self.tokens:,}, {self.tokens_trained:,} trained ({self.share_trained:.1%}), "
            f"{self.ends_trained:,} of them ends of text"
        )
        lines.append(self._padding_line())
        lines += [f"warning   {finding}" for finding in self.findings()]
        lines += ["length    rows", *_histogram_lines(self.length_histogram)]
        for number, example in enumerate(self.examples, start=1):
            lines += [f"example {number}, {_legend(color)}", _highlighted(example, color)]
        return "\n".join(lines)

    def _left_out_in_short(self) -> str:
        counts = {"skipped": self.skipped, "dropped": self.dropped}
        sums = {name: sum(kind.rows for kind in kinds.values()) for name, kinds in counts.items()}
        return "".join(f", {count:,} {name}" for name, count in sums.items() if count)

    def _padding_line(self) -> str:
        line = f"padding   {self.padding:,} tokens in batches of {self.batch_size}"
        if self.padding_packed is None:
            return line
        return f"{line}; packed to {self.max_length}: {self.padding_packed:,}"


def report_of(
    rows: SupervisedRows, tokenizer: AnyTokenizer, *, n_examples: int = 3, batch_size: int = 8
) -> SupervisionReport:
    """Return the report of encoded rows; their ids and trained marks are counted anew, position by position."""
    report = report_of_examples(
        ((row.input_ids, row.trained) for row in (rows[index] for index in range(len(rows)))),
        tokenizer,
        rows.end_of_text_id,
        n_examples=n_examples,
        batch_size=batch_size,
        max_length=rows.options.max_length,
    )
    return dataclasses.replace(
        report,
        # Here it is known what a prompt is: a row that is trained from its second token on has one of one token.
        rows_prompt_trained=report.rows_prompt_trained if rows.options.train_on == "everything" else 0,
        rows_read=rows.n_read,
        skipped=_left_out(rows.skipped),
        dropped=_left_out(rows.dropped),
        rows_truncated=int(rows.truncated.sum()),
        trains_everything=rows.options.train_on == "everything",
    )


def report_of_examples(
    examples: Iterable[Example],
    tokenizer: AnyTokenizer,
    end_of_text_id: int,
    *,
    n_examples: int = 3,
    batch_size: int = 8,
    max_length: int | None = None,
) -> SupervisionReport:
    """Return the report of rows from anywhere: (ids, trained) pairs, both (n,), where trained[i] says if id i is.

    `max_length` tells how packing would do; a row that does not fit it leaves that unknown. Raises DataError for a
    pair of unequal lengths.
    """
    counts: Counter[str] = Counter()
    lengths: list[int] = []
    shown: list[tuple[Segment, ...]] = []
    for number, (row_ids, row_trained) in enumerate(examples):
        ids, trained = np.asarray(row_ids, np.int64), np.asarray(row_trained, np.bool_)
        if ids.ndim != 1 or ids.shape != trained.shape:
            raise DataError(f"row {number}: ids {ids.shape} and trained {trained.shape} must both be (n,)")
        counts.update(_row_counts(ids, trained, end_of_text_id))
        lengths.append(len(ids))
        if len(shown) < n_examples:
            shown.append(tuple(_segments(ids, trained, tokenizer)))
    read = np.maximum(np.array(lengths, np.int64) - 1, 0)  # the last id of a row is a target only
    return SupervisionReport(
        rows_read=len(lengths),
        rows_used=len(lengths),
        skipped={},
        dropped={},
        rows_truncated=0,
        tokens=sum(lengths),
        tokens_trained=counts["trained"],
        ends_trained=counts["ends"],
        rows_without_label=counts["without_label"],
        rows_end_untrained=counts["end_untrained"],
        rows_end_masked=counts["end_masked"],
        rows_cut_off=counts["cut_off"],
        rows_prompt_trained=counts["prompt_trained"],
        batch_size=batch_size,
        padding=_padding(read, batch_size),
        padding_packed=_padding_packed(read, max_length),
        max_length=max_length,
        length_histogram=_histogram(lengths),
        examples=tuple(shown),
    )


def inspect_batches(
    batches: Iterable[tuple[Any, Any]],
    tokenizer: AnyTokenizer,
    end_of_text_id: int,
    *,
    ignore_index: int = -100,
) -> SupervisionReport:
    """Return the report of a collator's batches (input_ids, labels), both (B, T) and not shifted, as in transformers.

    Padding cannot be told from text here, and counts as tokens. Raises DataError where a label is another id than
    that of its position, as where labels are shifted already.
    """

    def rows() -> Iterator[Example]:
        for number, (input_ids, labels) in enumerate(batches):
            for ids, row_labels in zip(np.asarray(input_ids), np.asarray(labels), strict=True):
                trained = row_labels != ignore_index
                if (ids[trained] != row_labels[trained]).any():
                    raise DataError(
                        f"batch {number}: a label is not the id at its position; are labels shifted already?"
                    )
                yield ids, trained

    return report_of_examples(rows(), tokenizer, end_of_text_id)


def _row_counts(ids: Ids, trained: npt.NDArray[np.bool_], end: int) -> Counter[str]:
    """Return what a row adds to the counts: of tokens, and of rows with each fault at most 1."""
    # Each run of trained tokens begins where the mark turns on and stops where it turns off.
    turns = np.flatnonzero(np.diff(np.concatenate(([0], trained.astype(np.int8), [0]))))
    starts, stops = turns[::2], turns[1::2]
    open_stops = stops[ids[stops - 1] != end]
    inside = open_stops[open_stops < len(ids)]
    return Counter(
        trained=int(trained.sum()),
        ends=int((ids[trained] == end).sum()),
        without_label=int(not len(starts)),
        end_untrained=int(len(open_stops) > 0),
        end_masked=int((ids[inside] == end).any()),
        cut_off=int(len(open_stops) > 0 and not (ids[inside] == end).any() and open_stops[-1] == len(ids)),
        # The first id of a row has nothing before it, and is no target whether it is marked or not.
        prompt_trained=int(len(starts) > 0 and starts[0] <= 1),
    )


def _left_out(rows: SkippedRows) -> dict[str, LeftOut]:
    return {
        kind: LeftOut(count, tuple(f"{row.place}: {row.reason}" for row in rows.first(kind)))
        for kind, count in rows.counts.most_common()
    }


def _padding(lengths: Ids, batch_size: int) -> int:
    batches = (lengths[first : first + batch_size] for first in range(0, len(lengths), batch_size))
    return sum(int(batch.max() * len(batch) - batch.sum()) for batch in batches)


def _padding_packed(lengths: Ids, max_length: int | None) -> int | None:
    if max_length is None or not len(lengths) or lengths.max() > max_length:
        return None
    return len(best_fit_decreasing(lengths, max_length)) * max_length - int(lengths.sum())


def _histogram(lengths: list[int]) -> tuple[tuple[int, int], ...]:
    """Return (bound, rows) for lengths above half the bound and up to it, from the first bound in use to the last."""
    bits = Counter(max(length - 1, 0).bit_length() for length in lengths)
    return tuple((1 << n, bits[n]) for n in range(min(bits), max(bits) + 1)) if bits else ()


def _histogram_lines(histogram: tuple[tuple[int, int], ...]) -> list[str]:
    most = max((rows for _, rows in histogram), default=1)
    return [f"  <= {bound:>7,} {rows:>9,}  {'#' * -(-rows * _BAR // most)}" for bound, rows in histogram]


def _left_out_lines(name: str, kinds: Mapping[str, LeftOut]) -> list[str]:
    lines = []
    for kind, left_out in kinds.items():
        lines.append(f"  {left_out.rows:,} {name}: {kind}")
        lines += [f"    {_printable(row)}" for row in left_out.first]
    return lines


def _segments(ids: Ids, trained: npt.NDArray[np.bool_], tokenizer: AnyTokenizer) -> Iterator[Segment]:
    turns = np.flatnonzero(trained[1:] != trained[:-1]) + 1
    for piece_ids, piece_trained in zip(np.split(ids, turns), np.split(trained, turns), strict=True):
        if len(piece_ids):
            yield Segment(token_ids_to_text(piece_ids, tokenizer), bool(piece_trained[0]))


def _legend(color: bool) -> str:
    return f"{_GREEN}trained{_PLAIN} and {_DIM}not{_PLAIN}:" if color else "⟦trained⟧ and not:"


def _highlighted(example: tuple[Segment, ...], color: bool) -> str:
    marks = {True: (_GREEN, _PLAIN), False: (_DIM, _PLAIN)} if color else {True: ("⟦", "⟧"), False: ("", "")}
    pieces = []
    for text, trained in example:
        before, after = marks[trained]
        pieces.append(f"{before}{_printable(_shortened(text))}{after}")
    return "".join(pieces)


def _shortened(text: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _printable(text: str) -> str:
    """Return text that cannot steer a terminal: control and format characters but the line end are written out."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf")
        else ascii(character)[1:-1]
        for character in text
    )
