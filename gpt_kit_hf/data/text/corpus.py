"""The corpus of a run: the encoding, the tokens to train on and the tokens to evaluate on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken

from gpt_kit_hf.data.text.dataset_shards import DatasetShard, RowsShard
from gpt_kit_hf.data.text.shards import CHUNK_BYTES, FileShard
from gpt_kit_hf.data.text.sources import TextSource, eval_source, train_sources
from gpt_kit_hf.data.text.token_cache import store_tokens
from gpt_kit_hf.data.text.windows import TokenStream, join_streams, split_eval
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import TRAINED_BPE, EncodingOptions, TextOptions
from gpt_kit_hf.tokenization import encodings


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens to train on and to evaluate on, and the encoding that made them.

    `train` holds the `sources` in order; a mixture weighs them by `weights`.
    """

    encoding: tiktoken.Encoding
    train: TokenStream
    eval: TokenStream
    sources: tuple[TokenStream, ...]
    weights: tuple[float, ...]
    documents: int
    fingerprint: str


def choose_encoding(text: TextOptions, options: EncodingOptions) -> tiktoken.Encoding:
    """Return the encoding that the options name; "bpe" is trained on the training text.

    If the evaluation text is a fraction of the training files, the vocabulary has seen it. From a corpus larger than
    `vocab_text_mb`, it has seen the start of many shards.
    """
    if options.encoding == TRAINED_BPE:
        return encodings.train_bpe(_vocabulary_text(text, options.vocab_text_mb << 20), options.vocab_size)
    chosen = encodings.get_encoding(options.encoding)
    if encodings.EOS_TOKEN not in chosen.special_tokens_set:
        raise UsageError(f"encoding {options.encoding!r} has no {encodings.EOS_TOKEN}, which must end each document")
    return chosen


def prepare_corpus(text: TextOptions, encoding: tiktoken.Encoding, *, seed: int) -> Corpus:
    """Read, tokenize and split the text; shards in the token cache are not tokenized again."""
    weights, sources = zip(*train_sources(text), strict=True)
    streams, keys = zip(*(_tokenized(source, encoding, text.num_proc) for source in sources), strict=True)
    documents = sum(len(stream.document_starts) for stream in streams)
    if eval_source(text) is not None:
        eval_stream, key = prepare_eval(text, encoding)
        split: tuple[object, ...] = (key,)
    else:
        # From each source, so that the evaluation text has the proportions of the mixture's sources.
        fraction = min(text.eval_fraction, text.eval_max_tokens / max(1, sum(map(len, streams))))
        streams, eval_streams = zip(*(split_eval(stream, fraction, seed) for stream in streams), strict=True)
        eval_stream = join_streams(eval_streams)
        split = (fraction, seed)
    return Corpus(
        encoding=encoding,
        train=join_streams(streams),
        eval=eval_stream,
        sources=streams,
        weights=weights,
        documents=documents,
        fingerprint=hashlib.sha256(repr((list(keys), weights, split)).encode()).hexdigest()[:16],
    )


def prepare_text(text: TextOptions, encoding: tiktoken.Encoding) -> tuple[TokenStream, str]:
    """Return all tokens of the text and their fingerprint."""
    streams, keys = zip(
        *(_tokenized(source, encoding, text.num_proc) for _, source in train_sources(text)), strict=True
    )
    return join_streams(streams), hashlib.sha256(repr(list(keys)).encode()).hexdigest()[:16]


def prepare_eval(text: TextOptions, encoding: tiktoken.Encoding) -> tuple[TokenStream, str]:
    """Return the tokens of the evaluation files or split, and their fingerprint.

    Raises UsageError if one of the files is a training file as well.
    """
    source = eval_source(text)
    assert source is not None
    both = source.resolved_files() & {file for _, trained in train_sources(text) for file in trained.resolved_files()}
    if both:
        raise UsageError(f"eval_files: {min(both)} is trained on as well; evaluate on a file that is not")
    if text.streaming and source.dataset is not None:
        return _streamed_head(source, encoding, text.eval_max_tokens)
    return _tokenized(source, encoding, text.num_proc)


def _streamed_head(source: TextSource, encoding: tiktoken.Encoding, max_tokens: int) -> tuple[TokenStream, str]:
    """Return the first tokens of a streamed dataset, in memory: whole documents, `max_tokens` or a few more."""
    arrays, size = [], 0
    shards = source.streamed_shards(encodings.may_cut(encoding))
    for name, chunk in ((shard.name, chunk) for shard in shards for chunk in shard.chunks()):
        arrays.append(encodings.encode_documents(encoding, [chunk[:2]], name))
        size += arrays[-1].size
        if size >= max_tokens:
            break
    starts = np.cumsum([0, *(array.size for array in arrays)])[:-1]
    stream = TokenStream(arrays, starts.astype(np.int64))
    return stream, stream.fingerprint()


def _tokenized(source: TextSource, encoding: tiktoken.Encoding, num_proc: int) -> tuple[TokenStream, str]:
    stored = store_tokens(source.shards(encodings.may_cut(encoding)), encoding, num_proc)
    if not stored.document_starts.size:
        raise DataError(f"{source.name}: only white space, there is no text to train on")
    return TokenStream(stored.chunks, stored.document_starts), stored.key


def _vocabulary_text(text: TextOptions, limit: int) -> Iterator[str]:
    """Yield about `limit` bytes of the training text, from the start of each shard."""
    shards: Sequence[FileShard | RowsShard | DatasetShard]
    sources = [source for _, source in train_sources(text)]
    if text.streaming:  # the size of a stream is not known
        shards, whole = [shard for source in sources for shard in source.streamed_shards(may_cut=True)], False
    else:
        shards = stored = [shard for source in sources for shard in source.shards(may_cut=True)]
        whole = sum(shard.size for shard in stored) <= limit
    if not whole:  # shards from the whole corpus, few enough that a chunk of each does not exceed the limit
        shards = shards[:: -(-len(shards) * CHUNK_BYTES // limit)]
    share = max(CHUNK_BYTES, limit // len(shards))
    for shard in shards:
        left = share
        for chunk in shard.chunks():
            yield chunk.text
            left -= len(chunk.text)
            if left <= 0 and not whole:
                break
