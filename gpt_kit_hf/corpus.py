"""From options to tokens: the encoding, the stream to train on and the stream held out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from gpt_kit_hf import tokenization
from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.pretraining_data import TokenStream, held_out_split, stream_of
from gpt_kit_hf.text_sources import TextOptions, load_documents, load_text_files, tokenize_documents

TRAINED_BPE = "bpe"


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What a token is."""

    encoding: str = dataclasses.field(
        default=TRAINED_BPE,
        metadata={"help": "bpe (trained on the text), bytes, gpt2, or a folder that holds a tokenizer.json"},
    )
    vocab_size: int = dataclasses.field(
        default=4096, metadata={"help": "tokens of a trained bpe: 256 bytes, merges and end of text"}
    )

    def __post_init__(self) -> None:
        known = [TRAINED_BPE, "bytes", "gpt2"]
        if self.encoding not in known and not Path(self.encoding).is_dir():
            raise UsageError(unknown_name("encoding", self.encoding, known))
        if self.vocab_size < 258:
            raise UsageError(
                f"vocab_size must be at least 258 (256 bytes, a merge, end of text), got {self.vocab_size}"
            )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens to train on and tokens held out, with the encoding that made them."""

    encoding: tiktoken.Encoding
    train: TokenStream
    held_out: TokenStream
    documents: int
    fingerprint: str


def choose_encoding(text: TextOptions, options: EncodingOptions) -> tiktoken.Encoding:
    """Return the encoding that the options name, trained on the text if it is to be.

    A trained vocabulary has seen all documents of the training files, the held-out part of them included.
    """
    if options.encoding == TRAINED_BPE:
        return tokenization.train_bpe((row["text"] for row in load_documents(text)), options.vocab_size)
    chosen = tokenization.get_encoding(options.encoding)
    if tokenization.END_OF_TEXT not in chosen.special_tokens_set:
        raise UsageError(
            f"encoding {options.encoding!r} has no {tokenization.END_OF_TEXT}, which must end each document"
        )
    return chosen


def prepare_corpus(text: TextOptions, encoding: tiktoken.Encoding, *, seed: int) -> Corpus:
    """Read, tokenise and split the text; what was tokenised before is not tokenised again."""
    documents = load_documents(text)
    stream = stream_of(tokenize_documents(documents, encoding, text.num_proc))
    if text.eval_files is not None:
        train = stream
        held_out = stream_of(
            tokenize_documents(load_text_files(text.eval_files, option="eval_files"), encoding, text.num_proc)
        )
    else:
        train, held_out = held_out_split(stream, text.eval_fraction, seed)
    return Corpus(
        encoding=encoding,
        train=train,
        held_out=held_out,
        documents=len(documents),
        fingerprint=f"{train.fingerprint()}-{held_out.fingerprint()}",
    )
