"""The kit's instruction data: a dataset of prompts and answers, and the collate function for its batches."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gpt_kit_hf.data.instructions.encoding import encode_text_row
from gpt_kit_hf.data.instructions.formats import FormatFn, Row, alpaca_fields, format_alpaca
from gpt_kit_hf.data.instructions.rows import RowError, check_is_object, listed
from gpt_kit_hf.errors import DataError, UsageError, unknown_name

if TYPE_CHECKING:
    from gpt_kit_hf.tokenization.encodings import AnyTokenizer


class InstructionItem(NamedTuple):
    """One row: the ids of its prompt, then of its answer, without EOS; and the number of ids of the prompt."""

    input_ids: list[int]
    prompt_length: int


class InstructionDataset(Dataset[InstructionItem]):
    """Instruction rows as token ids; each item is a prompt with its answer, and where the answer begins.

    Rows are encoded by `encode_text_row` at construction, and held as 32-bit ids. With a tokenizer of transformers a
    special token spelled out in a text is that token; with a tiktoken encoding it is plain text.

    Args:
        data: rows, dicts with the strings instruction, output and, if there is one, input, or with other names that
            are known; other keys are for ``format_fn``.
        tokenizer: a tiktoken encoding or a tokenizer of transformers (no special tokens are added).
        format_fn: writes a row's text; see ``prompt_and_answer`` for what it may return.
        max_length: the most tokens of prompt and answer; the EOS that the collate function appends is not counted, as
            it is a target only. None for no limit.
        truncation: for a row above ``max_length``: "error", or "drop", which leaves the row out and adds its number to
            ``dropped``.

    Raises:
        UsageError: ``max_length`` or ``truncation`` is out of range.
        DataError: a row cannot be used, named as data[number]; or no row is left.

    """

    def __init__(
        self,
        data: Iterable[Row],
        tokenizer: AnyTokenizer,
        format_fn: FormatFn = format_alpaca,
        *,
        max_length: int | None = None,
        truncation: Literal["error", "drop"] = "error",
    ) -> None:
        _check_limit(max_length, truncation, ("error", "drop"))
        # Flat arrays, which loader processes share; lists of int would take ten times the memory.
        self._ids = array("i")
        self._ends = array("q", [0])
        self._prompt_lengths = array("i")
        self.dropped: list[int] = []
        for number, entry in enumerate(data):
            try:
                row = _alpaca_row(entry) if format_fn is format_alpaca else entry
                prompt_ids, answer_ids = encode_text_row(row, format_fn, tokenizer, split_special_tokens=False)
            except DataError as error:
                raise DataError(f"data[{number}]: {error}") from error
            length = len(prompt_ids) + len(answer_ids)
            if max_length is not None and length > max_length:
                if truncation == "error":
                    raise DataError(
                        f"data[{number}]: {length} tokens ({len(prompt_ids)} of the prompt), more than "
                        f'max_length={max_length}; raise it, or pass truncation="drop"'
                    )
                self.dropped.append(number)
                continue
            self._ids.extend(prompt_ids + answer_ids)
            self._ends.append(len(self._ids))
            self._prompt_lengths.append(len(prompt_ids))
        if not self._prompt_lengths:
            raise DataError(f"data: no row to train on ({len(self.dropped)} dropped as longer than {max_length})")

    def __len__(self) -> int:
        """Return the number of rows that were kept."""
        return len(self._prompt_lengths)

    def __getitem__(self, index: int) -> InstructionItem:
        """Return the item at ``index`` among the rows that were kept; a negative index counts from the end."""
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} in a dataset of {len(self)} rows")
        ids = self._ids[self._ends[position] : self._ends[position + 1]]
        return InstructionItem(ids.tolist(), self._prompt_lengths[position])


def _alpaca_row(entry: Row) -> Row:
    """Return a row's fields under Alpaca's names; raises RowError for those that one prompt does not write."""
    check_is_object(entry)
    fields, _ = alpaca_fields(entry)
    if unwritten := [name for name in ("system", "history") if fields[name]]:
        raise RowError(
            "format", f"{listed(unwritten, 'is', 'are')} not written by format_alpaca; pass a format_fn that writes it"
        )
    return fields


@dataclass(frozen=True)
class InstructionCollator:
    """The ``collate_fn`` of a DataLoader that turns items into (input, target), both (B, T) int64; it can be pickled.

    Items are ``InstructionItem`` or plain lists of ids. Each row gets one EOS, and padding on the right to the longest
    row. Target is the row shifted by one, for ``losses``, not for ``labels`` of transformers: its EOS is trained, its
    padding is not. Which tokens are trained is decided by position, never by id, so rows may hold the padding id.

    Args:
        pad_token_id: fills the input, and ends each row unless ``end_of_text_id`` is given.
        end_of_text_id: ends each row; ``pad_token_id`` by default.
        ignore_index: the target that is not trained.
        max_length: the most tokens of an input row; None for no limit.
        truncation: for a row above it: "error", or "cut", which keeps its beginning and trains no EOS.
        mask_instruction: train the answer and its EOS only, not the prompt.
        device: of the batch; the CPU by default, as loader processes should not use an accelerator.

    Raises:
        UsageError: an argument is out of range; at a call, ``mask_instruction`` with plain lists of ids.
        DataError: at a call, a row is empty, too long, or would lose its whole answer.

    """

    pad_token_id: int
    _: KW_ONLY
    end_of_text_id: int | None = None
    ignore_index: int = -100
    max_length: int | None = None
    truncation: Literal["error", "cut"] = "error"
    mask_instruction: bool = False
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        eos = self.pad_token_id if self.end_of_text_id is None else self.end_of_text_id
        for name, token_id in (("pad_token_id", self.pad_token_id), ("end_of_text_id", eos)):
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise UsageError(f"{name}={token_id!r}: it must be a token id, 0 or more")
        if self.ignore_index >= 0:
            raise UsageError(f"ignore_index={self.ignore_index}: it must be below 0, so that it is no token's id")
        _check_limit(self.max_length, self.truncation, ("error", "cut"))

    def __call__(self, items: Sequence[InstructionItem | Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (input, target), both (B, T) with T the length of the longest row."""
        rows = [self._row(number, item) for number, item in enumerate(items)]
        # The input of the longest row ends before its EOS; a shorter row holds its EOS there, like padding.
        ids = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=self.pad_token_id)
        targets = pad_sequence([target for _, target in rows], batch_first=True, padding_value=self.ignore_index)
        return ids[:, :-1].contiguous().to(self.device), targets.to(self.device)

    def _row(self, number: int, item: InstructionItem | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a row's ids with one EOS, (n,), and its target, (n - 1,)."""
        ids = list(item.input_ids if isinstance(item, InstructionItem) else item)
        prompt_length = item.prompt_length if isinstance(item, InstructionItem) else None
        if not ids:
            raise DataError(f"row {number} of the batch has no tokens")
        if self.mask_instruction and prompt_length is None:
            raise UsageError(
                f"mask_instruction=True: row {number} of the batch is a plain list of ids, which does not say "
                "where its answer begins; pass InstructionItem(input_ids, prompt_length)"
            )
        if self.max_length is not None and len(ids) > self.max_length:
            self._check_cut(f"row {number} of the batch", len(ids), prompt_length, self.max_length)
        limit = None if self.max_length is None else self.max_length + 1
        eos = self.pad_token_id if self.end_of_text_id is None else self.end_of_text_id
        row = torch.tensor([*ids, eos][:limit])  # a cut row has no EOS: it did not end here
        target = row[1:].clone()
        if self.mask_instruction and prompt_length is not None:
            # The last token of the prompt predicts the first of the answer, which is trained.
            target[: max(prompt_length - 1, 0)] = self.ignore_index
        return row, target

    def _check_cut(self, where: str, length: int, prompt_length: int | None, max_length: int) -> None:
        if self.truncation == "error":
            raise DataError(
                f"{where}: {length} tokens, more than max_length={max_length}; raise it, drop such rows in the "
                'dataset, or pass truncation="cut"'
            )
        if prompt_length is not None and prompt_length > max_length:
            raise DataError(
                f"{where}: its prompt of {prompt_length} tokens leaves no token of the answer within "
                f"max_length={max_length}"
            )


create_instruction_collate_fn = InstructionCollator  # the kit's name


def _check_limit(max_length: int | None, truncation: str, known: tuple[str, ...]) -> None:
    if max_length is not None and max_length < 1:
        raise UsageError(f"max_length={max_length}: it must be 1 or more, or None for no limit")
    if truncation not in known:
        raise UsageError(unknown_name("truncation", str(truncation), known))
