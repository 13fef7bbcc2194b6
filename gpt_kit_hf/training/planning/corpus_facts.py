"""What a plan needs to know of a text: its size, how much of it repeats, and how well gzip compresses it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tiktoken

from gpt_kit_hf.data.text.corpus import Corpus
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.evaluation.metrics import gzip_bits_per_byte, token_byte_lengths

_BLOCK = 1 << 20  # tokens
NEAR_BITS = 10  # of gzip with a window of 1 KB
_LOOKED_AT = 1 << 26  # tokens of the training text in which lines are compared
# Tokens of which gzip tells how difficult a text is, as the first ones have nothing before them to copy.
_ENOUGH = 1 << 13
_LONG_LINE = 32  # bytes of a line whose repetition is no accident


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """Sizes of a text without what is held out, the bits per byte of gzip on what is, and the share that repeats.

    `gzip_near` is that of gzip with a window of 1 KB: small models read about as much at once, and cannot copy from
    farther back either. It is of some of the training text if little is held out. `repeated` is the share of the bytes
    in lines that stand earlier in the text, of lines of 32 bytes and more.
    """

    documents: int
    tokens: int
    text_bytes: int
    eval_tokens: int
    gzip: float
    gzip_near: float
    repeated: float


def corpus_facts(corpus: Corpus) -> CorpusFacts:
    """Return the facts of a corpus; all of it is read once."""
    enough = min(_ENOUGH, len(corpus.train))
    told = corpus.eval
    if len(told) < enough:
        told = TokenStream([corpus.train.read(0, enough)], np.zeros(1, np.int64))
    lengths = token_byte_lengths(corpus.encoding)
    return CorpusFacts(
        documents=corpus.documents,
        tokens=len(corpus.train),
        text_bytes=max(1, int(corpus.train.counts(corpus.encoding.n_vocab) @ lengths)),
        eval_tokens=len(corpus.eval),
        gzip=gzip_bits_per_byte(corpus.eval, corpus.encoding),
        gzip_near=gzip_bits_per_byte(told, corpus.encoding, window_bits=NEAR_BITS),
        repeated=repeated_share(corpus.train, corpus.encoding),
    )


def repeated_share(stream: TokenStream, encoding: tiktoken.Encoding) -> float:
    """Return the share of a stream's bytes in long lines that stand earlier in it; of its first 67M tokens."""
    special = np.array([encoding.encode_single_token(token) for token in encoding.special_tokens_set], np.int64)
    newline = encoding.encode_single_token(b"\n")  # in the place of what ends a document
    seen, repeated, total, rest = set[int](), 0, 0, b""
    for first in range(0, min(len(stream), _LOOKED_AT), _BLOCK):
        ids = stream.read(first, min(first + _BLOCK, len(stream)))
        text = rest + encoding.decode_bytes(np.where(np.isin(ids, special), newline, ids).tolist())
        *lines, rest = text.split(b"\n")
        for line in lines:
            total += len(line) + 1
            if len(line) >= _LONG_LINE:
                repeated += (len(line) + 1) * (hash(line) in seen)
                seen.add(hash(line))
    return repeated / max(1, total)
