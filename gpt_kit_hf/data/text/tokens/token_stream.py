"""The token stream: the ids of documents one after another, where each begins, and the split for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt_kit_hf.data.order import shuffled
from gpt_kit_hf.data.text.tokens.stored_arrays import AnyIds, Ints, Pieces

_BLOCK = 1 << 20
# Starts that are read at once where one is looked for.
_SEARCHED = 1 << 12


class DocumentStarts:
    """The positions where documents begin, ascending, read from the disk where they are needed.

    Indexed by a number, a slice or an array of numbers like an array. Those of piece k are the values in `pieces` plus
    shift[k]; they lie from low[k] up to, but not at, low[k + 1].
    """

    def __init__(self, pieces: Pieces, shift: Ints, low: Ints) -> None:
        self.pieces, self.shift, self.low = pieces, shift, low

    @classmethod
    def of(cls, starts: npt.ArrayLike) -> DocumentStarts:
        """Return the positions in an array that begins with 0."""
        array = np.asarray(starts, np.int64)
        none = np.zeros(min(1, array.size), np.int64)
        return cls(Pieces.whole([array][: array.size]), none, none)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def size(self) -> int:
        """The number of documents."""
        return len(self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self.read(start, max(start, stop))[::step] if step > 0 else np.asarray(self)[index]
        if np.ndim(index):
            return self._gather(np.asarray(index, np.int64) % max(1, len(self)))
        number = range(len(self))[index]
        return self.read(number, number + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.read(0, len(self)).astype(dtype or np.int64, copy=False)

    def tolist(self) -> list[int]:
        """Return all of them."""
        every: list[int] = self.read(0, len(self)).tolist()
        return every

    def read(self, first: int, stop: int) -> Ints:
        """Return the positions of documents first..stop-1, (stop - first,)."""
        parts = [
            np.asarray(view).astype(np.int64) + self.shift[piece] for piece, view in self.pieces.views(first, stop)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def blocks(self, stop: int) -> Iterator[Ints]:
        """Yield the positions in blocks, each with the first of the next one, the last one with `stop`."""
        for first in range(0, len(self), _BLOCK):
            block = self.read(first, min(first + _BLOCK + 1, len(self)))
            yield block if first + _BLOCK < len(self) else np.append(block, stop)

    def count_to(self, position: int) -> int:
        """Return how many documents begin at or before a position."""
        piece = int(np.searchsorted(self.low, position, side="right")) - 1
        if piece < 0:
            return 0
        first, stop = int(self.pieces.begins[piece]), int(self.pieces.ends[piece])
        while stop - first > _SEARCHED:
            middle = (first + stop) // 2
            first, stop = (middle, stop) if self[middle] <= position else (first, middle)
        return first + int(np.searchsorted(self.read(first, stop), position, side="right"))

    def select(self, firsts: Ints, stops: Ints, lows: Ints, removed: Ints) -> DocumentStarts:
        """Return the documents firsts[i]..stops[i]-1 of spans i, moved back by removed[i] positions.

        None of the spans is empty. The first document of span i begins at lows[i] before that.
        """
        chosen, piece, span = self.pieces.select(firsts, stops)
        low = np.maximum(self.low[piece], lows[span]) - removed[span]
        return DocumentStarts(chosen, self.shift[piece] - removed[span], low)

    def _gather(self, numbers: Ints) -> Ints:
        order, found, done = np.argsort(numbers, kind="stable"), np.empty(numbers.size, np.int64), 0
        ascending = numbers[order]
        while done < numbers.size:
            first = int(ascending[done])
            until = int(np.searchsorted(ascending, first + _BLOCK))
            near = ascending[done:until]
            found[order[done:until]] = self.read(first, int(near[-1]) + 1)[near - first]
            done = until
        return found


class TokenStream:
    """The token ids of documents, one after another, read by position without a copy of the corpus.

    `chunks` are consecutive integer arrays, or ids in files. `document_starts` are the positions where documents
    begin, ascending from 0; they are read like an array.
    """

    def __init__(
        self, chunks: Sequence[AnyIds] | Pieces, document_starts: npt.NDArray[np.int64] | DocumentStarts
    ) -> None:
        self.pieces = chunks if isinstance(chunks, Pieces) else Pieces.whole([each for each in chunks if each.size])
        of = DocumentStarts.of
        self.document_starts = document_starts if isinstance(document_starts, DocumentStarts) else of(document_starts)

    def __len__(self) -> int:
        return len(self.pieces)

    def views(self, start: int, stop: int) -> list[AnyIds]:
        """Return the ids at positions start..stop-1 as views, one per chunk."""
        return [view for _, view in self.pieces.views(start, stop)]

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the ids at positions start..stop-1, (stop - start,)."""
        views = [np.asarray(view) for view in self.views(start, stop)]
        return np.concatenate(views).astype(np.int64) if views else np.empty(0, np.int64)

    def counts(self, n_vocab: int, at_most: int | None = None) -> npt.NDArray[np.int64]:
        """Return how often each id occurs, (n_vocab,): in all blocks of a million ids, or evenly spaced ones.

        These hold about `at_most` ids together.
        """
        totals = np.zeros(n_vocab, dtype=np.int64)
        for block in self._blocks(1 if at_most is None else max(1, round(len(self) / at_most))):
            totals += np.bincount(block, minlength=n_vocab)
        return totals

    def fingerprint(self) -> str:
        """Return a digest of the ids and the document starts; how the ids are chunked does not change it."""
        digest = hashlib.sha256()
        for starts in self.document_starts.blocks(len(self)):
            digest.update(starts[:-1].astype("<i8").tobytes())
        for block in self._blocks():
            digest.update(block.astype("<u4").tobytes())
        return digest.hexdigest()[:16]

    def _blocks(self, step: int = 1) -> Iterator[npt.NDArray[Any]]:
        for first in range(0, len(self), step * _BLOCK):
            yield from map(np.asarray, self.views(first, min(first + _BLOCK, len(self))))


def join_streams(streams: Sequence[TokenStream]) -> TokenStream:
    """Return the streams as one, in order."""
    before = np.cumsum([0, *map(len, streams)])
    starts = [stream.document_starts for stream in streams]
    joined = DocumentStarts(
        Pieces.joined([each.pieces for each in starts]),
        np.concatenate([each.shift + before[n] for n, each in enumerate(starts)]),
        np.concatenate([each.low + before[n] for n, each in enumerate(starts)]),
    )
    return TokenStream(Pieces.joined([stream.pieces for stream in streams]), joined)


def reshuffled(stream: TokenStream, seed: int, epoch: int) -> TokenStream:
    """Return the documents in an order drawn by (seed, epoch), from a token on that is drawn, too; epoch 0 as it is.

    The document in which it begins continues at the end: all tokens are there, and one document is cut in two.
    """
    if epoch == 0:
        return stream
    starts, stops = _bounds(stream, np.arange(len(stream.document_starts)))
    held = stops > starts
    order = shuffled(np.arange(held.sum()), int(held.sum()), seed, epoch)
    starts, stops = starts[held][order], stops[held][order]
    begins = np.cumsum(stops - starts) - (stops - starts)
    first = int(shuffled(np.zeros(1, np.int64), len(stream), seed, epoch)[0])
    cut = int(np.searchsorted(begins, first, side="right")) - 1
    inside = starts[cut] + first - begins[cut]
    # From that token on, the documents after, those before, and the beginning of the one that is cut.
    starts = np.concatenate(([inside], starts[cut + 1 :], starts[: cut + 1]))
    stops = np.concatenate((stops[cut:], stops[:cut], [inside]))
    begins = np.cumsum(stops - starts) - (stops - starts)
    return TokenStream(_spans(stream, starts, stops), begins[stops > starts])


def split_eval(stream: TokenStream, fraction: float, seed: int) -> tuple[TokenStream, TokenStream]:
    """Split a stream into one to train on and one to evaluate on, which gets `fraction` of the tokens.

    Whole documents, drawn by the seed, go to evaluation, and of the last one drawn only its end. A single document is
    so cut where its last `fraction` begins. Both streams keep the order of the documents.
    """
    numbers, starts, stops = _draw(stream, round(len(stream) * fraction), seed)
    held = stops > starts
    numbers, starts, stops = numbers[held], starts[held], stops[held]
    held_out = TokenStream(_spans(stream, starts, stops), np.cumsum(np.append(0, stops - starts))[:-1])
    begins, ends = np.append(0, stops), np.append(starts, len(stream))
    trained = _spans(stream, begins, ends)
    # The documents before, between and after those held out. Of one that is cut, the beginning stays.
    whole = starts == stream.document_starts[numbers]
    firsts, lasts = np.append(0, numbers + 1), np.append(numbers + ~whole, len(stream.document_starts))
    removed = np.cumsum(np.append(0, stops - starts))
    kept = firsts < lasts
    left = stream.document_starts.select(firsts[kept], lasts[kept], begins[kept], removed[kept])
    return TokenStream(trained, left), held_out


def _draw(stream: TokenStream, wanted: int, seed: int) -> tuple[Ints, Ints, Ints]:
    """Return the documents drawn for `wanted` tokens, ascending, and where what is taken of each begins and ends."""
    documents = len(stream.document_starts)
    order = np.arange(documents, dtype=np.min_scalar_type(max(1, documents)))
    np.random.default_rng(seed).shuffle(order)  # as `permutation` does, in less memory
    numbers, begins, ends = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    left = wanted
    while left and numbers.size < documents:
        drawn = order[numbers.size : 2 * numbers.size + _SEARCHED].astype(np.int64)
        starts, stops = _bounds(stream, drawn)
        before = np.cumsum(stops - starts) - (stops - starts)
        used = before < left
        drawn, starts, stops, before = drawn[used], starts[used], stops[used], before[used]
        starts = np.maximum(starts, stops - (left - before))  # of the last one, its end
        left -= int((stops - starts).sum())
        numbers, begins, ends = (np.concatenate(pair) for pair in ((numbers, drawn), (begins, starts), (ends, stops)))
    ascending = np.argsort(numbers)
    return numbers[ascending], begins[ascending], ends[ascending]


def _bounds(stream: TokenStream, numbers: Ints) -> tuple[Ints, Ints]:
    """Return where documents begin and end."""
    starts, last = stream.document_starts, len(stream.document_starts) - 1
    stops = np.where(numbers == last, len(stream), starts[np.minimum(numbers + 1, last)])
    return starts[numbers], stops


def _spans(stream: TokenStream, starts: Ints, stops: Ints) -> Pieces:
    """Return the ids of the spans starts[i]..stops[i]-1 that are not empty."""
    filled = starts < stops
    return stream.pieces.select(starts[filled], stops[filled])[0]
