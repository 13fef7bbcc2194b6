"""Chooses the chat template for instruction rows, and converts rows that it would prompt differently to messages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from gpt_kit_hf.data.instructions.formats import format_of
from gpt_kit_hf.data.instructions.reader import PlacedRow, RowError
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.data import KEEP, RowFormat
from gpt_kit_hf.tokenization.chat_templates import ALPACA_TEMPLATE, DEFAULT_TEMPLATE, get_chat_template

_TEMPLATE_OF = {"alpaca": ALPACA_TEMPLATE, "chat": DEFAULT_TEMPLATE, "prompt_completion": None}


def with_template(
    rows: Iterator[PlacedRow], tokenizer: Any, choice: str, row_format: RowFormat = "auto"
) -> Iterator[PlacedRow]:
    """Set the tokenizer's chat template, and return the rows so that it writes the prompts of all of them.

    The template is set before this function returns: the one named by `choice`; for "keep" the tokenizer's own, or if
    it has none, the one that writes prompts as the first row's format does (none for prompt and completion, whose
    prompt is used as it is). Rows of another format become messages. UsageError is raised, when the rows are read, if
    the template would write other prompts than `row_format`.
    """
    first = next(rows, None)
    if choice != KEEP:
        tokenizer.chat_template = get_chat_template(choice)
    elif tokenizer.chat_template is None and first is not None:
        tokenizer.chat_template = _TEMPLATE_OF[_format(first.row, row_format)]
    return (_as_prompted(placed, tokenizer, row_format) for placed in chain([] if first is None else [first], rows))


def _as_prompted(placed: PlacedRow, tokenizer: Any, row_format: RowFormat) -> PlacedRow:
    known = _format(placed.row, row_format)
    if known == "chat" or tokenizer.chat_template == _TEMPLATE_OF[known]:
        return placed
    if row_format != "auto":
        raise UsageError(
            f"format={row_format!r} writes other prompts than the chat template that is saved with the model: leave "
            "format out, and rows become messages of the template, or set chat_template to one that writes them"
        )
    return PlacedRow(placed.place, _as_messages(placed.row, known))


def _format(row: dict[str, Any], row_format: RowFormat) -> str:
    if row_format != "auto":
        return row_format
    try:
        found = format_of(row)
    except RowError:
        return "chat"  # the encoder reports what is wrong with the row
    return "chat" if found == "prompt_completion" and isinstance(row.get("prompt"), list) else found


def _as_messages(row: dict[str, Any], row_format: str) -> dict[str, Any]:
    """Return the row as a question and an answer, or unchanged if a text is missing, for the encoder to report."""
    names = ("instruction", "output") if row_format == "alpaca" else ("prompt", "completion")
    question, answer = (row.get(name) for name in names)
    context = row.get("input", "") if row_format == "alpaca" else ""
    if not all(isinstance(text, str) for text in (question, answer, context)) or not str(answer).strip():
        return row
    content = f"{question}\n\n{context}" if context.strip() else question
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
