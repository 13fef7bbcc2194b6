"""The corpus of a run: the encoding, the tokens to train on and the tokens to evaluate on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from gpt_kit_hf.data.text.dataset_shards import DatasetShard, RowsShard
from gpt_kit_hf.data.text.documents import READ
from gpt_kit_hf.data.text.report import Reading, separator_warnings
from gpt_kit_hf.data.text.shards import CHUNK_BYTES, FileShard
from gpt_kit_hf.data.text.sources import TextSource, eval_source, eval_token_files, train_sources
from gpt_kit_hf.data.text.tokens.token_cache import cache_folder, store_tokens
from gpt_kit_hf.data.text.tokens.token_files import TokenFile, find_token_files, read_token_files, stated_tokenizer
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream, join_streams, split_eval
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import TRAINED_BPE, EncodingOptions, TextOptions
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.tokenization import encodings

_GPT2 = ("gpt2", "openai-community/gpt2")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens to train on and to evaluate on, and the encoding that made them.

    `train` holds the `sources` in order; a mixture weighs them by `weights`. `text` is all of it, before the end of a
    document was split off for evaluation. `eval_reading` is None if the evaluation text is a part of the same text.
    """

    encoding: tiktoken.Encoding
    train: TokenStream
    eval: TokenStream
    sources: tuple[TokenStream, ...]
    weights: tuple[float, ...]
    text: TokenStream
    reading: Reading
    eval_reading: Reading | None
    fingerprint: str

    @property
    def documents(self) -> int:
        """The number of documents."""
        return self.reading.used


class ReadText(NamedTuple):
    """The tokens of a text, their fingerprint, and what was found."""

    stream: TokenStream
    key: str
    reading: Reading


def choose_encoding(text: TextOptions, options: EncodingOptions) -> tiktoken.Encoding:
    """Return the encoding that the options name; "bpe" is trained on the training text. "bpe" and "bytes" can pad.

    If the evaluation text is a fraction of the training files, the vocabulary has seen it. From a corpus larger than
    `vocab_text_mb`, it has seen the start of many shards.
    """
    if text.token_files:
        return _encoding_of_ids(text, options.encoding)
    if options.encoding == TRAINED_BPE:
        texts = _vocabulary_text(text, options.vocab_text_mb << 20)
        return encodings.train_bpe(texts, options.vocab_size, pad_token=True)
    return _named_encoding(options.encoding)


def _named_encoding(name: str) -> tiktoken.Encoding:
    chosen = encodings.get_encoding(name)
    if name == "bytes":  # gpt2 and stored vocabularies stay as they are
        return encodings.with_pad_token(chosen)
    if encodings.EOS_TOKEN not in chosen.special_tokens_set:
        raise UsageError(f"encoding {name!r} has no {encodings.EOS_TOKEN}, which must end each document")
    return chosen


def _encoding_of_ids(text: TextOptions, named: str) -> tiktoken.Encoding:
    """Return the encoding of token files: the one named, which must be the one that they state, or that."""
    if named != TRAINED_BPE:
        chosen = _named_encoding(named)
        check_stated_encoding(text, chosen, f"encoding={named!r}")
        return chosen
    stated = _stated(text)["token_files"]
    own = _known_encoding(stated)
    if own is None:
        made = "the files do not state it" if stated is None else f"a folder with the tokenizer.json of {stated!r}"
        raise UsageError(f"token_files need --encoding, the encoding that they were made with: {made}")
    check_stated_encoding(text, own, f"that of token_files, {stated!r},")
    return own


def check_stated_encoding(text: TextOptions, encoding: tiktoken.Encoding, named: str) -> None:
    """Raise UsageError if token files state another tokenizer than the encoding, as far as it is known here.

    Token files to evaluate on must state the same as those to train on, also if neither is known here.
    """
    stated = _stated(text)
    for option, tokenizer in stated.items():
        known = _known_encoding(tokenizer)
        if known is not None and encodings.fingerprint(known) != encodings.fingerprint(encoding):
            raise UsageError(f"{named} is not the tokenizer that {option} were made with, {tokenizer!r}")
    trained, held_out = stated["token_files"], stated["eval_files"]
    if trained and held_out and trained != held_out and None in map(_known_encoding, (trained, held_out)):
        raise UsageError(f"eval_files were made with the tokenizer {held_out!r}, and token_files with {trained!r}")


def _stated(text: TextOptions) -> dict[str, str | None]:
    """Return the tokenizer that the token files of each option state."""
    read = {"token_files": find_token_files(text.token_files or []), "eval_files": eval_token_files(text)}
    return {option: stated_tokenizer(files, option) for option, files in read.items()}


def _known_encoding(stated: str | None) -> tiktoken.Encoding | None:
    """Return the encoding of a tokenizer that token files state, or None if it is not known here."""
    place = Path(stated or "")
    if stated in _GPT2:
        return _named_encoding("gpt2")
    if not (place.is_absolute() and place.exists()):
        return None
    return _named_encoding(str(place.parent if place.is_file() else place))


def prepare_corpus(text: TextOptions, encoding: tiktoken.Encoding, *, seed: int, log: Report | None = None) -> Corpus:
    """Read, tokenize and split the text; shards in the token cache are not tokenized again.

    `log` gets lines on the progress.
    """
    weights, read = zip(*_read_sources(text, encoding, log), strict=True)
    streams, keys, readings = zip(*read, strict=True)
    whole, eval_reading = join_streams(streams), None
    if text.eval_files or text.dataset_test_split:
        eval_stream, key, eval_reading = prepare_eval(text, encoding, log)
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
        text=whole,
        reading=join_readings(readings),
        eval_reading=eval_reading,
        fingerprint=hashlib.sha256(repr((list(keys), weights, split)).encode()).hexdigest()[:16],
    )


def _read_sources(text: TextOptions, encoding: tiktoken.Encoding, log: Report | None) -> list[tuple[float, ReadText]]:
    """Return what each source holds, with its weight."""
    if text.token_files:
        return [(1.0, _ids_of(find_token_files(text.token_files), encoding, text))]
    return [(weight, _tokenized(source, encoding, text, log)) for weight, source in train_sources(text)]


def _ids_of(files: list[TokenFile], encoding: tiktoken.Encoding, text: TextOptions) -> ReadText:
    stream, key, tally = read_token_files(files, encoding, cache_folder(text.token_cache_dir))
    return ReadText(stream, key, Reading(tally=tally, used=len(stream.document_starts)))


def prepare_text(text: TextOptions, encoding: tiktoken.Encoding) -> ReadText:
    """Return all tokens of the text, their fingerprint, and what was found."""
    read = [_tokenized(source, encoding, text) for _, source in train_sources(text)]
    streams, keys, readings = zip(*read, strict=True)
    key = hashlib.sha256(repr(list(keys)).encode()).hexdigest()[:16]
    return ReadText(join_streams(streams), key, join_readings(readings))


def prepare_eval(text: TextOptions, encoding: tiktoken.Encoding, log: Report | None = None) -> ReadText:
    """Return the tokens of the evaluation files or split, their fingerprint, and what was found.

    Raises UsageError if one of the files is a training file as well.
    """
    if files := eval_token_files(text):
        same = {file.name for file in files} & {file.name for file in find_token_files(text.token_files or [])}
        if same:
            raise UsageError(f"eval_files: {min(same)} is trained on as well; evaluate on a file that is not")
        return _ids_of(files, encoding, text)
    source = eval_source(text)
    assert source is not None
    both = source.resolved_files() & {file for _, trained in train_sources(text) for file in trained.resolved_files()}
    if both:
        raise UsageError(f"eval_files: {min(both)} is trained on as well; evaluate on a file that is not")
    if text.streaming and source.dataset is not None:
        return _streamed_head(source, encoding, text.eval_max_tokens)
    return _tokenized(source, encoding, text, log)


def _streamed_head(source: TextSource, encoding: tiktoken.Encoding, max_tokens: int) -> ReadText:
    """Return the first tokens of a streamed dataset, in memory: whole documents, `max_tokens` or a few more."""
    arrays, size, tally = [], 0, Counter[str]()
    shards = source.streamed_shards(encodings.may_cut(encoding))
    for name, chunk in ((shard.name, chunk) for shard in shards for chunk in shard.chunks(None, tally)):
        arrays.append(encodings.encode_documents(encoding, [chunk[:2]], name))
        size += arrays[-1].size
        if size >= max_tokens:
            break
    starts = np.cumsum([0, *(array.size for array in arrays)])[:-1]
    stream = TokenStream(arrays, starts.astype(np.int64))
    reading = Reading(tally=tally, used=len(arrays))
    tally[READ] = len(arrays) + sum(reading.left_out.values())  # the last row may hold more documents
    return ReadText(stream, stream.fingerprint(), reading)


def _tokenized(
    source: TextSource, encoding: tiktoken.Encoding, text: TextOptions, log: Report | None = None
) -> ReadText:
    shards = source.shards(encodings.may_cut(encoding))
    stored = store_tokens(shards, encoding, text.num_proc, cache_folder(text.token_cache_dir), log)
    warnings = separator_warnings(source.separator, stored.tally, shards)
    reading = Reading(tally=stored.tally, used=stored.document_starts.size, warnings=tuple(warnings))
    added = 1 if encodings.begin_of_text(encoding) is None else 2  # EOS, and what a document starts with
    if sum(chunk.size for chunk in stored.chunks) == added * reading.used:
        gone = ", ".join(f"{n:,} {kind}" for kind, n in reading.left_out.items())
        found = f"all documents were left out ({gone})" if gone else "only white space"
        if reading.used:
            found = f"all documents are empty ({reading.used:,}) or were left out ({gone or 0})"
        raise DataError(f"{source.name}: {found}, there is no text to train on")
    return ReadText(TokenStream(stored.chunks, stored.document_starts), stored.key, reading)


def join_readings(readings: Sequence[Reading]) -> Reading:
    """Return what was found in several texts together."""
    return Reading(
        tally=sum((each.tally for each in readings), Counter[str]()),
        used=sum(each.used for each in readings),
        warnings=tuple(dict.fromkeys(warning for each in readings for warning in each.warnings)),
    )


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
