"""Formats of instruction rows: which one a row has, and its text or messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_kit_hf.data.instructions.reader import RowError, shown
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization.encodings import check_text

Row = Mapping[str, Any]
FormatFn = Callable[[Row], "str | tuple[str, str]"]
Message = dict[str, Any]

# The keys that identify a format; an Alpaca row's "input" may be "", but must be there, as in the kit.
FORMAT_KEYS = {
    "alpaca": ("instruction", "output"),
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
# ShareGPT's spelling of chat: {"from": ..., "value": ...} under the key conversations.
_SHAREGPT = "conversations"
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# These change the conversation or what is trained, so they must not be ignored.
_UNSUPPORTED = ("tool_calls", "function_call", "weight", "train")

_RESPONSE_HEADER = "### Response:"
# Replaces the output to find out where a format function writes it: no text of a row contains it, and neither
# stripping nor change of case alters it (characters of Unicode's private use area).
_PROBE = "\ue6a1\ue6a2\ue6a3"


def format_of(row: Row) -> str:
    """Return the format of a row by its keys: "alpaca", "chat" or "prompt_completion".

    A row with all keys of exactly one format has that format, whatever single key of another it has too. Raises
    RowError for a row of several formats or of none.
    """
    keys = {**FORMAT_KEYS, _SHAREGPT: (_SHAREGPT,)}
    complete = [name for name, needed in keys.items() if all(key in row for key in needed)]
    partial = [name for name, needed in keys.items() if any(key in row for key in needed)]
    found = complete or partial  # a partial one: the encoder then names the key that is missing
    if len(found) == 1:
        return "chat" if found[0] == _SHAREGPT else found[0]
    if found:
        seen = ", ".join(repr(key) for name in found for key in keys[name] if key in row)
        raise RowError("several formats", f"the keys {seen} are of several formats; say which by format")
    have = shown(", ".join(map(str, row))) if row else "none"
    raise RowError(
        "unknown format",
        "the row has neither 'messages', nor 'prompt' and 'completion', nor 'instruction', 'input' and 'output'; "
        f"its keys: {have}",
    )


def format_alpaca(entry: Row) -> str:
    r"""Return the Alpaca prompt of a row, up to and including "### Response:\n", without the answer.

    The section "### Input:" is written if the row's input is not blank. The row needs the keys instruction and input
    ("" for none), so it also gives the prompt for generation.

    Source: the prompt of Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca.

    Raises:
        DataError: a field is missing or not a string, or the instruction is blank.

    """
    instruction, context = text_field(entry, "instruction"), text_field(entry, "input", blank=True)
    task, section = "describes a task.", ""
    if context.strip():
        task = "describes a task, paired with an input that provides further context."
        section = f"### Input:\n{context}\n\n"
    return (
        f"Below is an instruction that {task} Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{section}{_RESPONSE_HEADER}\n"
    )


def format_prompt_completion(row: Row) -> tuple[str, str]:
    """Return the prompt and the completion of a row; raises RowError."""
    return text_field(row, "prompt"), text_field(row, "completion")


def prompt_and_answer(entry: Row, format_fn: FormatFn = format_alpaca) -> tuple[str, str]:
    r"""Return a row's prompt and answer as ``format_fn`` writes them; joined they are the training text.

    ``format_fn(entry)`` returns one of three things. Which one is found by calling it, not by looking at the text:

    - a tuple (prompt, answer), used as it is;
    - the whole text. The function is called again with another output: the text before the place that changes is
      the prompt, everything from there on is the answer;
    - a prompt alone, which does not change with the output. The answer is the row's output, after
      "\n\n### Response:\n" if the prompt does not end in that header, and on a new line if it does.

    Raises:
        DataError: one of the fields instruction, input and output is present and not a string (None, a number, NaN);
            the function asks for a key that the row lacks; the output is missing, blank, or written twice; the text
            changes elsewhere than at the output; the prompt is empty.

    """
    for name in ("instruction", "input", "output"):
        if name in entry:
            text_field(entry, name, blank=True)
    formatted = _formatted(entry, format_fn)
    prompt, answer = formatted if isinstance(formatted, tuple) else _split(formatted, entry, format_fn)
    if not prompt:
        raise RowError("format", "the prompt is empty")
    if not answer.strip():
        raise RowError("format", "the answer is blank, and would train nothing")
    return prompt, answer


def _formatted(entry: Row, format_fn: FormatFn) -> str | tuple[str, str]:
    try:
        formatted = format_fn(entry)
    except RowError:
        raise
    except KeyError as error:
        raise RowError("format", f"format_fn asks for {error}, which the row lacks") from error
    except Exception as error:
        # The function is the user's and may not expect such a row; the cause keeps its traceback.
        raise RowError("format", f"format_fn raised {type(error).__name__}: {shown(str(error))}") from error
    if isinstance(formatted, str) or (isinstance(formatted, tuple) and [*map(type, formatted)] == [str, str]):
        return formatted
    raise RowError("format", f"format_fn returned {formatted!r}; it must be a string, or two: (prompt, answer)")


def _split(text: str, entry: Row, format_fn: FormatFn) -> tuple[str, str]:
    """Return the prompt and the answer of a text of ``entry``, or add the answer if the text is a prompt alone."""
    output = text_field(entry, "output")
    try:
        probe = format_fn({**entry, "output": _PROBE})
    except Exception as error:
        reason = "format_fn fails if only the output changes, so the answer cannot be told from the prompt"
        raise RowError("format", f"{reason}; return (prompt, answer)") from error
    if probe == text:  # the output is not in it
        head = text.rstrip()
        prompt = head if head.endswith(_RESPONSE_HEADER) else f"{text}\n\n{_RESPONSE_HEADER}"
        return f"{prompt}\n", output
    pieces = probe.split(_PROBE) if isinstance(probe, str) else []
    if len(pieces) != 2:
        reason = f"format_fn writes the output {max(len(pieces) - 1, 0)} times, or another text at each call"
        raise RowError("format", f"{reason}; write it once, or return (prompt, answer)")
    prompt, tail = pieces
    if len(text) <= len(prompt) + len(tail) or not (text.startswith(prompt) and text.endswith(tail)):
        raise RowError("format", "format_fn changes more than the answer with the output; return (prompt, answer)")
    return prompt, text[len(prompt) :]


def text_field(row: Row, name: str, *, blank: bool = False) -> str:
    """Return a string of the row; raises RowError if it is missing, not a string, or blank and must not be."""
    value = required_field(row, name)
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name!r} is {shown(value)} ({type(value).__name__}); it must be a string")
    if not blank and not value.strip():
        raise RowError("blank", f"{name!r} is blank")
    return value


def required_field(row: Row, name: str) -> Any:
    """Return a value of the row; raises RowError if it is missing, null or NaN."""
    if name not in row:
        hint = ' ("" for a row without one)' if name == "input" else ""
        raise RowError("missing key", f"{name!r} is missing{hint}")
    value = row[name]
    if value is None:
        raise RowError("null", f"{name!r} is null; it must have a value")
    if isinstance(value, float) and value != value:
        raise RowError("NaN or infinity", f"{name!r} is NaN; it must be a string")
    return value


def check_is_object(row: Any) -> None:
    """Raise RowError unless the row is a dict."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"a row is a dict, got {shown(row)}")


def check_row_text(text: str, name: str) -> None:
    """Raise RowError for a lone surrogate, which Python's JSON accepts and no tokenizer can encode."""
    try:
        check_text(text, f"the {name}")
    except DataError as error:
        raise RowError("lone surrogate", str(error)) from None


def messages_of(row: Row) -> list[Message]:
    """Return the messages of a chat row, with ShareGPT's spelling translated; raises RowError."""
    if row.get("tools") is not None:
        raise RowError("wrong type", "'tools' is not supported; leave them out, or write the row by format_fn")
    if "messages" in row or _SHAREGPT not in row:
        return checked_messages(required_field(row, "messages"), "messages")
    turns = required_field(row, _SHAREGPT)
    if not isinstance(turns, list):
        raise RowError("wrong type", f"{_SHAREGPT!r} is {shown(turns)}; it must be a list")
    messages = []
    for number, turn in enumerate(turns):
        where = f"{_SHAREGPT}[{number}]"
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise RowError("wrong type", f"{where} must be an object with 'from' and 'value', got {shown(turn)}")
        if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise RowError("unknown role", f"{where}: unknown 'from' {shown(turn['from'])}; known: {known}")
        messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return checked_messages(messages, _SHAREGPT)


def checked_messages(messages: Any, name: str) -> list[Message]:
    """Return messages with role and content only; raises RowError. The chat template checks the roles."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError("wrong type", f"{name!r} is {shown(messages)}; it must be a list of messages")
    if not messages:
        raise RowError("blank", f"{name!r} is an empty list")
    checked = []
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if not isinstance(message, Mapping):
            raise RowError("wrong type", f"{where} is {shown(message)}; it must be an object with role and content")
        unsupported = next((key for key in _UNSUPPORTED if message.get(key) is not None), None)
        if unsupported is not None:
            raise RowError("wrong type", f"{where} has {unsupported!r}, which is not supported")
        try:
            role, content = text_field(message, "role"), text_field(message, "content", blank=True)
            check_row_text(role, "role")
            check_row_text(content, "content")
        except RowError as error:
            raise RowError(error.kind, f"{where}: {error}") from None
        if role == "assistant" and not content.strip():
            raise RowError("blank", f"{where}: the answer is blank")
        checked.append({"role": role, "content": content})
    return checked
