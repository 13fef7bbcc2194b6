"""A conversation as its model sees it: tokens by the role that wrote them, and whether training learns from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

from jinja2 import TemplateError

from gpt_kit_hf.errors import UsageError, one_line
from gpt_kit_hf.pages.models import OpenModel
from gpt_kit_hf.pages.server import Asked
from gpt_kit_hf.pages.views import Json, token_view
from gpt_kit_hf.tokenization.chat_templates import encode_rendered, render_text


class Turn(Asked):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def prompt_ids(opened: OpenModel, turns: Sequence[Turn]) -> list[int]:
    """Return the ids of a conversation up to the place where the model answers. Raises UsageError."""
    text = _rendered(opened, turns, add_generation_prompt=True)
    return list(opened.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def conversation_view(opened: OpenModel, turns: Sequence[Turn]) -> Json:
    """Return the tokens of a conversation, each with its role, whether it is trained, and its scores.

    What the template writes for the answer to come has the role "answer".
    """
    is_open = bool(turns) and turns[-1].role != "assistant"
    text = _rendered(opened, turns, add_generation_prompt=is_open)
    bounds = _bounds(opened, turns, text)
    _, spans = render_text(opened.tokenizer, _messages(turns))
    ids, trained = encode_rendered(opened.tokenizer, text, [span for span in spans if span[1] <= len(text)])
    reading, pieces = opened.reader.read(ids), opened.pieces(ids)
    ends = list(accumulate(map(len, pieces)))
    is_exact = ends[-1] == len(text.encode())
    tokens = []
    for n, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        role = _role_at(bounds, ends[n]) if is_exact else ""
        shown = token_view(opened, reading.beliefs, n, token, piece)
        tokens.append({**shown, "role": role, "trained": bool(trained[n])})
    return {"text": text, "tokens": tokens, "marks_answers": _marks_answers(opened), "has_roles": is_exact}


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [turn.model_dump() for turn in turns]


def _rendered(opened: OpenModel, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
    if opened.no_chat is not None:
        raise UsageError(opened.no_chat)
    if not turns:
        raise UsageError("the conversation is empty")
    for turn in turns:
        found = next((token for token in opened.tokenizer.all_special_tokens if token in turn.content), None)
        if found is not None and turn.role != "assistant":
            raise UsageError(f"{found!r} in a message would be read as that special token: remove it")
    try:
        text = opened.tokenizer.apply_chat_template(
            _messages(turns), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:  # what a template does is its author's choice
        raise UsageError(f"the chat template rejects the messages: {one_line(error)}") from None
    return str(text)


def _bounds(opened: OpenModel, turns: Sequence[Turn], text: str) -> list[tuple[int, str]]:
    """Return where the text of each turn ends, in bytes, with its role; the last end is that of the whole text.

    A turn ends where the template would end without the turns after it. Where it writes that otherwise, the turn is
    counted to the next one.
    """
    bounds: list[tuple[int, str]] = []
    for n, turn in enumerate(turns, 1):
        try:
            part = _rendered(opened, turns[:n], add_generation_prompt=False)
        except UsageError:  # a template may refuse a system message alone
            continue
        if text.startswith(part):
            bounds.append((len(part.encode()), turn.role))
    whole = len(text.encode())
    if not bounds or bounds[-1][0] < whole:
        bounds.append((whole, "answer"))
    return bounds


def _role_at(bounds: Sequence[tuple[int, str]], end: int) -> str:
    """Return the role of a token that ends at a byte; one that reaches into two turns belongs to the second."""
    return next(role for bound, role in bounds if end <= bound)


def _marks_answers(opened: OpenModel) -> bool:
    template = opened.tokenizer.chat_template
    sources = template.values() if isinstance(template, dict) else [template]
    return any(re.search(r"{%-?\s*generation\s*-?%}", str(source)) for source in sources)
