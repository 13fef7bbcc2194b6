"""Encodes one instruction row: token ids, and which of them belong to an answer."""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import tiktoken
from jinja2 import TemplateError

from gpt_kit_hf.data.instructions.conversations import ChatReader, Conversation, unwritten
from gpt_kit_hf.data.instructions.formats import (
    FormatFn,
    Row,
    alpaca_fields,
    as_messages,
    format_alpaca,
    format_of,
    format_prompt_completion,
    prompt_and_answer,
    prompt_completion_fields,
)
from gpt_kit_hf.data.instructions.rows import (
    RowError,
    check_is_object,
    check_row_text,
    holds,
    listed,
    row_marks,
    text_field,
)
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import SupervisionOptions, UnknownKeys
from gpt_kit_hf.tokenization.chat_templates import (
    ALPACA_TEMPLATE,
    check_chat_template,
    encode_rendered,
    render_text,
    trained_spans,
)
from gpt_kit_hf.tokenization.encodings import encode_ordinary, get_eos_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gpt_kit_hf.tokenization.encodings import AnyTokenizer

# What stands for a role in templates that do not know it.
_OTHER_ROLE = {"developer": "system", "function": "tool"}


def encode_text_row(
    row: Any, format_fn: FormatFn, tokenizer: AnyTokenizer, *, split_special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """Return the ids of a row's prompt and of its answer, as `format_fn` writes them (see `prompt_and_answer`).

    The two are encoded separately, so that a prompt has the same ids in training and in generation. A special token
    spelled out in a text is plain text with a tiktoken encoding, and with a tokenizer of transformers if
    `split_special_tokens`. Raises RowError.
    """
    check_is_object(row)
    prompt_ids, answer_ids = (
        encode_plain(text, name, tokenizer, split_special_tokens=split_special_tokens)
        for text, name in zip(prompt_and_answer(row, format_fn), ("prompt", "answer"), strict=True)
    )
    if not (prompt_ids and answer_ids):
        raise RowError("blank", "the tokenizer makes no token of the prompt, or none of the answer")
    return prompt_ids, answer_ids


def encode_plain(text: str, name: str, tokenizer: AnyTokenizer, *, split_special_tokens: bool = True) -> list[int]:
    """Return the ids of a text, which `name` names in messages; raises RowError."""
    check_row_text(text, name)
    if not isinstance(tokenizer, tiktoken.Encoding):
        # Not verbose: the caller checks the length.
        options = {"split_special_tokens": True, "verbose": False} if split_special_tokens else {}
        return list(tokenizer.encode(text, add_special_tokens=False, **options))
    try:
        return [*encode_ordinary(tokenizer, text, f"the {name}").tolist()]
    except DataError as error:
        raise RowError("cannot be encoded", str(error)) from error


class EncodedRow(NamedTuple):
    """A row's ids, and for each of them whether it belongs to an answer or is the EOS after one."""

    input_ids: list[int]
    answer: list[bool]


class RowEncoder:
    """Encodes rows of one format, or each row in the format that its keys identify ("auto").

    A special token spelled out in a row is plain text in prompts and completions, and a fault in a chat message, where
    it would be read as a token of the template. `unread` counts each key of rows and turns that is not read, and
    `thinking_left_out` the answers whose thinking is left out, in the rows that could be used.

    Raises UsageError if the tokenizer has no EOS, or its chat template does not mark the answers.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        options: SupervisionOptions,
        format_fn: FormatFn | None,
        vocab_size: int | None,
        unknown_keys: UnknownKeys = "report",
        *,
        text_rows: bool = False,
    ) -> None:
        eos = get_eos_token_id(tokenizer)
        if eos is None:
            raise UsageError("the tokenizer has no EOS, so a model could not learn to end an answer")
        if vocab_size is not None and eos >= vocab_size:
            raise UsageError(f"EOS has id {eos}, but the model's vocab_size is {vocab_size}")
        self.eos_token_id = eos
        self.unread: Counter[str] = Counter()
        self.thinking_left_out = 0
        self._tokenizer = tokenizer
        self._options = options
        self._format_fn = format_fn
        self._vocab_size = vocab_size
        self._unknown_keys = unknown_keys
        self._text_rows = text_rows or options.train_on == "everything"
        self._chats = ChatReader(options.thinking)
        if options.format == "chat" and format_fn is None:
            _ = self._template_is_checked  # an error before the first row is read

    def encode(self, row: Any) -> EncodedRow:
        """Return the row's ids and which of them are answers; raises RowError for a row that cannot be used."""
        check_is_object(row)
        self._chats.unread, self._chats.thinking_left_out = Counter(), 0
        if self._format_fn is not None:
            encoded = self._encode_text(row, self._format_fn)
        else:
            encoded = self._encode_by_format(row)
        highest = max(encoded.input_ids)
        if self._vocab_size is not None and highest >= self._vocab_size:
            reason = f"the tokenizer gives id {highest}, but the model's vocab_size is {self._vocab_size}"
            raise RowError("id outside the vocabulary", reason)
        if self._chats.unread and self._unknown_keys == "error":
            unread = listed([*self._chats.unread], "is not read; remove it", "are not read; remove them")
            raise RowError("unknown key", f"{unread}, or set unknown_keys to report")
        self.unread += self._chats.unread
        self.thinking_left_out += self._chats.thinking_left_out
        return encoded

    def _encode_by_format(self, row: Row) -> EncodedRow:
        row_format = format_of(row) if self._options.format == "auto" else self._options.format
        marks = row_marks(row) if row_format != "text" else set()
        two_lists = all(isinstance(row.get(name), list) for name in ("prompt", "completion"))
        if row_format == "chat" or (row_format == "prompt_completion" and two_lists):
            conversation, read = self._chats.row(row) if row_format == "chat" else self._chats.two_lists(row)
            self._note_unread(row, read | marks)
            return self._encode_chat(conversation)
        if row_format == "alpaca":
            fields, read = alpaca_fields(row)
            fields["output"] = self._chats.answer(fields["output"])
            self._note_unread(row, read | marks)
            if fields["system"].strip() or fields["history"]:
                messages = as_messages(fields, headed_input=True)
                return self._encode_chat(self._chats.turns(messages, "messages"), ALPACA_TEMPLATE)
            return self._encode_text(fields, format_alpaca)
        if row_format == "text":
            self._note_unread(row, {"text"})
            return self._encode_whole(row)
        fields, read = prompt_completion_fields(row)
        self._note_unread(row, read | marks)
        return self._encode_text({**row, "completion": self._chats.answer(fields["output"])}, format_prompt_completion)

    def _note_unread(self, row: Row, read: set[str]) -> None:
        self._chats.unread.update(str(key) for key, value in row.items() if key not in read and holds(value))

    def _encode_text(self, row: Row, format_fn: FormatFn) -> EncodedRow:
        prompt_ids, answer_ids = encode_text_row(row, format_fn, self._tokenizer)
        answer = [False] * len(prompt_ids) + [True] * (len(answer_ids) + 1)
        return EncodedRow([*prompt_ids, *answer_ids, self.eos_token_id], answer)

    def _encode_whole(self, row: Row) -> EncodedRow:
        """Encode a text without marks, of which all is trained."""
        text = text_field(row, "text")
        if not self._text_rows:
            raise RowError(
                "text",
                "a row of 'text' does not say which part is the answer; give train_on everything to train all of it, "
                "or train on it by gpt-kit train",
            )
        ids = encode_plain(text, "text", self._tokenizer)
        return EncodedRow([*ids, self.eos_token_id], [False, *[True] * len(ids)])

    def _encode_chat(self, conversation: Conversation, template: str | None = None) -> EncodedRow:
        """Encode a conversation by the tokenizer's chat template, or by `template`."""
        tokenizer, special_tokens = self._chat_tokenizer
        assert template is not None or self._template_is_checked
        messages, trained = conversation.messages, conversation.trained
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self._options.train_on == "last_answer":
            trained = [mark and number == answers[-1] for number, mark in enumerate(trained)]
        if not any(trained):
            which = "the last" if self._options.train_on == "last_answer" else "each"
            only = "" if answers else ", only " + ", ".join(dict.fromkeys(message["role"] for message in messages))
            marked = f"{which} answer is marked as not trained"
            why = marked if conversation.excludes else f"no message of the assistant{only}"
            raise RowError("no answer", f"{why}, so nothing would be trained")
        if conversation.excludes and self._options.train_on == "everything":
            raise RowError("mark", "a turn is marked as not trained, which train_on everything cannot obey")
        for number, message in enumerate(messages):
            special = next((token for token in special_tokens if _occurs(token, message)), None)
            if special is not None:
                raise RowError(
                    "special token", f"message {number} holds {special!r}, a special token, as text: remove it"
                )
        text, spans = self._rendered(conversation, template)
        if len(spans) != len(answers):
            raise RowError(
                "chat template", f"the chat template marks {len(spans)} answers of {len(answers)} as trained"
            )
        ids, marks = encode_rendered(tokenizer, text, spans)
        token_spans = trained_spans(marks)
        if len(token_spans) != len(answers):
            raise RowError("chat template", "the chat template writes two answers without anything between them")
        answer = [False] * len(ids)
        for number, (start, stop) in zip(answers, token_spans, strict=True):
            if ids[stop - 1] != self.eos_token_id:
                raise RowError("chat template", f"the chat template does not end the answer at token {stop - 1}")
            answer[start:stop] = [trained[number]] * (stop - start)
        return EncodedRow(ids, answer)

    def _rendered(self, conversation: Conversation, template: str | None) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and where its answers are; raises RowError if a part is not written."""
        tokenizer, _ = self._chat_tokenizer
        others = [{**each, "role": _OTHER_ROLE.get(each["role"], each["role"])} for each in conversation.messages]
        fault = ""
        for messages in (conversation.messages, others):
            try:
                text, spans = render_text(tokenizer, messages, conversation.tools, template)
            except TemplateError as error:
                fault = fault or f"the chat template rejects the messages: {error}"
                continue
            left_out, keys = unwritten(conversation, text)
            if left_out is None:
                self._chats.unread.update(f"{conversation.name}[].{key}" for key in keys)
                return text, spans
            fault = fault or f"the chat template does not write {left_out}: remove it, or set another chat_template"
        raise RowError("chat template", fault)

    @functools.cached_property
    def _template_is_checked(self) -> bool:
        """Check the tokenizer's own chat template, once; raises UsageError."""
        check_chat_template(self._chat_tokenizer[0])
        return True

    @functools.cached_property
    def _chat_tokenizer(self) -> tuple[PreTrainedTokenizerBase, list[str]]:
        """The tokenizer, and its special tokens; raises UsageError."""
        if isinstance(self._tokenizer, tiktoken.Encoding):
            raise UsageError(
                "chat rows need a tokenizer of transformers with a chat template, got a tiktoken.Encoding"
            )
        return self._tokenizer, [token for token in self._tokenizer.all_special_tokens if token]


def _occurs(token: str, message: Any) -> bool:
    """Return whether a special token is spelled out in a message, or in its tool calls."""
    if "tool_calls" in message and token in json.dumps(message["tool_calls"], ensure_ascii=False):
        return True
    return token in message["content"] or token in message.get("thinking", "")
