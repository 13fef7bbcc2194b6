"""Encodes instruction rows to token ids, each marked as trained or not, and truncates, splits and packs them."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gpt_kit_hf.data.instructions.counts import RowCounts, left_out
from gpt_kit_hf.data.instructions.encoding import EncodedRow, RowEncoder
from gpt_kit_hf.data.instructions.formats import FormatFn
from gpt_kit_hf.data.instructions.reader import SkippedRows, skip_or_raise
from gpt_kit_hf.data.instructions.rows import BadRow, PlacedRow, RowError
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import SupervisionOptions, UnknownKeys

if TYPE_CHECKING:
    from gpt_kit_hf.tokenization.encodings import AnyTokenizer

_TOO_LONG = "longer than max_length"
_IF_TOO_LONG = 'truncation to "drop" or "truncate_prompt" (in evaluate, on_bad_row to "skip")'


class SupervisedRow(NamedTuple):
    """One row: its place, its ids (n,) int64, and whether each is trained, (n,) bool; the first id never is."""

    place: str
    input_ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class SupervisedRows:
    """Encoded rows in flat arrays, which loader processes share.

    Attributes:
        ids: (N,) int32, the ids of all rows end to end, each answer followed by EOS.
        trained: (N,) bool, whether the id is a target; the first id of a row never is, as nothing precedes it.
        offsets: (rows + 1,) int64, the start of each row, and the end.
        places: (rows,) strings, the place of each row in its file or dataset.
        eos_token_id: EOS.
        options: what the rows were encoded with.
        counts: of the whole input, for a subset, too: the rows read, used, skipped and dropped, and what of them was
            not read.

    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    places: pa.LargeStringArray  # strings of Python would take more memory than the ids of short rows
    eos_token_id: int
    options: SupervisionOptions
    counts: RowCounts

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> SupervisedRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = self.offsets[index], self.offsets[index + 1]
        return SupervisedRow(self.place(index), self.ids[start:stop].astype(np.int64), self.trained[start:stop])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(rows,) int64: the number of ids of each row; the model reads one less."""
        return np.diff(self.offsets)

    def place(self, index: int) -> str:
        """Return the place of a row in its file or dataset."""
        place: str = self.places[index].as_py()
        return place

    def fingerprint(self) -> str:
        """Return 16 hex digits over ids, row boundaries and trained marks: all that training sees of the rows."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.ids.astype("<i4").tobytes())
        digest.update(np.packbits(self.trained).tobytes())
        return digest.hexdigest()[:16]

    def select(self, indices: npt.NDArray[np.int64]) -> SupervisedRows:
        """Return these rows, in this order, with the counts of the whole input."""
        lengths = self.lengths[indices]
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        # The positions of the rows' ids: each row's start, plus the steps within the row.
        positions = np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return dataclasses.replace(
            self,
            ids=self.ids[positions],
            trained=self.trained[positions],
            offsets=offsets,
            places=self.places.take(pa.array(indices)),
        )

    def split(self, fractions: Sequence[float], seed: int) -> list[SupervisedRows]:
        """Return disjoint random subsets of these shares; each keeps the order of the rows.

        Raises UsageError unless the fractions are above 0 and sum to 1; DataError if a subset would be empty.
        """
        if not all(fraction > 0 for fraction in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-9):
            raise UsageError(f"fractions must be above 0 and sum to 1, got {list(fractions)}")
        ends = [round(len(self) * share) for share in np.cumsum(fractions)[:-1]]
        subsets = np.split(np.random.default_rng(seed).permutation(len(self)), ends)
        if any(subset.size == 0 for subset in subsets):
            raise DataError(
                f"{len(self)} rows cannot be split by {list(fractions)}: a subset would be empty "
                f"(rows: {self.counts.summary()}); give more rows, or evaluation rows of their own"
            )
        return [self.select(np.sort(subset)) for subset in subsets]


def encode_rows(
    rows: Iterable[PlacedRow | Mapping[str, Any]],
    tokenizer: AnyTokenizer,
    options: SupervisionOptions,
    format_fn: FormatFn | None = None,
    *,
    vocab_size: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    skipped: SkippedRows | None = None,
    unknown_keys: UnknownKeys = "report",
    text_rows: bool = False,
) -> SupervisedRows:
    """Return all rows as ids, with their answers and the EOS after each marked as trained.

    A row above max_length is an error, is dropped and counted, or loses the beginning of its prompt, by
    `options.truncation`. An answer is never cut: with "truncate_prompt" a row whose answers do not fit is dropped.

    `rows` come from `read_rows`, or are dicts, whose places are "row 0", "row 1", ... Chat rows need a tokenizer of
    transformers with a chat template. `format_fn` writes a row's text instead of `options.format`, as
    `prompt_and_answer` says. A row with an id of `vocab_size` or more is a bad row. With on_bad_row="skip" bad rows
    are added to `skipped`: pass the one given to `read_rows`, and the result counts the rows skipped by both.

    Keys that are not read are counted, or make a row a bad row with unknown_keys="error". A row of `text` alone needs
    train_on="everything", or `text_rows`.

    Raises UsageError if the tokenizer has no EOS, or a chat template that does not mark the answers; DataError for the
    first bad row, with its place, or if no row is left.
    """
    skipped, dropped = SkippedRows() if skipped is None else skipped, SkippedRows()
    encoder = RowEncoder(tokenizer, options, format_fn, vocab_size, unknown_keys, text_rows=text_rows)
    ids, trained, ends, places = array("i"), bytearray(), array("q", [0]), []
    number, n_truncated, everything = -1, 0, options.train_on == "everything"
    for number, item in enumerate(rows):
        place, row = item if isinstance(item, PlacedRow) else (f"row {number}", item)
        try:
            encoded = encoder.encode(row)
        except RowError as error:
            skip_or_raise(BadRow(place, error.kind, str(error)), on_bad_row, skipped)
            continue
        n_cut, reason = _tokens_to_cut(encoded, options)
        if reason is not None:
            if options.truncation == "error":
                raise DataError(f"{place}: {reason}; raise it, or set {_IF_TOO_LONG}")
            dropped.add(BadRow(place, _TOO_LONG, reason))
            continue
        ids.extend(encoded.input_ids[n_cut:])
        trained.extend([False, *(everything or answer for answer in encoded.answer[n_cut + 1 :])])
        ends.append(len(ids))
        n_truncated += n_cut > 0
        places.append(place)
    counts = RowCounts(
        rows_read=skipped.n_read or number + 1,
        rows_used=len(places),
        skipped=left_out(skipped),
        dropped=left_out(dropped),
        rows_truncated=n_truncated,
        unread_keys=dict(encoder.unread.most_common()),
        thinking_left_out=encoder.thinking_left_out,
    )
    if not places:
        raise DataError(_nothing_left(counts))
    return SupervisedRows(
        ids=np.frombuffer(ids, np.int32),
        trained=np.frombuffer(trained, np.bool_),
        offsets=np.frombuffer(ends, np.int64),
        places=pa.array(places, pa.large_string()),
        eos_token_id=encoder.eos_token_id,
        options=options,
        counts=counts,
    )


def _tokens_to_cut(row: EncodedRow, options: SupervisionOptions) -> tuple[int, str | None]:
    """Return the number of ids to cut from the beginning, and why the row cannot be used, or None."""
    n_read = len(row.input_ids) - 1  # the last id is a target only
    excess, n_prompt, limit = n_read - options.max_length, row.answer.index(True), f"max_length={options.max_length}"
    if excess <= 0:
        return 0, None
    if options.truncation != "truncate_prompt":
        return 0, f"{n_read} tokens ({n_prompt} of them before the first answer), more than {limit}"
    # One token of the prompt stays: the first of the answer is the target of the token before it.
    if excess >= n_prompt:
        return 0, f"the answers alone need {n_read - n_prompt + 1} tokens, more than {limit}"
    return excess, None


def _nothing_left(counts: RowCounts) -> str:
    kinds = [*counts.skipped.values(), *counts.dropped.values()]
    if not kinds:
        return "no row is left: 0 read"
    steps = [step for step, rows in (("correct rows", counts.skipped), ("raise max_length", counts.dropped)) if rows]
    return (
        f"no row is left: {counts.rows_read:,} read, all of them left out ({counts.reasons()}); one of them: "
        f"{kinds[0].first[0]}; {' or '.join(steps)}"
    )


def best_fit_decreasing(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return groups of indices whose lengths, each at most `capacity`, sum to at most `capacity`.

    The longest comes first, each into the group where it leaves the least space (Johnson 1973). The result is
    deterministic: equal lengths in order, indices ascending within a group, groups by their first index.
    """
    groups: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # groups by the space left in them
    spaces: list[int] = []  # its keys, ascending: at most `capacity` of them, however many groups
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            group, space = len(groups), capacity
            groups.append([])
        else:
            space = spaces[at]
            group = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        groups[group].append(number)
        left = space - length
        if left not in with_space:
            with_space[left] = []
            bisect.insort(spaces, left)
        with_space[left].append(group)
    return sorted(sorted(group) for group in groups)
