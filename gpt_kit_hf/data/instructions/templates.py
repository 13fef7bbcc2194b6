"""Chooses the chat template for instruction rows, and converts rows that it would prompt differently to messages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from gpt_kit_hf.data.instructions.conversations import CHAT_KEYS
from gpt_kit_hf.data.instructions.formats import alpaca_fields, as_messages, format_of, prompt_completion_fields
from gpt_kit_hf.data.instructions.rows import PlacedRow, RowError, set_aside
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import KEEP, RowFormat
from gpt_kit_hf.tokenization.chat_templates import get_chat_template, template_name

# The names of the chat templates that write the prompts of a format.
_TEMPLATE_OF = {"alpaca": "alpaca", "chat": "default", "prompt_completion": None, "text": None}


def with_template(
    rows: Iterator[PlacedRow], tokenizer: Any, choice: str, row_format: RowFormat = "auto"
) -> Iterator[PlacedRow]:
    """Set the tokenizer's chat template, and return the rows so that it writes the prompts of all of them.

    The template is set before this function returns: the one named by `choice`; for "keep" the tokenizer's own, or if
    it has none, the one that writes prompts as the format of the first row that has one does (none for prompt and
    completion, whose prompt is used as it is). Rows of another format become messages. UsageError is raised, when the
    rows are read, if the template would write other prompts than `row_format`.
    """
    if choice != KEEP:
        tokenizer.chat_template = get_chat_template(choice)
    elif tokenizer.chat_template is None:
        known, rows = _first_format(rows, row_format)
        name = None if known is None else _TEMPLATE_OF[known]
        tokenizer.chat_template = None if name is None else get_chat_template(name)
    return as_prompted(rows, tokenizer, row_format)


def as_prompted(rows: Iterator[PlacedRow], tokenizer: Any, row_format: RowFormat = "auto") -> Iterator[PlacedRow]:
    """Yield the rows so that the tokenizer's chat template, or none if it has none, writes the prompts of all of them.

    Raises UsageError as `with_template` does.
    """
    return (_as_prompted(placed, tokenizer, row_format) for placed in rows)


def _first_format(rows: Iterator[PlacedRow], row_format: RowFormat) -> tuple[str | None, Iterator[PlacedRow]]:
    """Return the format of the first row that has one, "chat" if none has, None without rows; and all rows again."""
    read: list[PlacedRow] = []
    try:
        for placed in rows:
            read.append(placed)
            if known := _known_format(placed.row, row_format):
                return known, chain(read, rows)
    except DataError as error:  # a row before it may be at fault, too, and is reported first
        return "chat", chain(read, _raising(error))
    return "chat" if read else None, iter(read)


def _raising(error: DataError) -> Iterator[PlacedRow]:
    raise error
    yield


def _as_prompted(placed: PlacedRow, tokenizer: Any, row_format: RowFormat) -> PlacedRow:
    template, known = tokenizer.chat_template, _known_format(placed.row, row_format)
    if template is None and known in ("alpaca", "chat"):
        raise UsageError(
            f"{placed.place}: a row of the format {known!r} needs a chat template, and the model has none, as "
            "prompts are used as they are in the first row: set chat_template to default, or give rows of one format"
        )
    known = known or "chat"  # the encoder reports what is wrong with the row
    if known in ("chat", "text") or (template and template_name(template)) == _TEMPLATE_OF[known]:
        return placed
    if row_format != "auto":
        raise UsageError(
            f"format={row_format!r} writes other prompts than the chat template that is saved with the model: leave "
            "format out, and rows become messages of the template, or set chat_template to one that writes them"
        )
    try:
        return PlacedRow(placed.place, _as_messages(placed.row, known, template))
    except RowError:
        return placed  # the encoder reports what is wrong with the row


def _known_format(row: dict[str, Any], row_format: RowFormat) -> str | None:
    if row_format != "auto":
        return row_format
    try:
        found = format_of(row)
    except RowError:
        return None
    return "chat" if found == "prompt_completion" and isinstance(row.get("prompt"), list) else found


def _as_messages(row: dict[str, Any], row_format: str, template: Any) -> dict[str, Any]:
    """Return the row as messages, with the keys that were not read; raises RowError."""
    fields, read = alpaca_fields(row) if row_format == "alpaca" else prompt_completion_fields(row)
    messages = as_messages(fields, headed_input=template_name(template) == "alpaca")
    others = {key: value for key, value in row.items() if key not in read}
    return {"messages": messages} | {set_aside(key) if key in CHAT_KEYS else key: each for key, each in others.items()}
