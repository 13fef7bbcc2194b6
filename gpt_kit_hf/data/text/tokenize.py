"""Tokenizing before training: the token cache is filled by any number of processes and machines, each its share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from gpt_kit_hf.data.text.dataset_shards import RowsShard
from gpt_kit_hf.data.text.documents import READ
from gpt_kit_hf.data.text.report import Reading
from gpt_kit_hf.data.text.shards import FileShard
from gpt_kit_hf.data.text.sources import eval_source, eval_token_files, train_sources
from gpt_kit_hf.data.text.tokens.token_cache import cache_folder, store_tokens
from gpt_kit_hf.data.text.tokens.token_files import find_token_files, read_token_files
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.options.run import ShareOptions
from gpt_kit_hf.text import duration
from gpt_kit_hf.tokenization import encodings


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """What a share of a text holds, and what of it was tokenized now; `size` is in bytes, as the text is stored."""

    folder: Path
    shards: int
    shards_of_all: int
    made: int
    documents: int
    tokens: int
    size: int
    made_tokens: int
    seconds: float

    def lines(self) -> list[str]:
        """Return lines that describe it."""
        of_text = f"{self.documents:,} document{'s' * (self.documents != 1)}, {self.tokens:,} tokens"
        now = "all were in the cache"
        if self.made:
            rate = self.made_tokens / max(self.seconds, 1e-9)
            now = f"{self.made:,} tokenized now in {duration(self.seconds)}, {rate:,.0f} tokens/s"
        return [
            f"text     {of_text}, from {self.size / 1e6:,.1f} MB",
            f"shards   {self.shards:,} of {self.shards_of_all:,}, {now}",
            f"cache    {self.folder}",
        ]


def stored_shards(text: TextOptions, encoding: tiktoken.Encoding) -> list[FileShard | RowsShard]:
    """Return the shards of which a run stores the tokens, with those of the evaluation text; of a stream these alone.

    Raises DataError for text that is missing or none.
    """
    held_out = eval_source(text)
    sources = [] if text.streaming else [source for _, source in train_sources(text)]
    if held_out is not None and not (text.streaming and held_out.dataset is not None):
        sources.append(held_out)
    return [shard for source in sources for shard in source.shards(encodings.may_cut(encoding))]


def tokenize_text(
    text: TextOptions,
    encoding: tiktoken.Encoding,
    share: ShareOptions | None = None,
    *,
    log: Callable[[str], None] | None = None,
) -> Tokenized:
    """Tokenize a share of the text and of the evaluation text into the token cache; by default all of it.

    Shares are disjoint and together the whole, so that processes and machines with a cache in common tokenize each
    shard once. What is in the cache is not tokenized again. `log` gets a line on the progress every minute. Raises
    DataError for text that cannot be read or encoded.
    """
    share, began, folder = share or ShareOptions(), time.perf_counter(), cache_folder(text.token_cache_dir)
    every = stored_shards(text, encoding)
    if text.token_files and share.shard_index == 0:  # they are read once, to be known by their content
        files = [*find_token_files(text.token_files), *eval_token_files(text)]
        read_token_files(files, encoding, folder)
    own = every[share.shard_index :: share.num_shards]
    stored = store_tokens(own, encoding, text.num_proc, folder, log)
    left_out = sum(Reading(tally=stored.tally, used=0).left_out.values())
    return Tokenized(
        folder=folder,
        shards=len(own),
        shards_of_all=len(every),
        made=stored.made,
        documents=stored.tally[READ] - left_out,
        tokens=sum(chunk.size for chunk in stored.chunks),
        size=sum(shard.size for shard in own),
        made_tokens=stored.made_tokens,
        seconds=time.perf_counter() - began,
    )
