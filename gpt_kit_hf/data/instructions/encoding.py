"""Encodes one instruction row: token ids, and which of them belong to an answer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import tiktoken
from jinja2 import TemplateError

from gpt_kit_hf.data.instructions.formats import (
    FORMAT_KEYS,
    FormatFn,
    Message,
    Row,
    check_is_object,
    check_row_text,
    checked_messages,
    format_alpaca,
    format_of,
    format_prompt_completion,
    messages_of,
    prompt_and_answer,
    required_field,
)
from gpt_kit_hf.data.instructions.reader import RowError
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.tokenization.chat_templates import check_chat_template, render_chat, trained_spans
from gpt_kit_hf.tokenization.encodings import encode_ordinary, get_eos_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gpt_kit_hf.tokenization.encodings import AnyTokenizer

_TEXT_FORMATS: dict[str, FormatFn] = {"alpaca": format_alpaca, "prompt_completion": format_prompt_completion}


def encode_text_row(
    row: Any, format_fn: FormatFn, tokenizer: AnyTokenizer, *, split_special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """Return the ids of a row's prompt and of its answer, as `format_fn` writes them (see `prompt_and_answer`).

    The two are encoded separately, so that a prompt has the same ids in training and in generation. A special token
    spelled out in a text is plain text with a tiktoken encoding, and with a tokenizer of transformers if
    `split_special_tokens`. Raises RowError.
    """
    check_is_object(row)
    ids = []
    for text, name in zip(prompt_and_answer(row, format_fn), ("prompt", "answer"), strict=True):
        check_row_text(text, name)
        if not isinstance(tokenizer, tiktoken.Encoding):
            # Not verbose: the caller checks the length.
            options = {"split_special_tokens": True, "verbose": False} if split_special_tokens else {}
            ids.append(list(tokenizer.encode(text, add_special_tokens=False, **options)))
            continue
        try:
            ids.append(encode_ordinary(tokenizer, text, f"the {name}").tolist())
        except DataError as error:
            raise RowError("cannot be encoded", str(error)) from error
    prompt_ids, answer_ids = ids
    if not (prompt_ids and answer_ids):
        raise RowError("blank", "the tokenizer makes no token of the prompt, or none of the answer")
    return prompt_ids, answer_ids


class EncodedRow(NamedTuple):
    """A row's ids, and for each of them whether it belongs to an answer or is the EOS after one."""

    input_ids: list[int]
    answer: list[bool]


class RowEncoder:
    """Encodes rows of one format, or each row in the format that its keys identify ("auto").

    A special token spelled out in a row is plain text in prompts and completions, and a fault in a chat message, where
    it would be read as a token of the template.

    Raises UsageError if the tokenizer has no EOS, or its chat template does not mark the answers.
    """

    def __init__(
        self, tokenizer: AnyTokenizer, row_format: str, format_fn: FormatFn | None, vocab_size: int | None
    ) -> None:
        eos = get_eos_token_id(tokenizer)
        if eos is None:
            raise UsageError("the tokenizer has no EOS, so a model could not learn to end an answer")
        if vocab_size is not None and eos >= vocab_size:
            raise UsageError(f"EOS has id {eos}, but the model's vocab_size is {vocab_size}")
        self.eos_token_id = eos
        self._tokenizer = tokenizer
        self._format = row_format
        self._format_fn = format_fn
        self._vocab_size = vocab_size
        if row_format == "chat" and format_fn is None:
            _ = self._chat_tokenizer  # an error before the first row is read

    def encode(self, row: Any) -> EncodedRow:
        """Return the row's ids and which of them are answers; raises RowError for a row that cannot be used."""
        check_is_object(row)
        if self._format_fn is not None:
            encoded = self._encode_text(row, self._format_fn)
        else:
            encoded = self._encode_by_format(row)
        highest = max(encoded.input_ids)
        if self._vocab_size is not None and highest >= self._vocab_size:
            reason = f"the tokenizer gives id {highest}, but the model's vocab_size is {self._vocab_size}"
            raise RowError("id outside the vocabulary", reason)
        return encoded

    def _encode_by_format(self, row: Row) -> EncodedRow:
        row_format = format_of(row) if self._format == "auto" else self._format
        if row_format == "chat":
            return self._encode_chat(messages_of(row), 0)
        if row_format == "prompt_completion":
            prompt, completion = (required_field(row, name) for name in FORMAT_KEYS[row_format])
            if isinstance(prompt, list) and isinstance(completion, list):
                messages = [*checked_messages(prompt, "prompt"), *checked_messages(completion, "completion")]
                return self._encode_chat(messages, len(prompt))
        return self._encode_text(row, _TEXT_FORMATS[row_format])

    def _encode_text(self, row: Row, format_fn: FormatFn) -> EncodedRow:
        prompt_ids, answer_ids = encode_text_row(row, format_fn, self._tokenizer)
        answer = [False] * len(prompt_ids) + [True] * (len(answer_ids) + 1)
        return EncodedRow([*prompt_ids, *answer_ids, self.eos_token_id], answer)

    def _encode_chat(self, messages: list[Message], n_context: int) -> EncodedRow:
        """Encode a conversation; assistant turns among the first `n_context` messages are not trained."""
        tokenizer, special_tokens = self._chat_tokenizer
        roles = [message["role"] for message in messages]
        n_answers, n_context_answers = roles.count("assistant"), roles[:n_context].count("assistant")
        if n_answers == n_context_answers:
            raise RowError("no answer", "no message of the assistant, so nothing would be trained")
        for number, message in enumerate(messages):
            special = next((token for token in special_tokens if token in message["content"]), None)
            if special is not None:
                raise RowError("special token", f"message {number} holds {special!r}, a special token, as text")
        try:
            ids, trained = render_chat(tokenizer, messages)
        except TemplateError as error:
            raise RowError("chat template", f"the chat template rejects the messages: {error}") from error
        spans = trained_spans(trained)
        if len(spans) != n_answers:
            raise RowError("chat template", f"the chat template marks {len(spans)} answers of {n_answers} as trained")
        answer = [False] * len(ids)
        for start, stop in spans[n_context_answers:]:
            if ids[stop - 1] != self.eos_token_id:
                raise RowError("chat template", f"the chat template does not end the answer at token {stop - 1}")
            answer[start:stop] = [True] * (stop - start)
        return EncodedRow(ids, answer)

    @functools.cached_property
    def _chat_tokenizer(self) -> tuple[PreTrainedTokenizerBase, list[str]]:
        """The tokenizer, whose chat template is checked once, and its special tokens; raises UsageError."""
        if isinstance(self._tokenizer, tiktoken.Encoding):
            raise UsageError(
                "chat rows need a tokenizer of transformers with a chat template, got a tiktoken.Encoding"
            )
        check_chat_template(self._tokenizer)
        return self._tokenizer, [token for token in self._tokenizer.all_special_tokens if token]
