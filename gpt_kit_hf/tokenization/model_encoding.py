"""The tokenizer of any model as an encoding of text: by tiktoken where it gives the same ids, else by `tokenizers`."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.tokenization.export import EOS_TOKEN, byte_characters, load_encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of a vocabulary with byte fallback
_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


def encoding_of(tokenizer: PreTrainedTokenizerBase, name: str) -> tiktoken.Encoding:
    """Return an encoding with the ids of a tokenizer of transformers; `name` is what messages call it.

    A plain byte-level BPE is encoded by tiktoken, any other by `TokenizerEncoding`. Raises UsageError for a tokenizer
    without an EOS token, and for one that has no `tokenizer.json`.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {name!r} has no EOS token, which ends a document: set its eos_token")
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer of {name!r} has no tokenizer.json: convert it to a fast tokenizer")
    with suppress(UsageError), tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found = load_encoding(folder)
        if tokenizer.eos_token == EOS_TOKEN and EOS_TOKEN in found.special_tokens_set:
            stored = tokenizer.init_kwargs.get("encoding_name")
            found.name = stored if isinstance(stored, str) else name
            return found
    begin = tokenizer.bos_token_id
    adds_begin = begin is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [begin]
    backend: Tokenizer = tokenizer.backend_tokenizer
    return TokenizerEncoding(
        name,
        backend.to_str(),
        end_of_text=tokenizer.eos_token_id,
        begin_of_text=begin if adds_begin else None,
        special_ids=tuple(sorted(tokenizer.all_special_ids)),
    )


class TokenizerEncoding(tiktoken.Encoding):
    """A `tokenizers.Tokenizer` with the methods of a tiktoken encoding that text needs.

    EOS_TOKEN names the tokenizer's own EOS. A text is encoded as a whole, and special tokens in it as ordinary text.
    `begin_of_text` is the id that the tokenizer puts before each text by itself, None if it puts none: it stands at
    the start of each document.
    """

    def __init__(
        self,
        name: str,
        content: str,
        *,
        end_of_text: int,
        begin_of_text: int | None,
        special_ids: tuple[int, ...],
    ) -> None:
        # Not tiktoken's own: there are no ranks.
        self._arguments = (name, content, end_of_text, begin_of_text, special_ids)
        self.name, self._pat_str, self._mergeable_ranks = name, "", {}
        self._special_tokens = {EOS_TOKEN: end_of_text}
        self.end_of_text, self.begin_of_text = end_of_text, begin_of_text
        self._tokenizer = Tokenizer.from_str(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as ordinary text
        self._special_ids = frozenset(special_ids)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.max_token_value = max(self._tokenizer.get_vocab().values())
        # In a byte-level vocabulary each character of a token stands for one byte.
        self._by_bytes = '"ByteLevel"' in json.dumps(json.loads(content).get("decoder"))

    def __reduce__(self) -> Any:
        return (_rebuilt, self._arguments)

    def fingerprint(self) -> str:
        """Return 16 hex digits of a SHA-256 over what decides the ids of a text."""
        content = json.loads(self._tokenizer.to_str())
        kept = [self._arguments[2:], {name: part for name, part in content.items() if name != "post_processor"}]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def encode_document_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without EOS, after `begin_of_text` if there is one."""
        begin = [] if self.begin_of_text is None else [self.begin_of_text]
        return [begin + found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_to_numpy(self, text: str, **special: Any) -> npt.NDArray[np.uint32]:
        """Return the ids of a text, special tokens in it as ordinary text whatever is allowed, (T,)."""
        return np.array(self.encode_ordinary(text), np.uint32)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """Return the id of EOS_TOKEN; KeyError for any other token."""
        return self._special_tokens[text_or_bytes if isinstance(text_or_bytes, str) else text_or_bytes.decode()]

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """Return the text of ids, special tokens included."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes that an id spells, none for a special token; KeyError for an id without a token."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            raise KeyError(token)
        if token in self._special_ids:
            return b""
        if token in self._added:
            return self._added[token].encode()
        if self._by_bytes:
            return bytes(_BYTE_OF[character] for character in piece)
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes that the ids spell."""
        return b"".join(map(self.decode_single_token_bytes, tokens))


def _rebuilt(name: str, content: str, end: int, begin: int | None, special: tuple[int, ...]) -> TokenizerEncoding:
    return TokenizerEncoding(name, content, end_of_text=end, begin_of_text=begin, special_ids=special)
