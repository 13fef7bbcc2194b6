"""The text of single tokens, as bytes: a token may hold a part of a character only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gpt_kit_hf.generation.generate import CONTEXT_TOKENS, decode_function
from gpt_kit_hf.tokenization.export import byte_characters

# How vocabularies of SentencePiece spell a single byte.
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """The bytes that a token adds to the text before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        fast = isinstance(tokenizer, PreTrainedTokenizerFast)
        self._is_byte_level = fast and isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel)
        self._added = set(tokenizer.added_tokens_decoder)
        self._byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        self._tokenizer, self._decode = tokenizer, decode_function(tokenizer)

    def __call__(self, token: int, previous: Sequence[int]) -> bytes:
        """Return the bytes of a token that follows the `previous` ones; none for an id without a token."""
        spelling = self._tokenizer.convert_ids_to_tokens(token)
        if spelling is None:
            return b""
        if token in self._added:
            return str(spelling).encode()
        if self._is_byte_level:
            return bytes(self._byte_of[character] for character in spelling)
        if (byte := _BYTE.fullmatch(spelling)) is not None:
            return bytes.fromhex(byte[1])
        context = list(previous[-CONTEXT_TOKENS:])
        before, after = self._decode(context), self._decode([*context, token])
        return (after[len(before) :] if after.startswith(before) else self._decode([token])).encode()
