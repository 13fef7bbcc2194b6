"""A conversation with a model in a terminal: turns, the text that they make, and what of it fits the context."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.generation.generate import context_length, stream_text
from gpt_kit_hf.options.generation import ChatOptions

Message: TypeAlias = dict[str, str]

# For a model that was trained on text alone, and has no template of its own: what was said so far, as one text. The
# model goes on right after it; each further message of the user begins a line.
CONTINUATION_TEMPLATE = (
    "{% for message in messages %}"
    r"{% if message['role'] == 'user' and not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% endfor %}"
)

COMMANDS = ("/clear", "/exit")


class MessageTooLongError(UsageError):
    """A message that fills the model's context by itself, so that no token of an answer fits."""


class Conversation:
    """The turns of a conversation with one model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
        self._messages: list[Message] = []

    def clear(self) -> None:
        """Forget all turns."""
        self._messages = []

    def answer(self, text: str, on_text: Callable[[str], None], on_note: Callable[[str], None]) -> str:
        """Add the user's turn and the model's, whose text goes to `on_text` piece by piece; return the latter.

        Turns that no longer fit the model's context are dropped, the oldest first, and `on_note` is told. Raises
        MessageTooLongError, with the conversation as it was, for a text that does not fit alone; UsageError for
        options that the model refuses, and for a chat template that cannot write the conversation.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        kept, prompt, room = self._fit(messages)
        if n_dropped := (len(messages) - len(kept)) // 2:
            turns = "turn no longer fits" if n_dropped == 1 else f"{n_dropped} turns no longer fit"
            on_note(f"(the oldest {turns} in the context of {context_length(self._model)} tokens)")
        answer = stream_text(
            self._model,
            self._tokenizer,
            prompt,
            max_new_tokens=min(self._options.max_new_tokens, room),
            temperature=self._options.temperature,
            top_k=self._options.top_k,
            dtype=self._options.dtype,
            on_text=on_text,
        )
        self._messages = [*kept, {"role": "assistant", "content": answer}]
        return answer

    def _fit(self, messages: list[Message]) -> tuple[list[Message], str, int]:
        """Return the latest messages that fit, their text, and the number of tokens that an answer may have."""
        wanted, context = self._options.max_new_tokens, context_length(self._model)
        prompt = self._write(messages)
        if context is None:
            return messages, prompt, wanted
        # An answer may be long, but what it answers is worth as much: it cannot drive out more than half of it.
        reserved = min(wanted, context // 2)
        while (room := context - self._count(prompt)) < reserved and len(messages) > 1:
            messages = messages[2:]
            prompt = self._write(messages)
        if room < 1:
            raise MessageTooLongError(
                f"the message has {context - room} tokens, and the model's context {context}: none is left to answer"
            )
        return messages, prompt, room

    def _write(self, messages: list[Message]) -> str:
        """Return the conversation as one text, up to where the answer begins."""
        template = CONTINUATION_TEMPLATE if self._tokenizer.chat_template is None else None
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise UsageError(f"the chat template cannot write the conversation: {error}") from error

    def _count(self, prompt: str) -> int:
        # Not verbose: a text above the context, which is about to be cut, is no reason to warn.
        return len(self._tokenizer.encode(prompt, add_special_tokens=False, verbose=False))


def converse(
    conversation: Conversation, lines: Iterable[str], on_text: Callable[[str], None], on_note: Callable[[str], None]
) -> None:
    """Answer each line until the lines end or one is "/exit"; "/clear" forgets the turns, blank lines say nothing."""
    for line in lines:
        said = line.strip()
        if said == "/exit":
            return
        if said == "/clear":
            conversation.clear()
            on_note("(forgotten)")
        elif re.fullmatch(r"/\w+", said):
            on_note(unknown_name("command", said, COMMANDS))
        elif said:
            try:
                conversation.answer(line, on_text, on_note)
            except MessageTooLongError as error:
                on_note(f"error: {error}")
            else:
                on_text("\n")
