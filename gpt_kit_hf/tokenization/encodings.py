"""Text to ids and back: every vocabulary is a `tiktoken.Encoding`, saved as a plain Hugging Face twin."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tiktoken
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt_kit_hf.errors import DataError, UsageError, unknown_name
from gpt_kit_hf.tokenization.export import (
    END_OF_TEXT,
    GPT2_PATTERN,
    byte_characters,
    byte_level_split,
    load_encoding,
    save_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    AnyTokenizer: TypeAlias = tiktoken.Encoding | PreTrainedTokenizerBase

__all__ = [
    "END_OF_TEXT",
    "check_fingerprint",
    "encode_documents",
    "encode_ordinary_batch",
    "end_of_text_id",
    "fingerprint",
    "get_encoding",
    "id_dtype",
    "load_encoding",
    "may_cut",
    "save_tokenizer",
    "text_to_token_ids",
    "token_ids_to_text",
    "train_bpe",
]

# GPT-2's pattern with one change, taken from cl100k_base (tiktoken): at most three digits a piece, so that no
# merge is spent on a long number and equal digits are cut alike in every number of the same length. It is
# written out, not imported, because it is part of the fingerprint of every vocabulary trained here.
_TRAINED_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Any cut is right where nothing merges. Pieces of many characters encode three times as fast as single
# characters, and bounded pieces keep the memory that a book-long text needs small.
_BYTES_PATTERN = r"[\s\S]{1,64}"

_SMALLEST_VOCABULARY = 258  # 256 bytes, one merge, the end of text
_LARGEST_VOCABULARY = 1 << 20  # four times the largest vocabularies in use; more is a slip of the keyboard


def get_encoding(name: str) -> tiktoken.Encoding:
    """Return the encoding of this name: "gpt2", "bytes", or the path of a folder with our `tokenizer.json`.

    "bytes" has the byte values as ids 0 to 255 and the end of text as 256. "gpt2" is fetched by tiktoken on
    first use and kept in the folder that TIKTOKEN_CACHE_DIR names. Raises UsageError for an unknown name, for
    "bpe" (it has no vocabulary before `train_bpe`), and where "gpt2" is in no cache and cannot be fetched.
    """
    if name == "gpt2":
        return _fetch_gpt2()
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return _encoding("bytes", _BYTES_PATTERN, ranks)
    if name == "bpe":
        raise UsageError("encoding 'bpe' needs a corpus: use train_bpe, or the folder it was saved to")
    if Path(name).is_dir():
        return load_encoding(name)
    raise UsageError(unknown_name("encoding", name, ["gpt2", "bytes", "bpe"]) + " (and no such folder)")


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Return a byte-level BPE of `vocab_size` ids: 256 bytes, merges in order, the end of text last.

    Byte i has id i. The same texts give the same encoding. A corpus with too few pairs that occur twice gives
    a smaller encoding: read `n_vocab`. The literal end of text in a text is ordinary text here. Raises
    UsageError if `vocab_size` is out of range, DataError if there is no text or one that cannot be encoded.
    Source: Sennrich et al. 2016 (BPE), Radford et al. 2019 (on bytes).
    """
    if not _SMALLEST_VOCABULARY <= vocab_size <= _LARGEST_VOCABULARY:
        raise UsageError(
            f"vocab_size is {vocab_size}; it must be from {_SMALLEST_VOCABULARY} (256 bytes, one merge, the "
            f"end of text) to {_LARGEST_VOCABULARY}"
        )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = byte_level_split(_TRAINED_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end of text is added below
        min_frequency=2,  # a pair seen once says nothing about the next text
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(_checked_corpus(texts), trainer)
    learned: dict[str, int] = learner.get_vocab()
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in sorted(learned, key=lambda token: learned[token]):
        # The single bytes are there already, at their own value.
        ranks.setdefault(bytes(byte_of[character] for character in token), len(ranks))
    return _encoding("bpe", _TRAINED_PATTERN, ranks)


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """Return 16 hex digits (the first of a SHA-256) over the pattern, the ranks and the special tokens.

    Encodings with the same fingerprint give the same ids for every string. The name does not count.
    """
    ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    content = [encoding._pat_str, ranks, sorted(encoding._special_tokens.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def check_fingerprint(encoding: tiktoken.Encoding, expected: str, where: str) -> None:
    """Raise UsageError unless the encoding's fingerprint is `expected`, the one recorded in `where`."""
    found = fingerprint(encoding)
    if found != expected:
        raise UsageError(
            f"encoding {encoding.name!r} has fingerprint {found}, but {where} was made with {expected}: "
            "the ids would mean other tokens"
        )


def id_dtype(n_vocab: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the smallest unsigned integer type that holds the ids 0 to n_vocab - 1."""
    if n_vocab < 1:
        raise UsageError(f"n_vocab is {n_vocab}; a vocabulary has at least 1 id")
    return np.min_scalar_type(n_vocab - 1)


def encode_ordinary_batch(
    encoding: tiktoken.Encoding, texts: Sequence[str]
) -> list[npt.NDArray[np.unsignedinteger[Any]]]:
    """Return the ids of each text, (T,) of `id_dtype(encoding.n_vocab)`; special tokens are ordinary text.

    One thread: run several processes for more speed (a thread per short text is slower than none). Raises
    DataError, with the text's index, for a lone surrogate or a whitespace run beyond tiktoken's limit.
    """
    dtype = id_dtype(encoding.n_vocab)
    return [
        _encode(encoding, text, f"texts[{index}]", allowed_special=frozenset()).astype(dtype)
        for index, text in enumerate(texts)
    ]


def encode_documents(
    encoding: tiktoken.Encoding, parts: Sequence[tuple[str, bool]], where: str
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return the ids of documents end to end, (T,) of `id_dtype(encoding.n_vocab)`, each ended by end of text.

    A part is a text and whether a document ends with it. Text that spells the end of text stays text. Raises
    DataError, with `where`, as `encode_ordinary_batch` does.
    """
    # One call for many documents: tiktoken encodes what stands between two ends of text by itself.
    joined: list[str] = []
    encoded: list[npt.NDArray[np.uint32]] = []
    end = np.array([encoding.encode_single_token(END_OF_TEXT)], np.uint32)

    def flush() -> None:
        if joined:
            encoded.append(_encode(encoding, "".join(joined), where, allowed_special={END_OF_TEXT}))
            joined.clear()

    for text, ends in parts:
        if END_OF_TEXT in text:
            flush()
            encoded.append(_encode(encoding, text, where, allowed_special=frozenset()))
            encoded += [end] * ends
        else:
            joined += [text, END_OF_TEXT] if ends else [text]
    flush()
    dtype = id_dtype(encoding.n_vocab)
    return np.concatenate(encoded).astype(dtype) if encoded else np.empty(0, dtype)


def may_cut(encoding: tiktoken.Encoding | None) -> bool:
    """Return whether a text may be cut between a letter and a blank, and encoded in parts, to the same ids.

    So it is where the pattern cuts there whatever stands around: in the vocabularies known here, of which the one
    that is yet to be trained (None) is one.
    """
    return encoding is None or encoding._pat_str in (GPT2_PATTERN, _TRAINED_PATTERN, _BYTES_PATTERN)


def text_to_token_ids(text: str, tokenizer: AnyTokenizer) -> torch.Tensor:
    """Return the ids of a text as a (1, T) long tensor, for a tiktoken encoding or a transformers tokenizer.

    The literal "<|endoftext|>" becomes the end of text; no special token is added. Raises UsageError for
    another kind of tokenizer, DataError for a text that cannot be encoded.
    """
    if isinstance(tokenizer, tiktoken.Encoding):
        allowed = tokenizer.special_tokens_set & {END_OF_TEXT}
        ids = _encode(tokenizer, text, "text", allowed_special=allowed)
        return torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)  # (T,) -> (1, T)
    _require_transformers(tokenizer)
    _require_text(text, "text")
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.long)


def token_ids_to_text(
    token_ids: torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[int], tokenizer: AnyTokenizer
) -> str:
    """Return the text of one sequence of ids, (T,) or (1, T); special tokens show, nothing is cleaned up.

    Bytes that are not UTF-8 become U+FFFD. Raises UsageError for more than one sequence, for an id outside
    the vocabulary and for another kind of tokenizer.
    """
    ids = _one_sequence(token_ids)
    if isinstance(tokenizer, tiktoken.Encoding):
        _require_known(ids, tokenizer.n_vocab)
        return tokenizer.decode(ids)
    _require_transformers(tokenizer)
    _require_known(ids, len(tokenizer))
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def end_of_text_id(tokenizer: AnyTokenizer) -> int | None:
    """Return the id that ends a text: "<|endoftext|>" in tiktoken, the eos token in transformers, or None."""
    if isinstance(tokenizer, tiktoken.Encoding):
        return tokenizer.eot_token if END_OF_TEXT in tokenizer.special_tokens_set else None
    _require_transformers(tokenizer)
    eos: int | None = tokenizer.eos_token_id
    return eos


def _encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    specials = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def _fetch_gpt2() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        # Every exception of requests is an OSError; a file of the wrong hash is a ValueError.
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise UsageError(
            f"encoding 'gpt2' could not be fetched ({why}): set TIKTOKEN_CACHE_DIR to a folder that "
            "holds it, or use --encoding bytes or --encoding bpe, which need no download"
        ) from error


def _checked_corpus(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise UsageError("texts is one string; it must be an iterable of strings")
    empty = True
    for index, text in enumerate(texts):
        _require_text(text, f"texts[{index}]")
        empty = empty and not text
        yield text
    if empty:
        raise DataError("texts holds no text to train an encoding on")


def _encode(
    encoding: tiktoken.Encoding, text: str, where: str, *, allowed_special: set[str] | frozenset[str]
) -> npt.NDArray[np.uint32]:
    _require_text(text, where)
    try:
        return encoding.encode_to_numpy(text, allowed_special=allowed_special, disallowed_special=())
    except ValueError as error:
        # Seen for a million whitespace characters in a row. The other calls of tiktoken panic there, with an
        # exception that `except Exception` does not catch.
        raise DataError(f"{where} of {len(text)} characters cannot be split by tiktoken: {error}") from error


def _require_text(text: str, where: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"{where} is {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # tiktoken would put U+FFFD there in silence, tokenizers would call it a wrong type.
        raise DataError(
            f"{where} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
            "which is no character; decode the text with errors='replace' or repair it"
        ) from error


def _require_transformers(tokenizer: AnyTokenizer) -> None:
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        kind = type(tokenizer).__name__
        raise UsageError(f"tokenizer is {kind}; it must be a tiktoken.Encoding or one of transformers")


def _one_sequence(token_ids: torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[int]) -> list[int]:
    values = np.asarray(token_ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids)
    if values.ndim == 2 and values.shape[0] == 1:
        values = values[0]  # (1, T) -> (T,)
    if values.ndim != 1:
        raise UsageError(f"token_ids has shape {values.shape}; it must be one sequence, (T,) or (1, T)")
    if values.size and values.dtype.kind not in "iu":
        raise UsageError(f"token_ids holds {values.dtype} values; ids are integers")
    ids: list[int] = values.tolist()
    return ids


def _require_known(ids: list[int], n_vocab: int) -> None:
    outside = next((token_id for token_id in ids if not 0 <= token_id < n_vocab), None)
    if outside is not None:
        raise UsageError(f"token_ids holds {outside}; the tokenizer's ids are 0 to {n_vocab - 1}")
