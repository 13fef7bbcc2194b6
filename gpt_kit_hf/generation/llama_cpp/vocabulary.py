"""The tokenizer in a GGUF file: llama.cpp encodes by it, and its spelling of tokens and its template are read here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gpt_kit_hf.tokenization.encodings import check_text
from gpt_kit_hf.tokenization.export import byte_characters

# Types of tokens in a GGUF file.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # of a vocabulary of SentencePiece


class GGUFTokenizer:
    """A `Tokenizer` with the vocabulary of a GGUF file; `encode_text` is llama.cpp's."""

    def __init__(self, metadata: Mapping[str, Any], encode_text: Callable[[str, bool], list[int]]) -> None:
        self._tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        self._types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(self._tokens))
        is_byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
        self._byte_of = {each: byte for byte, each in enumerate(byte_characters())} if is_byte_level else None
        self._encode_text = encode_text
        self.chat_template: str | None = metadata.get("tokenizer.chat_template")
        self.bos_token = self._special(metadata, "bos")
        self.eos_token = self._special(metadata, "eos")

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of special tokens."""
        return [index for index, kind in enumerate(self._types) if kind == _CONTROL]

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that a message must not hold as text."""
        return [self._tokens[index] for index in self.all_special_ids]

    def encode(self, text: str, add_special_tokens: bool = True, *, verbose: bool = True) -> list[int]:
        """Return the ids of a text, in which special tokens are read as such; nothing is `verbose` here.

        Raises DataError for a text that is not valid Unicode.
        """
        check_text(text, "text")
        return self._encode_text(text, add_special_tokens)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens included."""
        return b"".join(map(self.spelling, ids)).decode(errors="replace")

    def spelling(self, token: int) -> bytes:
        """Return the bytes that a token stands for."""
        text = self._tokens[token]
        if self._types[token] in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            return text.encode()
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in text)
        byte = _BYTE.fullmatch(text)
        return bytes.fromhex(byte[1]) if byte else text.replace("▁", " ").encode()

    def text_bytes(self, token: int) -> bytes:
        """Return the bytes that a generated token adds to the text: none for a special token."""
        return b"" if self._types[token] == _CONTROL else self.spelling(token)

    def plain_token(self) -> int:
        """Return a token that is whole characters."""
        return next(token for token in range(len(self)) if self.text_bytes(token).isalpha())

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        chat_template: str | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
    ) -> Any:
        """Return the text of a conversation, rendered as transformers does; its ids if `tokenize`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _ = render_jinja_template(
            conversations=[conversation],
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
        )
        return self.encode(texts[0], add_special_tokens=False) if tokenize else texts[0]

    def _special(self, metadata: Mapping[str, Any], name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else self._tokens[index]
