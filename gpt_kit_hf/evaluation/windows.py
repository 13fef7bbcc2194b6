"""Windows for evaluation: the documents of a stream, each of their tokens scored once, padded to batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.data.text.windows import IGNORED
from gpt_kit_hf.errors import DataError, UsageError, unknown_name
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import check_stride
from gpt_kit_hf.options.evaluation import PaddingSide

_BLOCK = 1 << 20  # ids that are read at once


class DocumentWindows(Dataset["tuple[Tensor, Tensor]"]):
    """Windows of a stream's documents: (input, target), both (T,) int64 with T at most max_length.

    Each document stands alone, after one EOS token that predicts its first token, so that every token of text is
    scored once; the EOS token after it spells nothing and is not scored. If documents start with `begin_of_text`, that
    takes the place of the EOS token before. The first window of a document scores all
    that it reads. The others start `stride` apart and score what no earlier one did; the last ends with the document.
    So a token has at least max_length - stride tokens of context, where its document has them. At
    stride = max_length these are the windows of lm-evaluation-harness' rolling log-likelihood.

    Raises UsageError for a stride that skips tokens, DataError for a stream without text.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        end_of_text: int,
        max_length: int,
        stride: int,
        begin_of_text: int | None = None,
    ) -> None:
        check_stride(stride, max_length)
        self.stream, self.max_length, self.stride = stream, max_length, stride
        self._before = end_of_text if begin_of_text is None else begin_of_text
        starts = np.asarray(stream.document_starts)
        stops = np.append(starts[1:], len(stream))
        filled = starts < stops
        starts, stops = starts[filled], stops[filled]
        stops = stops - _holds(stream, stops - 1, end_of_text)
        if begin_of_text is not None:
            starts = starts + _holds(stream, starts, begin_of_text)
        self._starts, self._tokens = starts[starts < stops], (stops - starts)[starts < stops]
        if not self._tokens.size:
            raise DataError("there is no text to score")
        self._counts = 1 + -(-np.maximum(self._tokens - max_length, 0) // stride)
        self._ends = np.cumsum(self._counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def tokens(self) -> int:
        """The number of tokens that all windows score together."""
        return int(self._tokens.sum())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The length of each window, (windows,)."""
        lengths = np.full(len(self), self.max_length, np.int64)
        lengths[self._ends - self._counts] = np.minimum(self._tokens, self.max_length)
        return lengths

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        document = int(np.searchsorted(self._ends, index, side="right"))
        begin, tokens = int(self._starts[document]), int(self._tokens[document])
        turn = index - int(self._ends[document] - self._counts[document])
        # Targets are the document's tokens first..last-1.
        last = min(turn * self.stride + self.max_length, tokens)
        first = max(0, last - self.max_length)
        ids = self.stream.read(begin + max(first - 1, 0), begin + last)
        if first == 0:
            ids = np.concatenate(([self._before], ids))
        target = torch.from_numpy(ids[1:].copy())
        scored_before = (turn - 1) * self.stride + self.max_length if turn else 0
        target[: scored_before - first] = IGNORED
        return torch.from_numpy(ids[:-1]), target

    def spread(self, tokens: int | None) -> npt.NDArray[np.int64]:
        """Return the indices of windows that score about `tokens` tokens, from the whole text; longest first."""
        chosen = np.arange(len(self))
        if tokens is not None and tokens < self.tokens:
            wanted = -(-tokens * len(self) // self.tokens)
            chosen = np.linspace(0, len(self) - 1, wanted).round().astype(np.int64)
        # Windows of similar length need little padding, and if the first batch fits in memory, all do.
        return chosen[np.argsort(-self.lengths[chosen], kind="stable")]


def _holds(stream: TokenStream, positions: npt.NDArray[np.int64], token: int) -> npt.NDArray[np.bool_]:
    """Return whether each of the positions, ascending, holds the token; reads the stream once, in order."""
    found = np.zeros(len(positions), np.bool_)
    for first in range(0, len(stream), _BLOCK):
        last = min(first + _BLOCK, len(stream))
        inside = slice(*np.searchsorted(positions, (first, last)).tolist())
        if inside.start < inside.stop:
            found[inside] = stream.read(first, last)[positions[inside] - first] == token
    return found


def pad_windows(items: Sequence[tuple[Tensor, Tensor]], filler: int, side: PaddingSide = "right") -> Batch:
    """Pad (input, target) pairs of unequal length with the id `filler`, untrained, to a batch (B, longest).

    Causal attention never sees padding on the right. Padding on the left is, by its positions, a document of its own.
    """
    if side not in ("right", "left"):
        raise UsageError(unknown_name("padding_side", side, ("right", "left")))
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    inputs = pad([ids for ids, _ in items], padding_value=filler)
    targets = pad([target for _, target in items], padding_value=IGNORED)
    positions = pad([torch.arange(len(ids)) for ids, _ in items]) if side == "left" else None
    return Batch(inputs, targets, positions)
