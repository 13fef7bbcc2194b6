"""Conversations with a model in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from jinja2 import TemplateError

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.generation.engine import TextEngine
from gpt_kit_hf.options.generation import ChatOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message: TypeAlias = dict[str, str]

# For models without a chat template: the conversation is one text that the model continues; each further user message
# starts a line.
CONTINUATION_TEMPLATE = (
    "{% for message in messages %}"
    r"{% if message['role'] == 'user' and not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% endfor %}"
)

COMMANDS = ("/clear", "/exit")


class MessageTooLongError(UsageError):
    """A message that fills the model's context and leaves no token for an answer."""


class TextConversation:
    """The turns of a conversation with one model, whatever computes it; an answer has at most `max_new_tokens`."""

    def __init__(self, engine: TextEngine, max_new_tokens: int) -> None:
        self._engine, self._max_new_tokens = engine, max_new_tokens
        self._messages: list[Message] = []

    def clear(self) -> None:
        """Forget all turns."""
        self._messages = []

    def answer(self, text: str, on_text: Callable[[str], None], on_note: Callable[[str], None]) -> str:
        """Add a turn of the user and return the model's, which is streamed to `on_text`.

        If the conversation exceeds the model's context, the oldest turns are dropped and `on_note` receives a message.
        Raises MessageTooLongError, with the conversation unchanged, if the text does not fit on its own; UsageError
        for options that the model does not allow and for a chat template that fails.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        kept, prompt, room = self._fit(messages)
        if n_dropped := (len(messages) - len(kept)) // 2:
            turns = "turn no longer fits" if n_dropped == 1 else f"{n_dropped} turns no longer fit"
            on_note(f"(the oldest {turns} in the context of {self._engine.context_length} tokens)")
        answer = self._engine.stream(prompt, min(self._max_new_tokens, room), on_text)
        self._messages = [*kept, {"role": "assistant", "content": answer}]
        return answer

    def _fit(self, messages: list[Message]) -> tuple[list[Message], str, int]:
        """Return the latest messages that fit, their text, and the number of tokens left for an answer."""
        wanted, context = self._max_new_tokens, self._engine.context_length
        prompt = self._apply_template(messages)
        if context is None:
            return messages, prompt, wanted
        # A long answer may take at most half of the context, so that the turns before it are not all dropped.
        reserved = min(wanted, context // 2)
        while (room := context - self._count(prompt)) < reserved and len(messages) > 1:
            messages = messages[2:]
            prompt = self._apply_template(messages)
        if room < 1:
            raise MessageTooLongError(
                f"the message has {context - room} tokens, and the model's context {context}: none is left to answer"
            )
        return messages, prompt, room

    def _apply_template(self, messages: list[Message]) -> str:
        template = CONTINUATION_TEMPLATE if self._engine.tokenizer.chat_template is None else None
        try:
            text = self._engine.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UsageError(f"the chat template cannot write the conversation: {error}") from error
        return str(text)

    def _count(self, prompt: str) -> int:
        # Not verbose: a prompt above the context is about to be shortened, so no warning is due.
        return len(self._engine.tokenizer.encode(prompt, add_special_tokens=False, verbose=False))


class Conversation(TextConversation):
    """The turns of a conversation with one model of transformers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> None:
        from gpt_kit_hf.generation.generate import TransformersText

        engine = TransformersText(
            model, tokenizer, temperature=options.temperature, top_k=options.top_k, dtype=options.dtype
        )
        super().__init__(engine, options.max_new_tokens)


def converse(
    conversation: TextConversation,
    lines: Iterable[str],
    on_text: Callable[[str], None],
    on_note: Callable[[str], None],
) -> None:
    """Answer each line until the last one or "/exit"; "/clear" forgets the turns; blank lines are ignored."""
    for line in lines:
        command = line.strip()
        if command == "/exit":
            return
        if command == "/clear":
            conversation.clear()
            on_note("(forgotten)")
        elif re.fullmatch(r"/\w+", command):
            on_note(unknown_name("command", command, COMMANDS))
        elif command:
            try:
                conversation.answer(line, on_text, on_note)
            except MessageTooLongError as error:
                on_note(f"error: {error}")
            else:
                on_text("\n")
