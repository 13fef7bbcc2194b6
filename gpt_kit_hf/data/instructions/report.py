"""Supervision report: what training would see of instruction rows, counted from the labels themselves."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpt_kit_hf.data.instructions.counts import RowCounts, check_sum
from gpt_kit_hf.data.instructions.tokenized import SupervisedRows, best_fit_decreasing
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization.encodings import token_ids_to_text

if TYPE_CHECKING:
    from gpt_kit_hf.tokenization.encodings import AnyTokenizer

Ids = npt.NDArray[np.int64]
Example = tuple["Ids | Sequence[int]", "npt.NDArray[np.bool_] | Sequence[bool]"]

_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_BAR_WIDTH = 40
_SHOWN_CHARACTERS = 700  # of a segment of an example


@dataclass(frozen=True)
class Segment:
    """A run of tokens of an example: its text, and whether it is trained."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class SupervisionReport(RowCounts):
    """Counts of rows and tokens. An answer is a run of trained tokens; it is complete if its last token is EOS.

    The counts of `RowCounts` are of the whole input. The rows used are trained on, or are held out for evaluation.
    All other counts are of the rows trained on.

    Attributes:
        rows_trained: rows to train on; `rows_eval`: rows to evaluate on.
        eval_input: the counts of the evaluation rows, if they have an input of their own.
        tokens: ids of the rows; `tokens_trained` of them are targets, `ends_trained` of these are EOS.
        rows_without_label: rows in which nothing is trained.
        rows_end_untrained: rows with an incomplete answer; in `rows_end_masked` of them an untrained EOS follows the
            answer, and `rows_cut_off` of them stop with the answer.
        rows_prompt_trained: rows trained from their first token on, so that no prompt is masked.
        padding: padding tokens if each row is padded to the longest of its batch of `batch_size` rows, in order;
            `padding_packed`: if rows are packed to `max_length`, None if that is not known.
        length_histogram: (most tokens that the model reads of a row, rows) for each power of two, ascending.
        examples: some rows, as runs of trained and other text.
        trains_everything: whether prompts are meant to be trained.

    Raises DataError if the counts do not add up.

    """

    rows_trained: int
    rows_eval: int = 0
    eval_input: RowCounts | None = None
    tokens: int = 0
    tokens_trained: int = 0
    ends_trained: int = 0
    rows_without_label: int = 0
    rows_end_untrained: int = 0
    rows_end_masked: int = 0
    rows_cut_off: int = 0
    rows_prompt_trained: int = 0
    batch_size: int
    padding: int
    padding_packed: int | None
    max_length: int | None
    length_histogram: tuple[tuple[int, int], ...]
    examples: tuple[tuple[Segment, ...], ...]
    trains_everything: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_input is None:
            check_sum("rows used", self.rows_used, {"trained on": self.rows_trained, "evaluated on": self.rows_eval})
        else:
            check_sum("rows used", self.rows_used, {"trained on": self.rows_trained})
            check_sum("evaluation rows used", self.eval_input.rows_used, {"evaluated on": self.rows_eval})

    @property
    def share_trained(self) -> float:
        """Trained tokens divided by all tokens."""
        return self.tokens_trained / self.tokens if self.tokens else 0.0

    @property
    def padding_saved(self) -> int | None:
        """Padding tokens that packing saves."""
        return None if self.padding_packed is None else self.padding - self.padding_packed

    def to_dict(self) -> dict[str, Any]:
        """Return all counts as JSON values."""
        values = dataclasses.asdict(self) | {"share_trained": self.share_trained, "padding_saved": self.padding_saved}
        as_json: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists
        return as_json

    def findings(self) -> list[str]:
        """Return a message for each count that is probably a mistake in the data."""
        other = self.rows_end_untrained - self.rows_end_masked - self.rows_cut_off
        prompts = 0 if self.trains_everything else self.rows_prompt_trained
        messages = (
            (self.rows_without_label, "train nothing: all their labels are masked"),
            (self.rows_end_masked, "mask the EOS after an answer, as happens if padding is EOS"),
            (self.rows_cut_off, "stop inside an answer, without EOS: cut off"),
            (other, "have an answer that goes on, untrained, without EOS"),
            (prompts, "train from their first token on: the prompt is trained, too"),
        )
        return [f"{count:,} of {self.rows_trained:,} rows {message}" for count, message in messages if count]

    def check(self) -> None:
        """Raise DataError if no row is left, nothing would be trained, or no EOS would be."""
        if not self.rows_trained:
            raise DataError(f"no row to train on: {self.summary()}")
        if not self.tokens_trained:
            raise DataError(
                f"nothing would be trained: all labels of {self.rows_trained} rows are masked; a chat template needs "
                "{% generation %} marks around what the assistant says"
            )
        if not self.ends_trained:
            raise DataError(
                f"no EOS would be trained in {self.rows_trained} rows, so the model would not learn to stop; mask "
                "labels by position, not by the padding's id, and end each answer with EOS"
            )

    def text(self, color: bool = False) -> str:
        """Return the report for a terminal; trained text of the examples is green, or between ⟦ and ⟧."""
        lines = self.lines("rows")
        if self.eval_input is not None:
            lines += self.eval_input.lines("eval rows")
        lines = [_printable(line) for line in lines]
        if self.rows_eval:
            lines += [f"eval      {self.rows_eval:,} rows", f"train     {self.rows_trained:,} rows"]
        lines.append(
            f"tokens    {self.tokens:,}, {self.tokens_trained:,} trained ({self.share_trained:.1%}), "
            f"{self.ends_trained:,} of them EOS"
        )
        packed = "" if self.padding_packed is None else f"; packed to {self.max_length}: {self.padding_packed:,}"
        lines.append(f"padding   {self.padding:,} tokens in batches of {self.batch_size}{packed}")
        lines += [f"warning   {finding}" for finding in self.findings()]
        lines.append("length    rows")
        most = max((rows for _, rows in self.length_histogram), default=1)
        for bound, rows in self.length_histogram:
            lines.append(f"  <= {bound:>7,} {rows:>9,}  {'#' * -(-rows * _BAR_WIDTH // most)}")
        legend = f"{_GREEN}trained{_PLAIN} and {_DIM}not{_PLAIN}:" if color else "⟦trained⟧ and not:"
        for number, example in enumerate(self.examples, start=1):
            lines += [f"example {number}, {legend}", _highlighted(example, color)]
        return "\n".join(lines)


def report_of(
    rows: SupervisedRows,
    tokenizer: AnyTokenizer,
    *,
    eval_rows: SupervisedRows | None = None,
    n_examples: int = 3,
    batch_size: int = 8,
) -> SupervisionReport:
    """Return the report of encoded rows; their ids and trained marks are counted again, position by position.

    `rows` are all rows of an input, or those of a split that are trained on. `eval_rows` are evaluated on: the rest
    of that split, as without this argument, or, if `rows` are all, the rows of another input.
    """
    report = report_of_examples(
        ((row.input_ids, row.trained) for row in (rows[index] for index in range(len(rows)))),
        tokenizer,
        rows.eos_token_id,
        n_examples=n_examples,
        batch_size=batch_size,
        max_length=rows.options.max_length,
    )
    everything = rows.options.train_on == "everything"
    return dataclasses.replace(
        report,
        # Prompts are known here: a row that is trained from its second token on has a prompt of one token.
        rows_prompt_trained=report.rows_prompt_trained if everything else 0,
        **{field.name: getattr(rows.counts, field.name) for field in dataclasses.fields(rows.counts)},
        rows_eval=rows.counts.rows_used - len(rows) if eval_rows is None else len(eval_rows),
        eval_input=eval_rows.counts if eval_rows is not None and len(rows) == rows.counts.rows_used else None,
        trains_everything=everything,
    )


def report_of_examples(
    examples: Iterable[Example],
    tokenizer: AnyTokenizer,
    eos_token_id: int,
    *,
    n_examples: int = 3,
    batch_size: int = 8,
    max_length: int | None = None,
) -> SupervisionReport:
    """Return the report of rows from any source: (ids, trained) pairs, both (n,); trained[i] says if id i is a target.

    `max_length` is that of packed sequences. Raises DataError for a pair of unequal lengths.
    """
    counts: Counter[str] = Counter()
    lengths: list[int] = []
    shown: list[tuple[Segment, ...]] = []
    for number, (row_ids, row_trained) in enumerate(examples):
        ids, trained = np.asarray(row_ids, np.int64), np.asarray(row_trained, np.bool_)
        if ids.ndim != 1 or ids.shape != trained.shape:
            raise DataError(f"row {number}: ids {ids.shape} and trained {trained.shape} must both be (n,)")
        counts.update(_row_counts(ids, trained, eos_token_id))
        lengths.append(len(ids))
        if len(shown) < n_examples:
            shown.append(tuple(_segments(ids, trained, tokenizer)))
    read = np.maximum(np.array(lengths, np.int64) - 1, 0)  # the last id of a row is a target only
    batches = [read[first : first + batch_size] for first in range(0, len(read), batch_size)]
    packed = None
    if max_length is not None and len(read) and read.max() <= max_length:
        packed = len(best_fit_decreasing(read, max_length)) * max_length - int(read.sum())
    bits = Counter(max(length - 1, 0).bit_length() for length in read.tolist())
    by_name: dict[str, Any] = dict(counts)
    return SupervisionReport(
        rows_read=len(lengths),
        rows_used=len(lengths),
        rows_trained=len(lengths),
        batch_size=batch_size,
        padding=sum(int(batch.max() * len(batch) - batch.sum()) for batch in batches),
        padding_packed=packed,
        max_length=max_length,
        length_histogram=tuple((1 << n, bits[n]) for n in range(min(bits), max(bits) + 1)) if bits else (),
        examples=tuple(shown),
        **by_name,
    )


def inspect_batches(
    batches: Iterable[tuple[Any, Any]],
    tokenizer: AnyTokenizer,
    eos_token_id: int,
    *,
    ignore_index: int = -100,
) -> SupervisionReport:
    """Return the report of a collator's batches (input_ids, labels), both (B, T) and not shifted, as in transformers.

    Padding counts as tokens, as it cannot be told from text. Raises DataError if a label differs from the id at its
    position, as it does if labels are already shifted.
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

    return report_of_examples(rows(), tokenizer, eos_token_id)


def _row_counts(ids: Ids, trained: npt.NDArray[np.bool_], eos: int) -> dict[str, int]:
    """Return what a row adds to the counts of a report, by their names."""
    # Each run of trained tokens starts where the mark turns on and stops where it turns off.
    turns = np.flatnonzero(np.diff(np.concatenate(([0], trained.astype(np.int8), [0]))))
    starts, stops = turns[::2], turns[1::2]
    incomplete = stops[ids[stops - 1] != eos]
    masked = bool((ids[incomplete[incomplete < len(ids)]] == eos).any())
    return {
        "tokens": len(ids),
        "tokens_trained": int(trained.sum()),
        "ends_trained": int((ids[trained] == eos).sum()),
        "rows_without_label": int(not len(starts)),
        "rows_end_untrained": int(len(incomplete) > 0),
        "rows_end_masked": int(masked),
        "rows_cut_off": int(len(incomplete) > 0 and not masked and incomplete[-1] == len(ids)),
        # The first id of a row follows nothing, and is no target whether it is marked or not.
        "rows_prompt_trained": int(len(starts) > 0 and starts[0] <= 1),
    }


def _segments(ids: Ids, trained: npt.NDArray[np.bool_], tokenizer: AnyTokenizer) -> Iterator[Segment]:
    turns = np.flatnonzero(trained[1:] != trained[:-1]) + 1
    for run_ids, run_trained in zip(np.split(ids, turns), np.split(trained, turns), strict=True):
        if len(run_ids):
            yield Segment(token_ids_to_text(run_ids, tokenizer), bool(run_trained[0]))


def _highlighted(example: tuple[Segment, ...], color: bool) -> str:
    marks = {True: (_GREEN, _PLAIN), False: (_DIM, _PLAIN)} if color else {True: ("⟦", "⟧"), False: ("", "")}
    written, half = "", _SHOWN_CHARACTERS // 2
    for segment in example:
        before, after = marks[segment.trained]
        is_long = len(segment.text) > _SHOWN_CHARACTERS
        text = f"{segment.text[:half]} … {segment.text[-half:]}" if is_long else segment.text
        written += f"{before}{_printable(text)}{after}"
    return written


def _printable(text: str) -> str:
    """Return text that cannot control a terminal: control and format characters, except line ends, are escaped."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf")
        else ascii(character)[1:-1]
        for character in text
    )
