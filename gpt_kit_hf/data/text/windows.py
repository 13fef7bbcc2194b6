"""Windows of tokens: the datasets and loader of windows of a token stream."""

from __future__ import annotations

import bisect
import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpt_kit_hf.data.text.documents import MARKS_IN_TEXT, Policy, document_ends
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream, reshuffled
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import EosInText, WindowOptions, check_stride
from gpt_kit_hf.tokenization import encodings

# A target of this id is not trained: the default `ignore_index` of torch's cross-entropy.
IGNORED = -100


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
            inside = starts.read(starts.count_to(start), starts.count_to(start + self.max_length)) - start
        window = window_item(self.stream.read(start, start + self.max_length + 1), inside)
        window[1][: self.max_length - fresh] = IGNORED
        return window


class EpochWindows(Dataset["tuple[Tensor, ...]"]):
    """The windows of one or several streams; with `reshuffle`, others in each epoch.

    The windows of epoch e have the indices from e * len(self) on, stream by stream. They are cut from `reshuffled`
    documents; those of epoch 0 from the streams as they are. Without `reshuffle`, there is only epoch 0.
    """

    def __init__(self, streams: Sequence[TokenStream], options: WindowOptions, *, seed: int) -> None:
        self._options, self._seed = options, seed
        self._windows = [{0: self._cut(stream)} for stream in streams]
        self.sizes = tuple(len(each[0]) for each in self._windows)
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        epoch, inside = divmod(index, len(self))
        if epoch < 0 or (epoch and not self._options.reshuffle):
            raise IndexError(f"window {index} of {len(self)}")
        source = bisect.bisect_right(self._ends, inside)
        return self._of_epoch(source, epoch)[inside - self._ends[source] + self.sizes[source]]

    def _of_epoch(self, source: int, epoch: int) -> TokenWindows:
        windows = self._windows[source]
        if epoch not in windows:
            # A batch may have samples of two epochs. The first is what the others are cut from.
            for old in windows.keys() - {0, epoch - 1}:
                del windows[old]
            windows[epoch] = self._cut(reshuffled(windows[0].stream, self._seed + source, epoch))
        return windows[epoch]

    def _cut(self, stream: TokenStream) -> TokenWindows:
        return TokenWindows(stream, self._options.length, self._options.step, packing=self._options.packing)


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
