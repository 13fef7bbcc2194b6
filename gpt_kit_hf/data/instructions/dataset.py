"""Instruction rows: a format for the prompt, their token ids, and batches whose labels are the answers."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tiktoken
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpt_kit_hf.errors import DataError, UsageError, unknown_name
from gpt_kit_hf.tokenization.encodings import encode_ordinary_batch

if TYPE_CHECKING:
    from gpt_kit_hf.tokenization.encodings import AnyTokenizer

Row = Mapping[str, Any]
FormatFn = Callable[[Row], "str | tuple[str, str]"]

_FIELDS = ("instruction", "input", "output")
_RESPONSE_HEADER = "### Response:"
# Stands for the output when a format function is asked where it writes it: no text of a row contains it, and
# no stripping or change of case alters it (characters of Unicode's private use area).
_PROBE = "\ue6a1\ue6a2\ue6a3"


class InstructionItem(NamedTuple):
    """One row: the ids of its prompt, then of its answer, without end of text; and the prompt's number of ids."""

    input_ids: list[int]
    prompt_length: int


def format_alpaca(entry: Row) -> str:
    r"""Return the Alpaca prompt of a row, up to and with "### Response:\n"; the answer is not part of it.

    The section "### Input:" is written where the row's input is not blank. The row needs the keys
    instruction and input ("" for none); without an output it serves as the prompt for generation.

    Source: the prompt of Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca.

    Raises:
        DataError: a field is missing or no text, or the instruction is blank.

    """
    instruction, context = (_text_field(entry, name) for name in ("instruction", "input"))
    if not instruction.strip():
        raise DataError("'instruction' is blank")
    if context.strip():
        return (
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n{_RESPONSE_HEADER}\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{_RESPONSE_HEADER}\n"
    )


def prompt_and_answer(entry: Row, format_fn: FormatFn = format_alpaca) -> tuple[str, str]:
    r"""Return a row's prompt and answer, as ``format_fn`` writes them; joined they are the training text.

    ``format_fn(entry)`` returns one of three things, told apart by what it does, not by what the text looks
    like:

    - a tuple (prompt, answer), taken as it is;
    - the whole text. The function is called once more with another output: the text up to the place that
      changes is the prompt, and all from there on, with whatever the function writes after it, is the answer;
    - a prompt alone, which does not change with the output. The answer is the row's output, after
      "\n\n### Response:\n" where the prompt does not end in that header, and on a new line where it does.

    Raises:
        DataError: one of the fields instruction, input and output is there and no text (None, a number,
            NaN); the function asks for a key that the row lacks; the output is missing, blank, or written
            twice; the text changes elsewhere than at the output; the prompt is empty.

    """
    for name in _FIELDS:
        if name in entry:
            _text_field(entry, name)
    formatted = _formatted(entry, format_fn)
    if isinstance(formatted, tuple):
        prompt, answer = formatted
    else:
        prompt, answer = _split(formatted, entry, format_fn)
    if not prompt:
        raise DataError("the prompt is empty")
    if not answer.strip():
        raise DataError("the answer is blank, and would train nothing")
    return prompt, answer


class InstructionDataset(Dataset[InstructionItem]):
    """Instruction rows as token ids: each item holds a prompt and its answer, and where the answer begins.

    Prompt and answer are encoded apart and joined, so that the boundary lies between two tokens, and a
    prompt has in training the ids that it has in generation. Text that looks like a special token is plain
    text to a tiktoken encoding. All rows are encoded at construction, and held as 32-bit ids.

    Args:
        data: rows, dicts with the texts instruction, input and output; what else they hold is for
            ``format_fn``.
        tokenizer: a tiktoken encoding or a tokenizer of transformers (no special tokens are added).
        format_fn: writes a row's text; see ``prompt_and_answer`` for what it may return.
        max_length: the most tokens of prompt and answer; the end of text that the batch appends is not
            counted, as it is a target only. None for no bound.
        truncation: what to do with a row above ``max_length``: "error", or "drop", which leaves the row out
            and notes its number in ``dropped``.

    Raises:
        UsageError: ``max_length`` or ``truncation`` is out of range.
        DataError: a row is not usable, named as data[number]; or no row is left.

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
        _check_max_length(max_length)
        if truncation not in ("error", "drop"):
            raise UsageError(unknown_name("truncation", str(truncation), ("error", "drop")))
        # Flat arrays, which the processes of a loader share; lists of int would take ten times the memory.
        self._ids = array("i")
        self._ends = array("q", [0])
        self._prompt_lengths = array("i")
        self.dropped: list[int] = []
        for number, entry in enumerate(data):
            prompt_ids, answer_ids = _encoded_row(number, entry, tokenizer, format_fn)
            length = len(prompt_ids) + len(answer_ids)
            if max_length is not None and length > max_length:
                if truncation == "error":
                    raise DataError(
                        f"data[{number}]: {length} tokens ({len(prompt_ids)} of the prompt), more than "
                        f'max_length={max_length}; raise it, or pass truncation="drop"'
                    )
                self.dropped.append(number)
                continue
            self._ids.extend(prompt_ids)
            self._ids.extend(answer_ids)
            self._ends.append(len(self._ids))
            self._prompt_lengths.append(len(prompt_ids))
        if not self._prompt_lengths:
            raise DataError(f"data: no row to train on ({len(self.dropped)} dropped as longer than {max_length})")

    def __len__(self) -> int:
        """Return the number of rows that were kept."""
        return len(self._prompt_lengths)

    def __getitem__(self, index: int) -> InstructionItem:
        """Return the item at ``index``, counted among the rows that were kept; negative from the end."""
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} in a dataset of {len(self)} rows")
        ids = self._ids[self._ends[position] : self._ends[position + 1]]
        return InstructionItem(ids.tolist(), self._prompt_lengths[position])


@dataclass(frozen=True, kw_only=True)
class InstructionCollator:
    """Joins items into (input, target), both (B, T) int64; ``create_instruction_collate_fn`` says how."""

    pad_token_id: int
    end_of_text_id: int
    ignore_index: int
    max_length: int | None
    truncation: Literal["error", "cut"]
    mask_instruction: bool
    device: torch.device | str | None

    def __post_init__(self) -> None:
        """Refuse what can train no row rightly."""
        for name, token_id in (("pad_token_id", self.pad_token_id), ("end_of_text_id", self.end_of_text_id)):
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise UsageError(f"{name}={token_id!r}: a token id, 0 or more")
        if self.ignore_index >= 0:
            raise UsageError(f"ignore_index={self.ignore_index}: below 0, so that it is no token's id")
        _check_max_length(self.max_length)
        if self.truncation not in ("error", "cut"):
            raise UsageError(unknown_name("truncation", str(self.truncation), ("error", "cut")))

    def __call__(self, items: Sequence[InstructionItem | Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (input, target), both (B, T) with T the length of the longest row."""
        rows = [self._row(number, item) for number, item in enumerate(items)]
        length = max(len(target) for _, target in rows)
        inputs = torch.full((len(rows), length), self.pad_token_id, dtype=torch.long)
        targets = torch.full((len(rows), length), self.ignore_index, dtype=torch.long)
        for i, (ids, target) in enumerate(rows):
            inputs[i, : len(ids)] = torch.tensor(ids[:length])
            targets[i, : len(target)] = torch.tensor(target)
        return inputs.to(self.device), targets.to(self.device)

    def _row(self, number: int, item: InstructionItem | Sequence[int]) -> tuple[list[int], list[int]]:
        """Return a row's ids with one end of text, and its target, one shorter."""
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
            self._check_cut(number, len(ids), prompt_length, self.max_length)
        limit = None if self.max_length is None else self.max_length + 1
        ids = [*ids, self.end_of_text_id][:limit]  # a cut row loses its end of text first: it did not end here
        target = ids[1:]
        if self.mask_instruction and prompt_length is not None:
            # The last token of the prompt predicts the first of the answer, which is trained.
            n_masked = max(prompt_length - 1, 0)
            target[:n_masked] = [self.ignore_index] * n_masked
        return ids, target

    def _check_cut(self, number: int, length: int, prompt_length: int | None, max_length: int) -> None:
        if self.truncation == "error":
            raise DataError(
                f"row {number} of the batch: {length} tokens, more than max_length={max_length}; raise it, "
                'drop such rows in the dataset, or pass truncation="cut"'
            )
        if prompt_length is not None and prompt_length > max_length:
            raise DataError(
                f"row {number} of the batch: its prompt of {prompt_length} tokens leaves no token of the "
                f"answer within max_length={max_length}"
            )


def create_instruction_collate_fn(
    pad_token_id: int,
    *,
    end_of_text_id: int | None = None,
    ignore_index: int = -100,
    max_length: int | None = None,
    truncation: Literal["error", "cut"] = "error",
    mask_instruction: bool = False,
    device: torch.device | str | None = None,
) -> InstructionCollator:
    """Return the ``collate_fn`` of a DataLoader that turns items into (input, target), both (B, T) int64.

    Each row gets one end of text, and padding to the longest row on the right. Target is the row shifted by
    one, for ``losses``, not for ``labels`` of transformers: its end of text is trained, its padding is not.
    Which tokens are trained is decided by position, never by id, so rows may hold the padding id themselves.

    Args:
        pad_token_id: fills the input, and ends each row unless ``end_of_text_id`` is another.
        end_of_text_id: ends each row; ``pad_token_id`` by default.
        ignore_index: the target that is not trained.
        max_length: the most tokens of an input row; None for no bound.
        truncation: what to do with a row above it: "error", or "cut", which keeps its beginning; the end of
            text of such a row is not trained.
        mask_instruction: train the answer and its end only, not the prompt.
        device: where the batch goes; the CPU by default, as loader processes should not touch an accelerator.

    Returns:
        A callable over a list of ``InstructionItem`` or of plain lists of ids; it can be pickled.

    Raises:
        UsageError: an argument is out of range; at a call, ``mask_instruction`` over plain lists of ids.
        DataError: at a call, a row is empty, too long, or would lose its whole answer.

    """
    return InstructionCollator(
        pad_token_id=pad_token_id,
        end_of_text_id=pad_token_id if end_of_text_id is None else end_of_text_id,
        ignore_index=ignore_index,
        max_length=max_length,
        truncation=truncation,
        mask_instruction=mask_instruction,
        device=device,
    )


def _text_field(entry: Row, name: str) -> str:
    if name not in entry:
        hint = ' ("" for a row without one)' if name == "input" else ""
        raise DataError(f"{name!r} is missing{hint}")
    value = entry[name]
    if not isinstance(value, str):
        raise DataError(f"{name!r} is {value!r} ({type(value).__name__}); it must be a text")
    return value


def _formatted(entry: Row, format_fn: FormatFn) -> str | tuple[str, str]:
    try:
        formatted = format_fn(entry)
    except KeyError as error:
        raise DataError(f"format_fn asks for {error}, which the row lacks") from error
    if isinstance(formatted, str):
        return formatted
    if isinstance(formatted, tuple) and [type(part) for part in formatted] == [str, str]:
        return formatted
    raise DataError(f"format_fn returned {formatted!r}; it must be a text or two, (prompt, answer)")


def _split(text: str, entry: Row, format_fn: FormatFn) -> tuple[str, str]:
    """Split the text of ``entry`` where its answer begins, or add the answer where it is a prompt alone."""
    output = _text_field(entry, "output")
    if not output.strip():
        raise DataError("'output' is blank, and would train nothing")
    try:
        probe = format_fn({**entry, "output": _PROBE})
    except Exception as error:
        raise DataError(
            "format_fn fails where only the output is another, so the answer cannot be told from the prompt; "
            "return (prompt, answer)"
        ) from error
    if probe == text:  # the output is not in it
        head = text.rstrip()
        if head.endswith(_RESPONSE_HEADER):
            return f"{head}\n", output
        return f"{text}\n\n{_RESPONSE_HEADER}\n", output
    parts = probe.split(_PROBE) if isinstance(probe, str) else []
    if len(parts) != 2:
        raise DataError(
            f"format_fn writes the output {max(len(parts) - 1, 0)} times, or another text at each call; write "
            "it once, or return (prompt, answer)"
        )
    prompt, tail = parts
    if len(text) <= len(prompt) + len(tail) or not (text.startswith(prompt) and text.endswith(tail)):
        raise DataError("format_fn changes more than the answer with the output; return (prompt, answer)")
    return prompt, text[len(prompt) :]


def _encoded_row(number: int, entry: Row, tokenizer: AnyTokenizer, format_fn: FormatFn) -> tuple[list[int], list[int]]:
    """Return the ids of a row's prompt and of its answer; an error names the row."""
    if not isinstance(entry, Mapping):
        raise DataError(f"data[{number}]: {entry!r:.60} ({type(entry).__name__}); a row is a dict")
    try:
        texts = prompt_and_answer(entry, format_fn)
        prompt_ids, answer_ids = (_encode(tokenizer, text) for text in texts)
    except DataError as error:
        raise DataError(f"data[{number}]: {error}") from error
    if not (prompt_ids and answer_ids):
        raise DataError(f"data[{number}]: the tokenizer makes no token of the prompt, or none of the answer")
    return prompt_ids, answer_ids


def _encode(tokenizer: AnyTokenizer, text: str) -> list[int]:
    if isinstance(tokenizer, tiktoken.Encoding):
        ids: list[int] = encode_ordinary_batch(tokenizer, [text])[0].tolist()
        return ids
    return list(tokenizer.encode(text, add_special_tokens=False))


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 1:
        raise UsageError(f"max_length={max_length}: 1 or more, or None for no bound")
