"""A vocabulary in a GGUF file: llama.cpp knows how to split a text by the name of a pattern, not by the pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import tiktoken

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, get_eos_token_id, get_pad_token_id
from gpt_kit_hf.tokenization.export import GPT2_PATTERN, merges_of, written_token

if TYPE_CHECKING:
    import gguf

# The patterns here that llama.cpp has, by its names.
_NAMES = {GPT2_PATTERN: "gpt-2"}
_BYTES = 256


def check_vocabulary(encoding: tiktoken.Encoding) -> str:
    """Return llama.cpp's name of how an encoding splits a text; UsageError if it has none."""
    # tiktoken has no public names for the ranks and the pattern (see tokenization/export.py).
    ranks, pattern = encoding._mergeable_ranks, encoding._pat_str
    if len(ranks) == _BYTES:
        return "gpt-2"  # nothing merges, so any split gives the same ids
    other = "so llama.cpp would give other ids: run the model with transformers, or train one with a new vocabulary"
    if not ranks:
        raise UsageError(f"the tokenizer {encoding.name!r} is not a plain byte-level BPE with {EOS_TOKEN}, {other}")
    if pattern not in _NAMES:
        raise UsageError(f"the vocabulary {encoding.name!r} does not split text by GPT-2's pattern, {other}")
    return _NAMES[pattern]


def add_vocabulary(
    writer: gguf.GGUFWriter, encoding: tiktoken.Encoding, vocab_size: int, end_ids: Sequence[int]
) -> list[str]:
    """Add the tokens, merges and special ids of an encoding; return the tokens.

    Ids of the model that no token has are marked as unused. `end_ids`, at most two, end a text in generation.
    """
    import gguf

    ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
    tokens = [f"[unused {number}]" for number in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, rank in ranks.items():
        tokens[rank], types[rank] = written_token(token), gguf.TokenType.NORMAL
    for text, rank in specials.items():
        tokens[rank], types[rank] = text, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(check_vocabulary(encoding))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp needs a merge. No text has these two bytes: they do not occur in UTF-8.
    nothing = " ".join(written_token(b"\xff") * 2)
    writer.add_token_merges([" ".join(pair) for pair in merges_of(encoding)] or [nothing])
    eos = get_eos_token_id(encoding)
    assert eos is not None  # `load_text_encoding` has seen to it
    first, *others = end_ids or [eos]
    writer.add_bos_token_id(eos)
    writer.add_eos_token_id(first)
    if others:
        writer.add_eot_token_id(others[0])
    if (pad := get_pad_token_id(encoding)) is not None:
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    return tokens
