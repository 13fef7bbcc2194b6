"""The messages of OpenAI's API as the prompt that a model's chat template makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from gpt_kit_hf.errors import one_line
from gpt_kit_hf.generation.engine import Tokenizer
from gpt_kit_hf.generation.openai_api.protocol import ApiError, Message

# What links the result of a tool or function to its call; the order of the messages tells the same.
_LINKS = {"tool": {"tool_call_id", "name"}, "function": {"tool_call_id", "name"}}


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Return the text of a conversation up to the place where the model answers.

    Raises ApiError if the tokenizer has no chat template, if the template rejects the messages, if it leaves a field
    or a message of theirs out, and for a special token in their text, which would be read as that token.
    """
    if tokenizer.chat_template is None:
        raise ApiError(
            "this model has no chat template, so it cannot answer messages: use /v1/completions with a prompt",
            param="messages",
            code="no_chat_template",
        )
    knows_developer = "developer" in str(tokenizer.chat_template)
    turns = [_turn(index, message, knows_developer) for index, message in enumerate(messages)]
    _check_special_tokens(turns, tokenizer.all_special_tokens)

    def render(turns: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    try:
        prompt = render(turns)
        _check_complete(render, turns, prompt)
    except (TemplateError, TypeError, ValueError, KeyError) as error:  # what a template does is its author's choice
        raise ApiError(f"the chat template rejects the messages: {one_line(error)}", param="messages") from None
    return prompt


def _turn(index: int, message: Message, knows_developer: bool) -> dict[str, Any]:
    """Return a message as chat templates expect it; fields without content are left out."""
    role = "system" if message.role == "developer" and not knows_developer else message.role
    extra = {name: value for name, value in (message.model_extra or {}).items() if value not in (None, "", [], {})}
    if message.content is None and not extra:
        raise ApiError(f"messages[{index}].content is missing", param=f"messages[{index}].content")
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(index, extra["tool_calls"])
    return {"role": role, "content": message.content or "", **extra}


def _tool_calls(index: int, calls: Any) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, as templates expect them; the API has them as JSON."""
    try:
        return [{**call, "function": {**call["function"], "arguments": _arguments(call)}} for call in calls]
    except (TypeError, KeyError, ValueError):
        param = f"messages[{index}].tool_calls"
        raise ApiError(f"{param} must be a list of function calls, with arguments as JSON", param=param) from None


def _arguments(call: dict[str, Any]) -> Any:
    arguments = call["function"].get("arguments") or {}
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _check_special_tokens(turns: list[dict[str, Any]], tokens: Sequence[str]) -> None:
    """Raise ApiError for a special token in a text that the model did not write itself."""
    for index, turn in enumerate(turns):
        found = next((token for token in tokens if token and token in turn["content"]), None)
        if found is not None and turn["role"] != "assistant":
            param = f"messages[{index}].content"
            reason = "a special token of this model, which cannot be written as text: remove it"
            raise ApiError(f"{param} holds {found!r}, {reason}", param=param, code="invalid_value")


def _check_complete(render: Callable[[Any], str], turns: list[dict[str, Any]], prompt: str) -> None:
    """Raise ApiError if the prompt is the same without a field: then the template does not write it."""
    for index, turn in enumerate(turns):
        extra = turn.keys() - {"role", "content"} - _LINKS.get(turn["role"], set())
        for field in sorted(extra):
            without = {name: value for name, value in turn.items() if name != field}
            if render([*turns[:index], without, *turns[index + 1 :]]) == prompt:
                raise _left_out(index, field)
        # Templates write the plain content of these roles, or fail.
        is_plain = turn["role"] in ("user", "assistant") and not extra
        if turn["content"] and not is_plain:
            other = {**turn, "content": turn["content"] + "x"}
            if render([*turns[:index], other, *turns[index + 1 :]]) == prompt:
                raise _left_out(index, "content", f" of a message with the role {turn['role']!r}")


def _left_out(index: int, field: str, which: str = "") -> ApiError:
    param = f"messages[{index}].{field}"
    return ApiError(
        f"{param} is not supported: the chat template of this model does not write the {field}{which}",
        param=param,
        code="unsupported_parameter",
    )
