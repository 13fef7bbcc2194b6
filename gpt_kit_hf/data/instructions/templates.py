"""Rows of any form, in the prompts that the tokenizer's chat template writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpt_kit_hf.data.instructions.encoding import format_of
from gpt_kit_hf.data.instructions.reader import PlacedRow, RowError
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.data import KEEP, RowFormat
from gpt_kit_hf.tokenization.chat_templates import ALPACA_TEMPLATE, DEFAULT_TEMPLATE, get_chat_template

_TEMPLATE_OF = {"alpaca": ALPACA_TEMPLATE, "chat": DEFAULT_TEMPLATE, "prompt_completion": None}


def with_template(
    rows: Iterator[PlacedRow], tokenizer: Any, choice: str, row_format: RowFormat = "auto"
) -> Iterator[PlacedRow]:
    """Hand the rows on, so that prompts are written as the tokenizer's chat template writes them, whatever asks later.

    The template is the one chosen; by "keep" the tokenizer's own; where it has none, the one whose prompts are the
    first row's (for prompt and completion none, which asks with the prompt as it stands). Rows of another form become
    messages of the template. Raises UsageError for a `row_format` that another template than the tokenizer's writes.
    """
    for index, placed in enumerate(rows):
        form = _form(placed.row) if row_format == "auto" else row_format
        if index == 0:
            if choice != KEEP:
                tokenizer.chat_template = get_chat_template(choice)
            elif tokenizer.chat_template is None:
                tokenizer.chat_template = _TEMPLATE_OF[form]
        if form == "chat" or tokenizer.chat_template == _TEMPLATE_OF[form]:
            yield placed
        elif row_format != "auto":
            raise UsageError(
                f"format={row_format!r} writes other prompts than the chat template that is saved with the model: "
                "leave format out, and rows become messages of the template, or set chat_template to what writes them"
            )
        else:
            yield PlacedRow(placed.place, _as_messages(placed.row, form))


def _form(row: dict[str, Any]) -> str:
    try:
        form = format_of(row)
    except RowError:
        return "chat"  # whatever it is, the encoder says what is wrong with it
    is_messages = form == "prompt_completion" and isinstance(row.get("prompt"), list)
    return "chat" if is_messages else form


def _as_messages(row: dict[str, Any], form: str) -> dict[str, Any]:
    """Return the row as a question and an answer; one that lacks a text as it is, for the encoder to refuse."""
    names = ("instruction", "output") if form == "alpaca" else ("prompt", "completion")
    question, answer = (row.get(name) for name in names)
    more = row.get("input", "") if form == "alpaca" else ""
    if not all(isinstance(text, str) for text in (question, answer, more)) or not (str(answer).strip()):
        return row
    content = f"{question}\n\n{more}" if more.strip() else question
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
