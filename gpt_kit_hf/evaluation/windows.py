"""Text to be scored: documents of a stream as windows that score each of their tokens once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpt_kit_hf.data.text.windows import IGNORED, TokenStream
from gpt_kit_hf.errors import DataError, UsageError, unknown_name
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import check_stride
from gpt_kit_hf.options.evaluation import PaddingSide

_CHUNK = 1 << 20  # ids read at a time


class DocumentWindows(Dataset["tuple[Tensor, Tensor]"]):
    """Windows of a stream's documents: (input, target), both (T,) int64 with T at most max_length.

    Each document stands alone, after one end of text, which predicts its first token, so that every token of text is
    scored once; the end of text after it spells nothing and is not. The first window of a document scores all that
    it reads. The others start `stride` apart and score what no earlier one did, the last ends with the document: a
    token is seen with at least max_length - stride tokens before it, where there are so many. At stride = max_length
    these are the windows of lm-evaluation-harness' rolling log-likelihood.

    Raises UsageError for a stride that skips tokens, DataError where there is no text.
    """

    def __init__(self, stream: TokenStream, *, end_of_text: int, max_length: int, stride: int) -> None:
        check_stride(stride, max_length)
        self.stream, self.end_of_text, self.max_length, self.stride = stream, end_of_text, max_length, stride
        starts = stream.document_starts
        stops = np.append(starts[1:], len(stream))
        filled = starts < stops
        starts, stops = starts[filled], stops[filled]
        stops = stops - _holds(stream, stops - 1, end_of_text)
        self._starts, self._tokens = starts[starts < stops], (stops - starts)[starts < stops]
        if not self._tokens.size:
            raise DataError("there is no text to score")
        self._counts = 1 + -(-np.maximum(self._tokens - max_length, 0) // stride)
        self._ends = np.cumsum(self._counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def tokens(self) -> int:
        """How many tokens all windows score together."""
        return int(self._tokens.sum())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(windows,) int64: what each window reads."""
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
            ids = np.concatenate(([self.end_of_text], ids))
        target = torch.from_numpy(ids[1:].copy())
        scored_before = (turn - 1) * self.stride + self.max_length if turn else 0
        target[: scored_before - first] = IGNORED
        return torch.from_numpy(ids[:-1]), target

    def spread(self, tokens: int | None) -> npt.NDArray[np.int64]:
        """Return numbers of windows from all over the text that read about so many tokens, or all; longest first."""
        chosen = np.arange(len(self))
        if tokens is not None and tokens < self.tokens:
            wanted = -(-tokens * len(self) // self.tokens)
            chosen = np.linspace(0, len(self) - 1, wanted).round().astype(np.int64)
        # Windows of like length need little padding, and the largest batch comes first: if it fits, all do.
        return chosen[np.argsort(-self.lengths[chosen], kind="stable")]


def _holds(stream: TokenStream, positions: npt.NDArray[np.int64], token: int) -> npt.NDArray[np.bool_]:
    """Return whether each of the positions, ascending, holds the token; the stream is read once, in order."""
    found = np.zeros(len(positions), np.bool_)
    for first in range(0, len(stream), _CHUNK):
        last = min(first + _CHUNK, len(stream))
        inside = slice(*np.searchsorted(positions, (first, last)).tolist())
        if inside.start < inside.stop:
            found[inside] = stream.read(first, last)[positions[inside] - first] == token
    return found


def pad_windows(items: Sequence[tuple[Tensor, Tensor]], filler: int, side: PaddingSide = "right") -> Batch:
    """Join (input, target) pairs of unequal length into a batch (B, longest).

    The padding is the id `filler`, untrained. On the right no token sees it. On the left it is, by its positions, a
    document of its own, which the others do not see.
    """
    if side not in ("right", "left"):
        raise UsageError(unknown_name("padding_side", side, ("right", "left")))
    longest = max(len(ids) for ids, _ in items)
    inputs = torch.full((len(items), longest), filler)
    targets = torch.full((len(items), longest), IGNORED)
    positions = torch.zeros(len(items), longest, dtype=torch.long)
    for row, (ids, target) in enumerate(items):
        place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        inputs[row, place], targets[row, place] = ids, target
        positions[row, place] = torch.arange(len(ids))
    return Batch(inputs, targets, positions if side == "left" else None)
