"""Encodings: from text to token ids and back. Every vocabulary is a `tiktoken.Encoding`."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tiktoken

from gpt_kit_hf.errors import DataError, UsageError, unknown_name
from gpt_kit_hf.tokenization.bpe_training import learn_tokens
from gpt_kit_hf.tokenization.export import (
    EOS_TOKEN,
    GPT2_PATTERN,
    PAD_TOKEN,
    load_encoding,
    save_tokenizer,
)
from gpt_kit_hf.tokenization.model_encoding import TokenizerEncoding

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    AnyTokenizer: TypeAlias = tiktoken.Encoding | PreTrainedTokenizerBase

# Other modules read these two from here.
__all__ = ["EOS_TOKEN", "load_encoding", "save_tokenizer"]

# The pattern of vocabularies that earlier versions trained: GPT-2's with at most three digits in a pre-token. New ones
# have GPT-2's own, which llama.cpp knows (benchmarks/patterns.py).
_EARLIER_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Nothing merges, so any split gives the same ids. 64 characters encode three times as fast as one, and the bound keeps
# the memory for a long text small.
_BYTES_PATTERN = r"[\s\S]{1,64}"

# White space as tiktoken's patterns define it, in a run that their backtracking should not see: at a million
# characters, it gives up.
_BLANK = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_HALF = 1 << 15
_LONG_BLANK = re.compile(f"{_BLANK}{{{2 * _HALF},}}")
_HALF_BLANK = re.compile(f"{_BLANK}{{{_HALF}}}")

_MIN_VOCAB_SIZE = 258  # 256 bytes, one merge, EOS
_MAX_VOCAB_SIZE = 1 << 20  # four times the largest vocabularies in use; more is a typing error


def get_encoding(name: str) -> tiktoken.Encoding:
    """Return the encoding "gpt2" or "bytes", or the one saved in the folder `name`.

    "bytes" has the byte values as ids 0 to 255 and EOS as 256. tiktoken downloads "gpt2" on first use and keeps it in
    TIKTOKEN_CACHE_DIR. Raises UsageError for an unknown name, for "bpe" (it has no vocabulary before `train_bpe`), and
    if "gpt2" is not cached and cannot be downloaded.
    """
    if name == "gpt2":
        return _fetch_gpt2()
    if name == "bytes":
        return _encoding("bytes", _BYTES_PATTERN, {bytes([byte]): byte for byte in range(256)})
    if name == "bpe":
        raise UsageError("encoding 'bpe' needs a corpus: use train_bpe, or the folder it was saved to")
    if Path(name).is_dir():
        return load_encoding(name)
    raise UsageError(unknown_name("encoding", name, ["gpt2", "bytes", "bpe"]) + " (and no such folder)")


def with_pad_token(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """Return the encoding with one more id, of the padding token "<|pad|>", which no text is encoded to.

    An encoding that has one is returned as it is.
    """
    if PAD_TOKEN in encoding.special_tokens_set:
        return encoding
    specials = {**encoding._special_tokens, PAD_TOKEN: encoding.n_vocab}
    return tiktoken.Encoding(
        encoding.name, pat_str=encoding._pat_str, mergeable_ranks=encoding._mergeable_ranks, special_tokens=specials
    )


def train_bpe(texts: Iterable[str], vocab_size: int, *, pad_token: bool = False) -> tiktoken.Encoding:
    """Return a byte-level BPE with `vocab_size` ids: 256 bytes, the merges in order, EOS, and padding if asked for.

    Byte i has id i. The same texts give the same encoding. If too few pairs occur twice, the encoding is smaller: read
    `n_vocab`. EOS spelled out in a text is ordinary text here. Raises UsageError if `vocab_size` is out of range,
    DataError if there is no text or one that cannot be encoded.
    Source: Sennrich et al. 2016 (BPE), Radford et al. 2019 (on bytes).
    """
    if not _MIN_VOCAB_SIZE <= vocab_size <= _MAX_VOCAB_SIZE:
        raise UsageError(
            f"vocab_size is {vocab_size}; it must be from {_MIN_VOCAB_SIZE} (256 bytes, one merge, EOS) "
            f"to {_MAX_VOCAB_SIZE}"
        )
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in learn_tokens(_checked_corpus(texts), vocab_size - 1 - pad_token):
        # Single bytes are in `ranks` already, with their own value.
        ranks.setdefault(token, len(ranks))
    encoding = _encoding("bpe", GPT2_PATTERN, ranks)
    return with_pad_token(encoding) if pad_token else encoding


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """Return the first 16 hex digits of a SHA-256 over the pattern, the ranks and the special tokens.

    Encodings with the same fingerprint give the same ids for every string. The name does not count.
    """
    if isinstance(encoding, TokenizerEncoding):
        return encoding.fingerprint()
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


def encode_ordinary(encoding: tiktoken.Encoding, text: str, where: str) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return the ids of a text, (T,) of `id_dtype(encoding.n_vocab)`; special tokens are ordinary text.

    Raises DataError, which calls the text `where`, for a lone surrogate or whitespace beyond tiktoken's limit.
    """
    return _encode(encoding, text, where, allowed_special=frozenset()).astype(id_dtype(encoding.n_vocab))


def encode_ordinary_batch(
    encoding: tiktoken.Encoding, texts: Sequence[str]
) -> list[npt.NDArray[np.unsignedinteger[Any]]]:
    """Return the ids of each text as `encode_ordinary` does, in one thread: one per short text is slower than none."""
    return [encode_ordinary(encoding, text, f"texts[{index}]") for index, text in enumerate(texts)]


def encode_documents(
    encoding: tiktoken.Encoding, chunks: Sequence[tuple[str, bool]], where: str
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return the ids of documents end to end, (T,) of `id_dtype(encoding.n_vocab)`, each followed by EOS.

    A chunk is a text and whether a document ends with it. EOS spelled out in a text is ordinary text. Raises
    DataError, with `where`, as `encode_ordinary` does.
    """
    if isinstance(encoding, TokenizerEncoding):
        return _encode_whole_documents(encoding, chunks, where)
    # One call encodes many documents: tiktoken encodes what stands between two special tokens separately.
    joined: list[str] = []
    encoded: list[npt.NDArray[np.uint32]] = []
    eos = np.array([encoding.encode_single_token(EOS_TOKEN)], np.uint32)

    def flush() -> None:
        if joined:
            encoded.append(_encode(encoding, "".join(joined), where, allowed_special={EOS_TOKEN}))
            joined.clear()

    for text, ends_document in chunks:
        if EOS_TOKEN in text:
            flush()
            encoded.append(_encode(encoding, text, where, allowed_special=frozenset()))
            encoded += [eos] * ends_document
        else:
            joined += [text, EOS_TOKEN] if ends_document else [text]
    flush()
    dtype = id_dtype(encoding.n_vocab)
    return np.concatenate(encoded).astype(dtype) if encoded else np.empty(0, dtype)


def _encode_whole_documents(
    encoding: TokenizerEncoding, chunks: Sequence[tuple[str, bool]], where: str
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return the ids of documents, each one chunk (`may_cut`), end to end, each followed by EOS."""
    for text, _ in chunks:
        check_text(text, where)
    encoded = encoding.encode_document_batch([text for text, _ in chunks])
    ids = [token for document in encoded for token in [*document, encoding.end_of_text]]
    return np.array(ids, id_dtype(encoding.n_vocab))


def begin_of_text(encoding: tiktoken.Encoding) -> int | None:
    """Return the id that stands at the start of each document, None if there is none."""
    return encoding.begin_of_text if isinstance(encoding, TokenizerEncoding) else None


def may_cut(encoding: tiktoken.Encoding | None) -> bool:
    """Return whether a text may be cut between a letter and a blank and encoded in chunks, to the same ids.

    This holds if the pattern always splits there: for the patterns of this package, including the one of a vocabulary
    that is not trained yet (None).
    """
    return encoding is None or encoding._pat_str in (GPT2_PATTERN, _EARLIER_PATTERN, _BYTES_PATTERN)


def text_to_token_ids(text: str, tokenizer: AnyTokenizer) -> torch.Tensor:
    """Return the ids of a text as a (1, T) long tensor, for a tiktoken encoding or a transformers tokenizer.

    "<|endoftext|>" in the text becomes EOS; no special token is added. Raises UsageError for another kind of
    tokenizer, DataError for a text that cannot be encoded.
    """
    import torch

    if isinstance(tokenizer, tiktoken.Encoding):
        allowed = tokenizer.special_tokens_set & {EOS_TOKEN}
        ids = _encode(tokenizer, text, "text", allowed_special=allowed)
        return torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)  # (T,) -> (1, T)
    _check_tokenizer(tokenizer)
    check_text(text, "text")
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.long)


def document_ids(text: str, tokenizer: AnyTokenizer) -> npt.NDArray[np.int64]:
    """Return the ids of a document, (T,), for a tiktoken encoding or a transformers tokenizer.

    As `text_to_token_ids`, except that "<|endoftext|>" in the text is ordinary text.
    """
    if isinstance(tokenizer, tiktoken.Encoding):
        return _encode(tokenizer, text, "text", allowed_special=frozenset()).astype(np.int64)
    _check_tokenizer(tokenizer)
    ordinary = {"split_special_tokens": True} if EOS_TOKEN in text else {}
    return np.array(tokenizer(text, add_special_tokens=False, **ordinary)["input_ids"], np.int64)


def token_ids_to_text(
    token_ids: torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[int], tokenizer: AnyTokenizer
) -> str:
    """Return the text of one sequence of ids, (T,) or (1, T), with special tokens and without clean-up.

    Bytes that are not UTF-8 become U+FFFD. Raises UsageError for more than one sequence, for an id outside the
    vocabulary and for another kind of tokenizer.
    """
    ids = _one_sequence(token_ids)
    if not isinstance(tokenizer, tiktoken.Encoding):
        _check_tokenizer(tokenizer)
    n_vocab = tokenizer.n_vocab if isinstance(tokenizer, tiktoken.Encoding) else len(tokenizer)
    outside = next((token_id for token_id in ids if not 0 <= token_id < n_vocab), None)
    if outside is not None:
        raise UsageError(f"token_ids holds {outside}; the tokenizer's ids are 0 to {n_vocab - 1}")
    if isinstance(tokenizer, tiktoken.Encoding):
        return tokenizer.decode(ids)
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def get_pad_token_id(encoding: tiktoken.Encoding) -> int | None:
    """Return the id of "<|pad|>", None without one."""
    return encoding._special_tokens.get(PAD_TOKEN)


def get_eos_token_id(tokenizer: AnyTokenizer) -> int | None:
    """Return the id of EOS: "<|endoftext|>" of a tiktoken encoding, `eos_token` of transformers; None without one."""
    if isinstance(tokenizer, tiktoken.Encoding):
        return tokenizer.eot_token if EOS_TOKEN in tokenizer.special_tokens_set else None
    _check_tokenizer(tokenizer)
    eos: int | None = tokenizer.eos_token_id
    return eos


def check_text(text: str, where: str) -> None:
    """Raise UsageError if `text`, which the message calls `where`, is not a string, DataError for a lone surrogate."""
    if not isinstance(text, str):
        raise UsageError(f"{where} is {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # tiktoken would encode U+FFFD instead without an error, tokenizers would report a wrong type.
        raise DataError(
            f"{where} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
            "which is no character; decode the text with errors='replace' or repair it"
        ) from error


def _encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOS_TOKEN: len(ranks)})


def _fetch_gpt2() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        # Every exception of requests is an OSError; a file with the wrong hash is a ValueError.
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise UsageError(
            f"encoding 'gpt2' could not be fetched ({reason}): set TIKTOKEN_CACHE_DIR to a folder that "
            "holds it, or use --encoding bytes or --encoding bpe, which need no download"
        ) from error


def _checked_corpus(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise UsageError("texts is one string; it must be an iterable of strings")
    empty = True
    for index, text in enumerate(texts):
        check_text(text, f"texts[{index}]")
        empty = empty and not text
        yield text
    if empty:
        raise DataError("texts holds no text to train an encoding on")


def _encode(
    encoding: tiktoken.Encoding, text: str, where: str, *, allowed_special: set[str] | frozenset[str]
) -> npt.NDArray[np.uint32]:
    check_text(text, where)
    # A long run holds a half from a multiple of `_HALF` on: a full search would take a fifth of the time.
    has_long = any(_HALF_BLANK.match(text, place) for place in range(0, len(text), _HALF))
    parts = _without_long_blanks(text, allowed_special) if has_long and may_cut(encoding) else [text]
    try:
        encoded = [
            encoding.encode_to_numpy(part, allowed_special=allowed_special, disallowed_special=()) for part in parts
        ]
    except ValueError as error:
        # Raised for a million whitespace characters in a row. tiktoken's other methods panic there, with an exception
        # that `except Exception` does not catch.
        raise DataError(
            f"{where} of {len(text):,} characters cannot be split by tiktoken ({error}){_longest_blank(text)}"
        ) from error
    return encoded[0] if len(encoded) == 1 else np.concatenate(encoded)


def _longest_blank(text: str) -> str:
    """Return the place of a text's longest run of white space, for a message; "" if none is long."""
    run = max(_LONG_BLANK.finditer(text), key=lambda run: run.end() - run.start(), default=None)
    if run is None:
        return ""
    before = text[max(0, run.start() - 30) : run.start()]
    return f": its {run.end() - run.start():,} white-space characters after {before!r} are too many, shorten them"


def _without_long_blanks(text: str, specials: set[str] | frozenset[str]) -> list[str]:
    """Return a text in parts that have the same ids, none with a long run of white space before another character.

    Before a character other than white space or a special token, the patterns of this package make one pre-token of a
    run without its last character. At the end of a text, they make one of the whole run.
    """
    parts, start = [], 0
    for run in _LONG_BLANK.finditer(text):
        ends = run.end() == len(text) or any(text.startswith(special, run.end()) for special in specials)
        cut = run.end() if ends else run.end() - 1
        parts += [text[start : run.start()], text[run.start() : cut]]
        start = cut
    return [*parts, text[start:]]


def _check_tokenizer(tokenizer: AnyTokenizer) -> None:
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        kind = type(tokenizer).__name__
        raise UsageError(f"tokenizer is {kind}; it must be a tiktoken.Encoding or one of transformers")


def _one_sequence(token_ids: torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[int]) -> list[int]:
    values = np.asarray(token_ids if isinstance(token_ids, Sequence) else token_ids.tolist())
    if values.ndim == 2 and values.shape[0] == 1:
        values = values[0]  # (1, T) -> (T,)
    if values.ndim != 1:
        raise UsageError(f"token_ids has shape {values.shape}; it must be one sequence, (T,) or (1, T)")
    if values.size and values.dtype.kind not in "iu":
        raise UsageError(f"token_ids holds {values.dtype} values; ids are integers")
    ids: list[int] = values.tolist()
    return ids
