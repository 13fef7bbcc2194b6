"""A GGUF file as an engine of text in a terminal."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable

from gpt_kit_hf.generation.completion import Choice, Chunk, Sampling
from gpt_kit_hf.generation.llama_cpp.model import LlamaCppModel


class LlamaCppText:
    """A `TextEngine` of a GGUF file; each text is another sample, and all depend on the seed, None for any.

    A sample is not that of the same seed in torch.
    """

    def __init__(self, model: LlamaCppModel, *, temperature: float, top_k: int | None, seed: int | None) -> None:
        self.model, self.tokenizer, self.context_length = model, model.tokenizer, model.context_length
        self._temperature, self._top_k = temperature, top_k
        self._seeds = random.Random(secrets.randbits(63) if seed is None else seed)

    @property
    def start(self) -> str:
        """What an empty prompt stands for."""
        return self.tokenizer.bos_token or "\n"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stream(self, prompt: str, max_new_tokens: int, on_text: Callable[[str], None]) -> str:
        """Continue a text, as `TextEngine` says."""
        chunks: list[str] = []

        def add(chunk: Chunk) -> None:
            if chunk.text:
                chunks.append(chunk.text)
                on_text(chunk.text)

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=self._temperature, top_k=self._top_k)
        self.model.stream(self.encode(prompt), sampling, self._seeds.randrange(2**63), Choice(0, sampling, add))
        return "".join(chunks)
