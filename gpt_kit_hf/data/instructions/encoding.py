"""One instruction row as token ids, and which are its answer: Alpaca fields, prompt and completion, or chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tiktoken
from jinja2 import TemplateError

from gpt_kit_hf.data.instructions.dataset import FormatFn, format_alpaca, prompt_and_answer
from gpt_kit_hf.data.instructions.reader import RowError, shown
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.tokenization.chat_templates import check_chat_template, render_chat, trained_spans
from gpt_kit_hf.tokenization.encodings import encode_ordinary_batch, end_of_text_id

if TYPE_CHECKING:
    from gpt_kit_hf.tokenization.encodings import AnyTokenizer

Message = dict[str, Any]

# The keys by which a format is told; an Alpaca row's "input" may be "", but must be there, as in the kit.
FORMAT_KEYS = {
    "alpaca": ("instruction", "output"),
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
_ALPACA_FIELDS = ("instruction", "input", "output")
# The spelling of ShareGPT: {"from": ..., "value": ...} under the key conversations.
_OTHER_SPELLING = "conversations"
_OTHER_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# They change what is said or what is trained; to leave them out would train something else.
_UNKNOWN_TO_TEMPLATES = ("tool_calls", "function_call", "weight", "train")


class EncodedRow(NamedTuple):
    """A row's ids, and for each of them whether it belongs to an answer or is the end of text after one."""

    input_ids: list[int]
    answer: list[bool]


class RowEncoder:
    """Encodes rows of one format, or of the format that the keys of each row tell ("auto").

    Prompt and answer of a text are encoded apart and joined, so that a prompt has in training the ids that it has in
    generation. Text that spells a special token is plain text in them, and a fault in a chat message, where it would
    be read as the template's own mark.

    Raises UsageError if the tokenizer has no end of text, or its chat template cannot tell what is trained.
    """

    def __init__(
        self, tokenizer: AnyTokenizer, row_format: str, format_fn: FormatFn | None, vocab_size: int | None
    ) -> None:
        end = end_of_text_id(tokenizer)
        if end is None:
            raise UsageError("the tokenizer has no end of text, so a model could not learn to end an answer")
        if vocab_size is not None and end >= vocab_size:
            raise UsageError(f"the end of text has id {end}, but the model's vocab_size is {vocab_size}")
        self.end_of_text_id = end
        self._tokenizer = tokenizer
        self._format = row_format
        self._format_fn = format_fn
        self._vocab_size = vocab_size
        self._chat_checked = False
        self._specials: list[str] = []
        if row_format == "chat" and format_fn is None:
            self._check_chat()

    def encode(self, row: Any) -> EncodedRow:
        """Return the row's ids and which are answers; raises RowError for a row that cannot be used."""
        if not isinstance(row, Mapping):
            raise RowError("not an object", f"a row is a dict, got {shown(row)}")
        if self._format_fn is not None:
            encoded = self._encode_texts(*_formatted(row, self._format_fn))
        else:
            encoded = self._encode_by_format(row)
        self._check_ids(encoded.input_ids)
        return encoded

    def _encode_by_format(self, row: Mapping[str, Any]) -> EncodedRow:
        row_format = format_of(row) if self._format == "auto" else self._format
        if row_format == "alpaca":
            for name in _ALPACA_FIELDS:
                text_field(row, name, blank=name == "input")
            return self._encode_texts(*_formatted(row, format_alpaca))
        if row_format == "chat":
            return self._encode_chat(_messages(row), 0)
        prompt, completion = (_required(row, name) for name in FORMAT_KEYS["prompt_completion"])
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._encode_chat(
                [*_checked_messages(prompt, "prompt"), *_checked_messages(completion, "completion")], len(prompt)
            )
        texts = (text_field(row, name) for name in FORMAT_KEYS["prompt_completion"])
        return self._encode_texts(*texts)

    def _encode_texts(self, prompt: str, answer: str) -> EncodedRow:
        prompt_ids, answer_ids = self._encode(prompt, "prompt"), self._encode(answer, "answer")
        if not (prompt_ids and answer_ids):
            raise RowError("blank", "the tokenizer makes no token of the prompt, or none of the answer")
        ids = [*prompt_ids, *answer_ids, self.end_of_text_id]
        return EncodedRow(ids, [False] * len(prompt_ids) + [True] * (len(answer_ids) + 1))

    def _encode(self, text: str, name: str) -> list[int]:
        _check_characters(text, name)
        if not isinstance(self._tokenizer, tiktoken.Encoding):
            # Not verbose: the row's length is checked, and said, by who asks.
            return list(
                self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            )
        try:
            ids: list[int] = encode_ordinary_batch(self._tokenizer, [text])[0].tolist()
        except DataError as error:
            raise RowError("cannot be encoded", str(error).replace("texts[0]", f"the {name}")) from error
        return ids

    def _encode_chat(self, messages: list[Message], n_context: int) -> EncodedRow:
        """Encode a conversation; assistant turns among the first `n_context` messages are not trained."""
        tokenizer = self._check_chat()
        roles = [message["role"] for message in messages]
        n_answers, n_context_answers = roles.count("assistant"), roles[:n_context].count("assistant")
        if n_answers == n_context_answers:
            raise RowError("no answer", "no message of the assistant, so nothing would be trained")
        for number, message in enumerate(messages):
            special = next((token for token in self._specials if token in message["content"]), None)
            if special is not None:
                raise RowError("special token", f"message {number} holds {special!r}, a special token, as text")
        try:
            ids, trained = render_chat(tokenizer, messages)
        except TemplateError as error:
            raise RowError("chat template", f"the chat template refuses the messages: {error}") from error
        spans = trained_spans(trained)
        if len(spans) != n_answers:
            raise RowError("chat template", f"the chat template marks {len(spans)} answers of {n_answers} as trained")
        answer = [False] * len(ids)
        for start, stop in spans[n_context_answers:]:
            if ids[stop - 1] != self.end_of_text_id:
                raise RowError("chat template", f"the chat template does not end the answer at token {stop - 1}")
            answer[start:stop] = [True] * (stop - start)
        return EncodedRow(ids, answer)

    def _check_chat(self) -> Any:
        """Return the tokenizer if it can write chat; the template is looked at once."""
        if isinstance(self._tokenizer, tiktoken.Encoding):
            raise UsageError(
                "chat rows need a tokenizer of transformers with a chat template, got a tiktoken.Encoding"
            )
        if not self._chat_checked:
            check_chat_template(self._tokenizer)
            self._specials = [token for token in self._tokenizer.all_special_tokens if token]
            self._chat_checked = True
        return self._tokenizer

    def _check_ids(self, ids: list[int]) -> None:
        if self._vocab_size is not None and max(ids) >= self._vocab_size:
            raise RowError(
                "id outside the vocabulary",
                f"the tokenizer gives id {max(ids)}, but the model's vocab_size is {self._vocab_size}",
            )


def _formatted(row: Mapping[str, Any], format_fn: FormatFn) -> tuple[str, str]:
    try:
        return prompt_and_answer(row, format_fn)
    except DataError as error:
        raise RowError("format", str(error)) from error
    except Exception as error:
        # The function is the user's, and the row may be what it did not expect; the cause keeps its traceback.
        raise RowError("format", f"format_fn raised {type(error).__name__}: {shown(str(error))}") from error


def format_of(row: Mapping[str, Any]) -> str:
    """Return the format that the row's keys tell: "alpaca", "chat" or "prompt_completion".

    A row that has all keys of one format only is of it, whatever single key of another it has, too. Raises RowError
    for a row of several formats or of none.
    """
    keys = {**FORMAT_KEYS, _OTHER_SPELLING: (_OTHER_SPELLING,)}
    whole = [name for name, needed in keys.items() if all(key in row for key in needed)]
    partly = [name for name, needed in keys.items() if any(key in row for key in needed)]
    # A key that is missing is then said by name.
    found = whole or partly
    if len(found) == 1:
        return "chat" if found[0] == _OTHER_SPELLING else found[0]
    if found:
        seen = ", ".join(repr(key) for name in found for key in keys[name] if key in row)
        raise RowError("several formats", f"the keys {seen} are of several formats; say which by format")
    have = shown(", ".join(map(str, row))) if row else "none"
    raise RowError(
        "unknown format",
        "the row has neither 'messages', nor 'prompt' and 'completion', nor 'instruction', 'input' and 'output'; "
        f"its keys: {have}",
    )


def text_field(row: Mapping[str, Any], name: str, *, blank: bool = False) -> str:
    """Return a text of the row; raises RowError if it is missing, no text, or blank where it must not be."""
    value = _required(row, name)
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name!r} is {shown(value)} ({type(value).__name__}); it must be a text")
    if not blank and not value.strip():
        raise RowError("blank", f"{name!r} is blank")
    return value


def _required(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        hint = ' ("" for a row without one)' if name == "input" else ""
        raise RowError("missing key", f"{name!r} is missing{hint}")
    value = row[name]
    if value is None:
        raise RowError("null", f"{name!r} is null; it must have a value")
    if isinstance(value, float) and value != value:
        raise RowError("NaN or infinity", f"{name!r} is NaN; it must be a text")
    return value


def _messages(row: Mapping[str, Any]) -> list[Message]:
    """Return a row's messages, also where they are spelled from and value under the key conversations."""
    if row.get("tools") is not None:
        raise RowError("wrong type", "'tools' is not supported; leave them out, or write the row by format_fn")
    if "messages" in row or _OTHER_SPELLING not in row:
        return _checked_messages(_required(row, "messages"), "messages")
    turns = _required(row, _OTHER_SPELLING)
    if not isinstance(turns, list):
        raise RowError("wrong type", f"{_OTHER_SPELLING!r} is {shown(turns)}; it must be a list")
    messages = []
    for number, turn in enumerate(turns):
        where = f"{_OTHER_SPELLING}[{number}]"
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise RowError("wrong type", f"{where} must be an object with 'from' and 'value', got {shown(turn)}")
        if not isinstance(turn["from"], str) or turn["from"] not in _OTHER_ROLES:
            known = ", ".join(_OTHER_ROLES)
            raise RowError("unknown role", f"{where}: unknown 'from' {shown(turn['from'])}; known: {known}")
        messages.append({"role": _OTHER_ROLES[turn["from"]], "content": turn["value"]})
    return _checked_messages(messages, _OTHER_SPELLING)


def _checked_messages(messages: Any, name: str) -> list[Message]:
    """Return messages with role and content only; the template says which roles it knows."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError("wrong type", f"{name!r} is {shown(messages)}; it must be a list of messages")
    if not messages:
        raise RowError("blank", f"{name!r} is an empty list")
    checked = []
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if not isinstance(message, Mapping):
            raise RowError("wrong type", f"{where} is {shown(message)}; it must be an object with role and content")
        unknown = next((key for key in _UNKNOWN_TO_TEMPLATES if message.get(key) is not None), None)
        if unknown is not None:
            raise RowError("wrong type", f"{where} has {unknown!r}, which is not supported")
        try:
            role, content = text_field(message, "role"), text_field(message, "content", blank=True)
            _check_characters(role, "role")
            _check_characters(content, "content")
        except RowError as error:
            raise RowError(error.kind, f"{where}: {error}") from None
        if role == "assistant" and not content.strip():
            raise RowError("blank", f"{where}: the answer is blank")
        checked.append({"role": role, "content": content})
    return checked


def _check_characters(text: str, name: str) -> None:
    """Refuse half of a pair of JSON escapes, which Python takes as a character and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "lone surrogate",
            f"the {name} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
            "which is no character",
        ) from None
