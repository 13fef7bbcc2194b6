"""Instruction rows as token ids, each marked as trained or not: truncated, split, packed and padded to batches."""

from __future__ import annotations

import bisect
import hashlib
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gpt_kit_hf.data.instructions.dataset import FormatFn
from gpt_kit_hf.data.instructions.encoding import EncodedRow, RowEncoder
from gpt_kit_hf.data.instructions.reader import BadRow, PlacedRow, RowError, SkippedRows, stop_or_skip
from gpt_kit_hf.data.text.windows import IGNORED, collate_windows
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import SupervisionOptions

if TYPE_CHECKING:
    from gpt_kit_hf.tokenization.encodings import AnyTokenizer

_TOO_LONG = "longer than max_length"


class SupervisedRow(NamedTuple):
    """One row: its place, its ids (n,) int64, and whether each is trained, (n,) bool; the first id never is."""

    place: str
    input_ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]


class SupervisedRows:
    """Rows in flat arrays, which the processes of a loader share.

    Attributes:
        ids: (N,) int32, the ids of all rows end to end, each answer ended by the end of text.
        trained: (N,) bool, whether the id is a target; the first id of a row never is, as nothing comes before it.
        offsets: (rows + 1,) int64, where each row begins, and the end.
        truncated: (rows,) bool, whether the beginning of the row's prompt was cut off.
        skipped: rows that could not be used, by the kind of fault; `dropped`: rows that were too long.
        n_read: rows that were met: used, skipped and dropped.

    """

    def __init__(
        self,
        ids: npt.NDArray[np.int32],
        trained: npt.NDArray[np.bool_],
        offsets: npt.NDArray[np.int64],
        truncated: npt.NDArray[np.bool_],
        places: Sequence[str],
        *,
        end_of_text_id: int,
        options: SupervisionOptions,
        skipped: SkippedRows | None = None,
        dropped: SkippedRows | None = None,
    ) -> None:
        self.ids, self.trained, self.offsets, self.truncated = ids, trained, offsets, truncated
        self.end_of_text_id, self.options = end_of_text_id, options
        self.skipped = SkippedRows() if skipped is None else skipped
        self.dropped = SkippedRows() if dropped is None else dropped
        # One text for all places: as many strings would take more memory than the ids of short rows.
        self._places = "".join(places)
        self._place_ends = np.cumsum([0, *map(len, places)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> SupervisedRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = self.offsets[index], self.offsets[index + 1]
        return SupervisedRow(self.place(index), self.ids[start:stop].astype(np.int64), self.trained[start:stop])

    @property
    def n_read(self) -> int:
        """How many rows were met."""
        return len(self) + len(self.skipped) + len(self.dropped)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(rows,) int64: the ids of each row, one more than the model reads of it."""
        return np.diff(self.offsets)

    def place(self, index: int) -> str:
        """Return where a row stands in its file or dataset."""
        return self._places[self._place_ends[index] : self._place_ends[index + 1]]

    def fingerprint(self) -> str:
        """Return 16 hex digits over ids, row boundaries and what is trained: all that training sees of the rows."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.ids.astype("<i4").tobytes())
        digest.update(np.packbits(self.trained).tobytes())
        return digest.hexdigest()[:16]

    def select(self, indices: npt.NDArray[np.int64]) -> SupervisedRows:
        """Return the rows of these numbers, in this order; skipped and dropped rows stay with the whole."""
        lengths = self.lengths[indices]
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        # The positions of the rows' ids: each row's start, and the steps within the row.
        positions = np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return SupervisedRows(
            self.ids[positions],
            self.trained[positions],
            offsets,
            self.truncated[indices],
            [self.place(int(index)) for index in indices],
            end_of_text_id=self.end_of_text_id,
            options=self.options,
        )

    def split(self, fractions: Sequence[float], seed: int) -> list[SupervisedRows]:
        """Return parts of these shares, drawn by the seed; each keeps the order of the rows, and no row is in two.

        Raises UsageError unless the fractions are above 0 and sum to 1; DataError if a part would be empty.
        """
        if not all(fraction > 0 for fraction in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-9):
            raise UsageError(f"fractions must be above 0 and sum to 1, got {list(fractions)}")
        ends = [round(len(self) * share) for share in np.cumsum(fractions)[:-1]]
        parts = np.split(np.random.default_rng(seed).permutation(len(self)), ends)
        if any(part.size == 0 for part in parts):
            raise DataError(f"{len(self)} rows cannot be split by {list(fractions)}: a part would be empty")
        return [self.select(np.sort(part)) for part in parts]


def encode_rows(
    rows: Iterable[PlacedRow | Mapping[str, Any]],
    tokenizer: AnyTokenizer,
    options: SupervisionOptions,
    format_fn: FormatFn | None = None,
    *,
    vocab_size: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    skipped: SkippedRows | None = None,
) -> SupervisedRows:
    """Return all rows as ids, with their answers and the end of text after each marked as trained.

    A row above max_length stops the work, is dropped and counted, or loses the beginning of its prompt, by
    `options.truncation`; an answer is never cut: a row whose answers do not fit is dropped, or stops the work, too.

    Args:
        rows: as `read_rows` gives them, or plain dicts, which are placed as "row 0", "row 1", ...
        tokenizer: a tiktoken encoding, or a tokenizer of transformers, which chat rows need, with a chat template.
        options: what is trained, and how long a row may be.
        format_fn: writes a row's text instead of `options.format`; see `prompt_and_answer` for what it may return.
        vocab_size: the model's; a row with an id outside of it is a bad row.
        on_bad_row: "stop", or "skip", which adds the row to `skipped`.
        skipped: where `read_rows` counts, so that the result holds the rows skipped by both.

    Raises:
        UsageError: the tokenizer cannot serve: no end of text, or a chat template that trains nothing.
        DataError: the first bad row, with its place; or no row is left.

    """
    skipped = SkippedRows() if skipped is None else skipped
    dropped = SkippedRows()
    on_fault = stop_or_skip(on_bad_row, skipped)
    encoder = RowEncoder(tokenizer, options.format, format_fn, vocab_size)
    ids, trained, ends, truncated, places = array("i"), bytearray(), array("q", [0]), bytearray(), []
    for number, item in enumerate(rows):
        place, row = item if isinstance(item, PlacedRow) else (f"row {number}", item)
        try:
            encoded = encoder.encode(row)
        except RowError as error:
            on_fault(BadRow(place, error.kind, str(error)))
            continue
        n_cut, reason = _to_cut(encoded, options)
        if reason is not None:
            if options.truncation == "error":
                raise DataError(f'{place}: {reason}; raise it, or set truncation to "drop" or "truncate_prompt"')
            dropped.add(BadRow(place, _TOO_LONG, reason))
            continue
        ids.extend(encoded.input_ids[n_cut:])
        trained.extend(_targets(encoded.answer[n_cut:], options))
        ends.append(len(ids))
        truncated.append(n_cut > 0)
        places.append(place)
    if not places:
        raise DataError(_nothing_left(skipped, dropped))
    return SupervisedRows(
        np.frombuffer(ids, np.int32),
        np.frombuffer(trained, np.bool_),
        np.frombuffer(ends, np.int64),
        np.frombuffer(truncated, np.bool_),
        places,
        end_of_text_id=encoder.end_of_text_id,
        options=options,
        skipped=skipped,
        dropped=dropped,
    )


def _to_cut(row: EncodedRow, options: SupervisionOptions) -> tuple[int, str | None]:
    """Return how many ids to cut from the beginning, and why the row cannot be used, or None."""
    n_read = len(row.input_ids) - 1  # the last id is a target only
    over = n_read - options.max_length
    if over <= 0:
        return 0, None
    n_prompt = row.answer.index(True)
    if options.truncation != "truncate_prompt":
        return (
            0,
            f"{n_read} tokens ({n_prompt} of them before the first answer), more than max_length={options.max_length}",
        )
    # One token of the prompt stays: the first of the answer is the target of what comes before it.
    if over >= n_prompt:
        return 0, f"the answers alone need {n_read - n_prompt + 1} tokens, more than max_length={options.max_length}"
    return over, None


def _targets(answer: list[bool], options: SupervisionOptions) -> list[bool]:
    if options.train_on == "everything":
        answer = [True] * len(answer)
    return [False, *answer[1:]]


def _nothing_left(skipped: SkippedRows, dropped: SkippedRows) -> str:
    first = next((rows.first(kind)[0] for rows in (skipped, dropped) for kind in rows.counts), None)
    why = "" if first is None else f"; the first: {first.place}: {first.reason}"
    return f"no row to train on ({len(skipped)} skipped, {len(dropped)} dropped as {_TOO_LONG}){why}"


class PackedRows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Sequences of several rows: (input_ids, targets, position_ids), each (max_length,) int64.

    Positions restart with each row, so that rows do not see each other, and no row's first id is a target. What is
    left of a sequence is the end of text, untrained, as a document of its own. Rows are placed by best-fit decreasing
    (Johnson 1973): the longest first, each where it leaves the least room.

    Raises UsageError if a row is longer than `max_length`, by default that of the rows' options.
    """

    def __init__(self, rows: SupervisedRows, max_length: int | None = None) -> None:
        self.rows = rows
        self.max_length = rows.options.max_length if max_length is None else max_length
        lengths = rows.lengths - 1  # what the model reads of each
        longest = int(lengths.max())
        if longest > self.max_length:
            raise UsageError(f"max_length={self.max_length}: the longest row has {longest} tokens")
        self.sequences = best_fit_decreasing(lengths, self.max_length)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = np.full(self.max_length, self.rows.end_of_text_id, np.int64)
        targets = np.full(self.max_length, IGNORED, np.int64)
        positions = np.empty(self.max_length, np.int64)
        start = 0
        for number in self.sequences[index]:
            row_ids, row_targets = _shifted(self.rows[number])
            stop = start + len(row_ids)
            ids[start:stop], targets[start:stop], positions[start:stop] = row_ids, row_targets, np.arange(stop - start)
            start = stop
        positions[start:] = np.arange(self.max_length - start)
        return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(positions)

    def collate(self, items: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Batch:
        """Join sequences into a batch, (B, max_length) each."""
        return collate_windows(items)


class PaddedRows(Dataset[tuple[Tensor, Tensor]]):
    """A row an item: (input_ids, targets), both (n - 1,) int64 for a row of n ids."""

    def __init__(self, rows: SupervisedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ids, targets = _shifted(self.rows[index])
        return torch.from_numpy(ids), torch.from_numpy(targets)

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Join rows into a batch (B, longest), filled on the right with the end of text, untrained."""
        ids, targets = [item[0] for item in items], [item[1] for item in items]
        return Batch(
            pad_sequence(ids, batch_first=True, padding_value=self.rows.end_of_text_id),
            pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        )


def _shifted(row: SupervisedRow) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return what the model reads of a row and the target of each, (n,) -> (n - 1,); the place decides, not the id."""
    return row.input_ids[:-1], np.where(row.trained[1:], row.input_ids[1:], IGNORED)


def best_fit_decreasing(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return groups of numbers whose lengths sum to at most `capacity`, each length being at most that.

    The same lengths give the same groups: equal lengths in their order, numbers ascending within a group, and groups
    by their first number.
    """
    groups: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # groups by the room that is left in them
    rooms: list[int] = []  # its keys, ascending: no more than `capacity`, however many the groups
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            group, room = len(groups), capacity
            groups.append([])
        else:
            room = rooms[at]
            group = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        groups[group].append(number)
        left = room - length
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(group)
    return sorted(sorted(group) for group in groups)
