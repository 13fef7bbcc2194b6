"""What commands and servers ask of a model, whatever computes it: torch, or llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gpt_kit_hf.generation.completion import Chunk, Sampling, ScoredToken


class Tokenizer(Protocol):
    """What a conversation and a server ask of a tokenizer: that of transformers, or the one in a GGUF file."""

    chat_template: Any
    bos_token: str | None

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that a message must not hold as text."""

    def encode(self, text: str, add_special_tokens: bool = True, *, verbose: bool = True) -> list[int]:
        """Return the ids of a text, by default with those that the tokenizer adds to each text."""

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        chat_template: str | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
    ) -> Any:
        """Return the text of a conversation, by the chat template."""


class TextEngine(Protocol):
    """A model with its tokenizer, and how it chooses tokens, prepared to continue one text after the other."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""

    @property
    def context_length(self) -> int | None:
        """The number of positions, None for a model without a limit."""

    @property
    def start(self) -> str:
        """What an empty prompt stands for: the token that documents begin after, or a line break if there is none."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, in which "<|endoftext|>" is EOS; no special token is added."""

    def stream(self, prompt: str, max_new_tokens: int, on_text: Callable[[str], None]) -> str:
        """Call `on_text` with each chunk of the continuation as soon as it is certain; return the whole text."""


class CompletionEngine(Protocol):
    """A model with its tokenizer, prepared to complete prompts in several threads at once."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""

    @property
    def context_length(self) -> int | None:
        """The number of positions, None for a model without a limit."""

    @property
    def vocabulary_size(self) -> int:
        """The number of logits, which may be more than the tokenizer has tokens."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""

    def complete(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling,
        on_chunk: Callable[[Chunk], None],
        *,
        first_index: int = 0,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Generate `n` choices, numbered from `first_index`, and call `on_chunk` as soon as text is certain.

        The prompt must leave `sampling.max_new_tokens` tokens of the model's context. After `is_cancelled()`, which is
        asked before each token, no further chunk comes.
        """

    def score(self, prompt: Sequence[int], top: int) -> list[ScoredToken]:
        """Return the log-probabilities of the prompt's own tokens."""
