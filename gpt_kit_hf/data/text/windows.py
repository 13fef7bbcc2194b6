"""Windows of tokens: the token stream, its split for evaluation, and the datasets and loader of windows."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpt_kit_hf.data.text.documents import MARKS_IN_TEXT, Policy, document_ends
from gpt_kit_hf.data.text.token_cache import StoredIds
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import EosInText, check_stride
from gpt_kit_hf.tokenization import encodings

# A target of this id is not trained: the default `ignore_index` of torch's cross-entropy.
IGNORED = -100


Ids: TypeAlias = "npt.NDArray[Any] | StoredIds"


class TokenStream:
    """The token ids of documents, one after another, read by position without a copy of the corpus.

    `chunks` are consecutive integer arrays, or ids in the token cache. `document_starts` are the positions where
    documents begin, ascending from 0.
    """

    def __init__(self, chunks: Sequence[Ids], document_starts: npt.NDArray[np.int64]) -> None:
        self.chunks = [chunk for chunk in chunks if chunk.size]
        self.document_starts = document_starts
        self._ends = np.cumsum([chunk.size for chunk in self.chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.chunks else 0

    def views(self, start: int, stop: int) -> list[Ids]:
        """Return the ids at positions start..stop-1 as views, one per chunk."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        index = int(np.searchsorted(self._ends, start, side="right"))
        views = []
        while start < stop:
            chunk, end = self.chunks[index], int(self._ends[index])
            first = end - chunk.size
            views.append(chunk[start - first : stop - first])
            start, index = end, index + 1
        return views

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the ids at positions start..stop-1, (stop - start,)."""
        views = [np.asarray(view) for view in self.views(start, stop)]
        return np.concatenate(views).astype(np.int64) if views else np.empty(0, np.int64)

    def counts(self, n_vocab: int) -> npt.NDArray[np.int64]:
        """Return how often each id occurs, (n_vocab,)."""
        totals = np.zeros(n_vocab, dtype=np.int64)
        for block in self._blocks():
            totals += np.bincount(block, minlength=n_vocab)
        return totals

    def fingerprint(self) -> str:
        """Return a digest of the ids and the document starts; how the ids are chunked does not change it."""
        digest = hashlib.sha256(self.document_starts.astype("<i8").tobytes())
        for block in self._blocks():
            digest.update(block.astype("<u4").tobytes())
        return digest.hexdigest()[:16]

    def _blocks(self) -> Iterator[npt.NDArray[Any]]:
        for chunk in self.chunks:
            for first in range(0, chunk.size, 1 << 20):
                yield np.asarray(chunk[first : first + (1 << 20)])


def join_streams(streams: Sequence[TokenStream]) -> TokenStream:
    """Return the streams as one, in order."""
    shifts = np.cumsum([0, *map(len, streams)])[:-1]
    starts = [stream.document_starts + shift for stream, shift in zip(streams, shifts, strict=True)]
    return TokenStream([chunk for stream in streams for chunk in stream.chunks], np.concatenate(starts))


def split_eval(stream: TokenStream, fraction: float, seed: int) -> tuple[TokenStream, TokenStream]:
    """Split a stream into one to train on and one to evaluate on, which gets `fraction` of the tokens.

    Whole documents, drawn by the seed, go to evaluation, and of the last one drawn only its end. A single document is
    so cut where its last `fraction` begins. Both streams keep the order of the documents.
    """
    starts = stream.document_starts
    ends = np.append(starts[1:], len(stream))
    wanted = round(len(stream) * fraction)
    drawn = np.random.default_rng(seed).permutation(len(starts))
    reached = np.cumsum((ends - starts)[drawn])
    whole = int(np.searchsorted(reached, wanted, side="right"))
    cuts = starts.copy()  # where the evaluation's end of each document begins
    cuts[drawn[whole:]] = ends[drawn[whole:]]
    missing = wanted - (int(reached[whole - 1]) if whole else 0)
    if missing:
        cuts[drawn[whole]] -= missing
    return _select(stream, starts, cuts), _select(stream, cuts, ends)


def _select(stream: TokenStream, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> TokenStream:
    """Return the stream of the spans starts[i]..stops[i]-1, one document each, without the empty ones."""
    filled = starts < stops
    starts, stops = starts[filled], stops[filled]
    # Adjacent spans are read as one chunk.
    firsts = starts[np.append(True, starts[1:] != stops[:-1])[: len(starts)]]
    lasts = stops[np.append(starts[1:] != stops[:-1], True)[: len(stops)]]
    chunks = [view for first, last in zip(firsts, lasts, strict=True) for view in stream.views(int(first), int(last))]
    document_starts = np.cumsum(np.append(0, stops - starts), dtype=np.int64)[:-1]
    return TokenStream(chunks, document_starts)


class TokenWindows(Dataset["tuple[Tensor, ...]"]):
    """Windows of a stream: (input, target), both (max_length,) int64; target t is the token after input t.

    A window reads max_length + 1 ids, so that at stride = max_length every token but the first is a target exactly
    once. The last window ends with the stream and ignores (-100) the targets of the one before; without `keep_tail`
    the tokens after the last regular window are left out.

    With `packing` a window is (input, target, position_ids): positions restart where a document begins, so that the
    model keeps documents apart, and a document's first token, which has no context, is no target.
    """

    def __init__(
        self,
        stream: TokenStream,
        max_length: int,
        stride: int,
        *,
        keep_tail: bool = True,
        packing: bool = False,
    ) -> None:
        if max_length < 1:
            raise UsageError(f"max_length must be at least 1, got {max_length}")
        check_stride(stride, max_length)
        if len(stream) <= max_length:
            raise DataError(
                f"the text has {len(stream)} tokens, fewer than one window: "
                f"max_length={max_length} needs {max_length + 1}; lower max_length, or give more text"
            )
        self.stream, self.max_length, self.stride = stream, max_length, stride
        self.packing = packing
        targets = len(stream) - 1
        self._regular = (targets - max_length) // stride + 1
        self._tail = targets - (self._regular - 1) * stride - max_length if keep_tail else 0

    def __len__(self) -> int:
        return self._regular + (self._tail > 0)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start, fresh = index * self.stride, self.max_length
        if index == self._regular:
            start, fresh = len(self.stream) - 1 - self.max_length, self._tail
        inside = None
        if self.packing:
            starts = self.stream.document_starts
            bounds = np.searchsorted(starts, (start, start + self.max_length), side="right")
            inside = starts[slice(*bounds)] - start
        window = window_item(self.stream.read(start, start + self.max_length + 1), inside)
        window[1][: self.max_length - fresh] = IGNORED
        return window


def window_item(ids: npt.NDArray[np.int64], starts: npt.NDArray[np.int64] | None) -> tuple[Tensor, ...]:
    """Return (input, target), both (T,), of T + 1 ids; with `starts` also position_ids, (T,).

    `starts` are the places from 1 to T where documents begin, ascending: positions restart there, and such an id is
    no target.
    """
    tokens = torch.from_numpy(ids)
    target = tokens[1:].clone()
    if starts is None:
        return tokens[:-1], target
    target[starts - 1] = IGNORED
    begins, inside = np.zeros(len(target), np.int64), starts[starts < len(target)]
    begins[inside] = inside
    positions = np.arange(len(target)) - np.maximum.accumulate(begins)
    return tokens[:-1], target, torch.from_numpy(positions)


def collate_windows(items: Sequence[tuple[Tensor, ...]]) -> Batch:
    """Stack windows of (max_length,) into a batch (B, max_length)."""
    return Batch(*(torch.stack(column) for column in zip(*items, strict=True)))


class GPTPretrainingDataset(TokenWindows):
    """Sliding windows over one text: (input, target), both (max_length,) int64, the target shifted by one.

    `tokenizer` is a tiktoken encoding or a tokenizer of transformers. Documents end, with the EOS token, where they do
    in a file of `gpt-kit train`: at each `document_separator`, and by `eos_in_text` at a "<|endoftext|>" at the end of
    a line. The last document has no EOS token unless the text ends with a mark. A mark within a line is text, and a
    warning tells so.
    """

    def __init__(
        self,
        text: str,
        tokenizer: Any,
        max_length: int,
        stride: int,
        *,
        keep_tail: bool = False,
        eos_in_text: EosInText = "split",
        document_separator: str | None = None,
    ) -> None:
        stream = _stream_of(text, tokenizer, document_separator, eos_in_text)
        super().__init__(stream, max_length, stride, keep_tail=keep_tail)


def _stream_of(text: str, tokenizer: Any, separator: str | None, eos_in_text: EosInText) -> TokenStream:
    encodings.check_text(text, "text")
    end = encodings.get_eos_token_id(tokenizer)
    policy, tally = Policy(eos_in_text if end is not None else "keep"), Counter[str]()
    ends = document_ends(separator, policy.eos_in_text == "split")
    arrays: list[npt.NDArray[np.int64]] = []
    for piece in ends.pieces([text.encode()], 0, tally, whole=True, ends_file=True, chunk_bytes=None):
        document = piece.data.decode()
        if document.strip() or piece.after == len(piece.data):  # a text of white space is its own document
            policy.count_marks(document, tally, lambda: "text")
            ids = encodings.document_ids(document, tokenizer)
            marked = piece.after > piece.place + len(piece.data)
            arrays.append(np.append(ids, end) if marked and end is not None else ids)
    if (count := tally[MARKS_IN_TEXT]) and policy.eos_in_text == "split":
        warnings.warn(
            f"{encodings.EOS_TOKEN} stands {count} times within a line of the text, where it is read as text: "
            f"document_separator={encodings.EOS_TOKEN!r} ends a document at each, eos_in_text='keep' says it is text",
            stacklevel=4,
        )
    return TokenStream(arrays, np.cumsum([0, *(ids.size for ids in arrays)], dtype=np.int64)[:-1])


def create_pretraining_dataloader(
    text: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    eos_in_text: EosInText = "split",
    document_separator: str | None = None,
) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader of (input, target) pairs, both (batch_size, max_length) int64; the target is shifted by one.

    `tokenizer` is GPT-2's encoding by default. `eos_in_text` and `document_separator` say where a document ends, as
    for `GPTPretrainingDataset`. The order of a shuffled epoch follows from the seed alone; torch's
    global random state is neither read nor changed. Raises DataError if the text gives fewer windows than one batch.
    """
    if tokenizer is None:
        tokenizer = encodings.get_encoding("gpt2")
    windows = GPTPretrainingDataset(
        text, tokenizer, max_length, stride, eos_in_text=eos_in_text, document_separator=document_separator
    )
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if drop_last and len(windows) < batch_size:
        raise DataError(
            f"the text gives {len(windows)} windows, fewer than one batch of {batch_size}: "
            "use a smaller batch_size, max_length or stride, or drop_last=False"
        )
    return DataLoader(
        windows,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
    )
