"""From options to tokens: the encoding, the streams to train on and the stream held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from gpt_kit_hf.data.text.shards import PIECE_BYTES, ReadableUnit
from gpt_kit_hf.data.text.sources import TextSource, eval_source, train_sources
from gpt_kit_hf.data.text.token_cache import StoredTokens, store_tokens
from gpt_kit_hf.data.text.windows import TokenStream, held_out_split, join_streams
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import TRAINED_BPE, EncodingOptions, TextOptions
from gpt_kit_hf.tokenization import encodings


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens to train on and tokens held out, with the encoding that made them.

    `train` is all of it; `sources` are its parts in their order, which a mixture weighs by `weights`.
    """

    encoding: tiktoken.Encoding
    train: TokenStream
    held_out: TokenStream
    sources: tuple[TokenStream, ...]
    weights: tuple[float, ...]
    documents: int
    fingerprint: str


def choose_encoding(text: TextOptions, options: EncodingOptions) -> tiktoken.Encoding:
    """Return the encoding that the options name, trained on the text if it is to be.

    A trained vocabulary has seen the training files with their held-out part; of a large corpus some of every unit.
    """
    if options.encoding == TRAINED_BPE:
        return encodings.train_bpe(_vocabulary_text(text, options.vocab_text_mb << 20), options.vocab_size)
    chosen = encodings.get_encoding(options.encoding)
    if encodings.END_OF_TEXT not in chosen.special_tokens_set:
        raise UsageError(f"encoding {options.encoding!r} has no {encodings.END_OF_TEXT}, which must end each document")
    return chosen


def prepare_corpus(text: TextOptions, encoding: tiktoken.Encoding, *, seed: int) -> Corpus:
    """Read, tokenise and split the text; what was tokenised before is not tokenised again."""
    weights, sources = zip(*train_sources(text), strict=True)
    stored = [_stored(source, encoding, text.num_proc) for source in sources]
    streams = [TokenStream(each.pieces, each.document_starts) for each in stored]
    keys = [each.key for each in stored]
    documents = sum(len(stream.document_starts) for stream in streams)
    if eval_source(text) is not None:
        held_out, key = prepare_held_out(text, encoding)
        split: tuple[object, ...] = (key,)
    else:
        # Each source gives its share, so that the held-out text is a mixture, too.
        fraction = min(text.eval_fraction, text.eval_max_tokens / max(1, sum(map(len, streams))))
        parts = [held_out_split(stream, fraction, seed) for stream in streams]
        streams = [train for train, _ in parts]
        held_out = join_streams([kept for _, kept in parts])
        split = (fraction, seed)
    return Corpus(
        encoding=encoding,
        train=join_streams(streams),
        held_out=held_out,
        sources=tuple(streams),
        weights=tuple(weights),
        documents=documents,
        fingerprint=hashlib.sha256(repr((keys, weights, split)).encode()).hexdigest()[:16],
    )


def prepare_text(text: TextOptions, encoding: tiktoken.Encoding) -> tuple[TokenStream, str]:
    """Return all tokens of the text, none held out, and what tells them from others."""
    stored = [_stored(source, encoding, text.num_proc) for _, source in train_sources(text)]
    stream = join_streams([TokenStream(each.pieces, each.document_starts) for each in stored])
    return stream, hashlib.sha256(repr([each.key for each in stored]).encode()).hexdigest()[:16]


def prepare_held_out(text: TextOptions, encoding: tiktoken.Encoding) -> tuple[TokenStream, str]:
    """Return the tokens of held-out text, and what tells them from others.

    Raises UsageError if a file of it is trained on as well.
    """
    source, num_proc = eval_source(text), text.num_proc
    assert source is not None
    both = source.resolved_files() & {file for _, trained in train_sources(text) for file in trained.resolved_files()}
    if both:
        raise UsageError(f"eval_files: {min(both)} is trained on as well; hold out a file of its own")
    if text.streaming and source.dataset is not None:
        return _streamed_head(source, encoding, text.eval_max_tokens)
    stored = _stored(source, encoding, num_proc)
    return TokenStream(stored.pieces, stored.document_starts), stored.key


def _streamed_head(source: TextSource, encoding: tiktoken.Encoding, most: int) -> tuple[TokenStream, str]:
    """Return the first `most` tokens of a dataset that is not to be stored, in memory."""
    pieces: list[npt.NDArray[Any]] = []
    for unit in source.streamed_units(encodings.may_cut(encoding)):
        for part in unit.parts():
            pieces.append(encodings.encode_documents(encoding, [(part.text, part.ends_document)], unit.name))
            most -= pieces[-1].size
            if most <= 0:
                break
        if most <= 0:
            break
    starts = np.cumsum([0, *(piece.size for piece in pieces)])[:-1]
    stream = TokenStream(pieces, starts.astype(np.int64))
    return stream, stream.fingerprint()


def _stored(source: TextSource, encoding: tiktoken.Encoding, num_proc: int) -> StoredTokens:
    stored = store_tokens(source.units(encodings.may_cut(encoding)), encoding, num_proc)
    if not stored.document_starts.size:
        raise DataError(f"{source.name}: only white space, there is no text to train on")
    return stored


def _vocabulary_text(text: TextOptions, limit: int) -> Iterator[str]:
    """Yield about `limit` bytes of the text to train on, from the beginning of each unit."""
    sources = [source for _, source in train_sources(text)]
    stored = [] if text.streaming else [unit for source in sources for unit in source.units(may_cut=True)]
    streamed = [unit for source in sources for unit in source.streamed_units(may_cut=True)] if text.streaming else []
    units: list[ReadableUnit] = [*stored, *streamed]
    # The size of a stream is not known.
    whole = not text.streaming and sum(unit.size for unit in stored) <= limit
    # Units from all over the corpus, and not so many that their beginnings together are more than the limit.
    chosen = units if whole else units[:: -(-len(units) * PIECE_BYTES // limit)]
    share = max(PIECE_BYTES, limit // len(chosen))
    for unit in chosen:
        left = share
        for part in unit.parts():
            yield part.text
            left -= len(part.text)
            if left <= 0 and not whole:
                break
