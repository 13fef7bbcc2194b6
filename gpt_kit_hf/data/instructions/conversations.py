"""Chat rows: turns in the spellings of OpenAI and ShareGPT as messages, and which answers are trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt_kit_hf.data.instructions.rows import (
    CONVERSATIONS,
    SYSTEMS,
    RowError,
    check_row_text,
    holds,
    keys_of,
    list_in,
    listed,
    required_field,
    shown,
    text_field,
    without_thinking,
)
from gpt_kit_hf.options.data import Thinking

Message = dict[str, Any]

SYSTEM_ROLES = ("system", "developer")
# The names of roles in well-known data sets, and the roles that chat templates know.
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
    **{role: role for role in (*SYSTEM_ROLES, "user", "assistant", "tool", "function")},
}
CHAT_KEYS = {*CONVERSATIONS, *SYSTEMS, "tools"}  # of a row
_MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")
# Marks of parts of an answer, by offsets of characters.
_SPAN_MARKS = ("train_detail", "training_detail")
_THINKING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Keys that a message has for the chat template only.
PASSED_ON = ("name", "tool_call_id")


@dataclass
class Conversation:
    """Messages for a chat template.

    Attributes:
        name: the key of the row that held them.
        messages: dicts with the keys that chat templates know.
        trained: for each message, whether it is an answer that is trained.
        excludes: whether a mark excludes a turn from training.
        tools: definitions of tools.

    """

    name: str
    messages: list[Message]
    trained: list[bool]
    excludes: bool = False
    tools: list[Any] | None = None


class ChatReader:
    """Reads conversations, and counts in `unread` each key of a turn that is not read.

    `thinking_left_out` counts the answers whose thinking was left out.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self.unread: Counter[str] = Counter()
        self.thinking_left_out = 0

    def row(self, row: Mapping[str, Any]) -> tuple[Conversation, set[str]]:
        """Return the conversation of a chat row, and the keys that were read; raises RowError."""
        name = _key(row, *CONVERSATIONS) or CONVERSATIONS[0]
        return _with_system_and_tools(self.turns(required_field(row, name), name), row, {name})

    def two_lists(self, row: Mapping[str, Any]) -> tuple[Conversation, set[str]]:
        """Return the conversation of a row of two lists of turns, prompt and completion; the second is trained."""
        prompt, found = (self.turns(row[name], name) for name in ("prompt", "completion"))
        found.messages = prompt.messages + found.messages
        found.trained = [False] * len(prompt.messages) + found.trained
        found.excludes |= prompt.excludes
        return _with_system_and_tools(found, row, {"prompt", "completion"})

    def turns(self, turns: Any, name: str) -> Conversation:
        """Return the messages of a list of turns; raises RowError."""
        turns = list_in(turns)
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise RowError("wrong type", f"{name!r} is {shown(turns)}; it must be a list of messages, or one in JSON")
        if not turns:
            raise RowError("blank", f"{name!r} is an empty list")
        read = []
        for number, turn in enumerate(turns):
            try:
                read.append(self._turn(turn, name))
            except RowError as error:
                raise RowError(error.kind, f"{name}[{number}]: {error}") from None
        excludes = any(turn.get(key) is not None and not turn[key] for turn in turns for key in _MARKS)
        return Conversation(name, [message for message, _ in read], [trained for _, trained in read], excludes)

    def _turn(self, turn: Any, name: str) -> tuple[Message, bool]:
        if not isinstance(turn, Mapping):
            raise RowError("wrong type", f"a message is an object with role and content, got {shown(turn)}")
        role_key = _key(turn, "role", "from")
        text_key = _key(turn, "content", "value") or ("value" if role_key == "from" else "content")
        role_key = role_key or ("from" if text_key == "value" else "role")
        calls = _tool_calls(turn)
        missing = [key for key in (role_key, text_key) if key not in turn and not (calls and key == text_key)]
        if missing:
            raise RowError("missing key", f"{listed(missing, 'is', 'are')} missing; {keys_of(turn)}")
        role = text_field(turn, role_key)
        check_row_text(role, "role")
        if role_key == "from" and _role(role) not in _ROLES:
            raise RowError("unknown role", f"unknown 'from' {shown(role)}; known: {', '.join(_ROLES)}")
        role = _role(role)
        content = "" if calls and not turn.get(text_key) else self._text(turn, text_key, name)
        message: Message = {"role": role, "content": content}
        read = {role_key, text_key, *PASSED_ON, *_MARKS, "tool_calls", "function_call"}
        message |= {key: turn[key] for key in PASSED_ON if holds(turn.get(key))}
        if calls:
            message["tool_calls"] = calls
        if role == "assistant":
            message["content"] = self.answer(content, optional=bool(calls))
            message |= self._thinking_of(turn)
            read |= {*_THINKING}
        elif calls:
            raise RowError("wrong type", f"a turn of {role!r} has tool calls; only those of the assistant can")
        self.unread.update(f"{name}[].{key}" for key, value in turn.items() if key not in read and holds(value))
        return message, _is_trained(turn, role)

    def _text(self, turn: Mapping[str, Any], key: str, name: str) -> str:
        """Return the text of a turn; parts of text are joined by line ends."""
        if not isinstance(turn[key], list):
            text = text_field(turn, key, blank=True)
            check_row_text(text, key)
            return text
        texts = []
        for part in turn[key]:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(part, Mapping) or kind not in _TEXT_PARTS:
                what = f"of type {kind!r}" if isinstance(part, Mapping) else shown(part)
                raise RowError(
                    "wrong type", f"{key!r} holds a part {what}; only parts of type 'text' can be trained on"
                )
            texts.append(text_field(part, "text", blank=True))
            check_row_text(texts[-1], key)
            others = (each for each, value in part.items() if each not in ("type", "text") and holds(value))
            self.unread.update(f"{name}[].{key}[].{each}" for each in others)
        return "\n".join(texts)

    def answer(self, text: str, *, optional: bool = False) -> str:
        """Return an answer, without its thinking if that is left out; raises RowError if it is blank."""
        kept = without_thinking(text) if self._thinking == "drop" else text
        if not (optional or kept.strip()):
            raise RowError("blank", "the answer is blank" + (" apart from its thinking" if text.strip() else ""))
        self.thinking_left_out += len(kept) < len(text)
        return kept

    def _thinking_of(self, turn: Mapping[str, Any]) -> Message:
        key = next((key for key in _THINKING if holds(turn.get(key))), None)
        if key is None or not (text := text_field(turn, key, blank=True)).strip():
            return {}
        if self._thinking == "drop":
            self.thinking_left_out += 1
            return {}
        check_row_text(text, key)
        return {"reasoning_content": text, "thinking": text}  # the names that templates know


def _role(name: str) -> str:
    """Return the name that chat templates have for a role; one that is not known as it is."""
    return _ROLES.get(name) or _ROLES.get(name.lower(), name)


def _key(turn: Mapping[str, Any], *names: str) -> str | None:
    """Return the name under which a turn holds a value, or else a null."""
    return next((n for n in names if holds(turn.get(n))), None) or next((n for n in names if n in turn), None)


def _is_trained(turn: Mapping[str, Any], role: str) -> bool:
    """Return whether a turn is an answer that its marks do not exclude; raises RowError for a mark without meaning."""
    if found := [key for key in _SPAN_MARKS if holds(turn.get(key))]:
        raise RowError(
            "mark",
            f"{found[0]!r} marks parts of a turn, which cannot be trained apart: mark whole turns by 'train', or "
            "split the row",
        )
    marks = {key: turn[key] for key in _MARKS if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise RowError("wrong type", f"{key!r} is {shown(mark)}; it must be 0 or 1, or false or true")
        if mark and role != "assistant":
            raise RowError(
                "mark",
                f"{key!r} is {shown(mark)} for a turn of {role!r}; only answers can be trained: remove the mark",
            )
    if len({bool(mark) for mark in marks.values()}) > 1:
        raise RowError("mark", f"{listed([*marks], '', 'contradict')} each other")
    return role == "assistant" and all(marks.values())


def _with_system_and_tools(
    found: Conversation, row: Mapping[str, Any], read: set[str]
) -> tuple[Conversation, set[str]]:
    """Add a row's own system text, as the first message, and its tools; raises RowError for two system texts."""
    found.tools = _tools_of(row)
    key = next((key for key in SYSTEMS if holds(row.get(key))), SYSTEMS[0])
    system = text_field(row, key, blank=True) if holds(row.get(key)) else ""
    first = found.messages[0]
    if system.strip() and first["role"] not in SYSTEM_ROLES:
        check_row_text(system, key)
        found.messages.insert(0, {"role": "system", "content": system})
        found.trained.insert(0, False)
    elif system.strip() and first["content"].strip() != system.strip():
        raise RowError(
            "several formats", f"{key!r} and the first turn are two different system texts; keep one of them"
        )
    return found, {*read, key, "tools"}


def _tool_calls(turn: Mapping[str, Any]) -> list[Any]:
    """Return the tool calls of a turn, with their arguments as objects; raises RowError."""
    calls: Any = turn.get("tool_calls")
    if holds(turn.get("function_call")):
        calls = [{"type": "function", "function": turn["function_call"]}]
    if not holds(calls):
        return []
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("wrong type", f"a tool call is an object with the name of a function, got {shown(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"the arguments of the tool call {function['name']!r}", dict)
        function = {"name": function["name"], "arguments": arguments or {}}
        found.append({**({"id": call["id"]} if call.get("id") else {}), "type": "function", "function": function})
    return found


def _tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the definitions of tools that a row has; raises RowError."""
    tools = row.get("tools")
    if not holds(tools) or (isinstance(tools, str) and not tools.strip()):
        return None
    if isinstance(tools, str):
        tools = _from_json(tools, "'tools'", list)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong type", f"'tools' is {shown(tools)}; it must be a list of objects")
    return tools or None


def _from_json(text: str, what: str, kind: type) -> Any:
    """Return the list or dict that a string of JSON holds; raises RowError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise RowError(
            "wrong type", f"{what} must be JSON of {'an object' if kind is dict else 'a list'}, got {shown(text)}"
        )
    return value


def unwritten(conversation: Conversation, text: str) -> tuple[str | None, list[str]]:
    """Return what a chat template left out of its text and must not, or None; and the keys that it may leave out.

    A system text may stand anywhere, as some templates move it; the turns are looked for in order.
    """
    position = 0
    may: list[str] = []
    for tool in conversation.tools or ():
        if _end_in(text, str(tool.get("function", tool).get("name", "")), 0) is None:
            return "the tools", may
    for message in conversation.messages:
        role = message["role"]
        parts = [("the thinking of an answer", message["thinking"])] if "thinking" in message else []
        parts.append((f"a turn of the role {role!r}", message["content"]))
        parts += [("the tool calls", call["function"]["name"]) for call in message.get("tool_calls", ())]
        for what, value in parts:
            end = _end_in(text, value, 0 if role in SYSTEM_ROLES else position)
            if end is None and (value != message["content"] or role not in ("user", "assistant")):
                return what, may  # of a question or answer a template may write less, such as without its thinking
            position = end if end is not None and role not in SYSTEM_ROLES else position
        may += [key for key in PASSED_ON if key in message and _end_in(text, str(message[key]), 0) is None]
    return None, may


def _end_in(text: str, value: str, start: int) -> int | None:
    """Return where a value ends in a text, as it is or escaped as in JSON, or None if it is not there."""
    value = value.strip()
    if (found := text.find(value, start)) >= 0:
        return found + len(value)
    for ascii_only in (False, True):
        written = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        if (found := text.find(written, start)) >= 0:
            return found + len(written)
    return None
