"""Arrays in files, and pieces of arrays as one, read where they are needed: a corpus is larger than the memory."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gpt_kit_hf.errors import DataError

Ints: TypeAlias = npt.NDArray[np.int64]


class _OpenFile:
    """A file's descriptor, closed with the last reference to it."""

    def __init__(self, name: str) -> None:
        self._descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # Windows translates line ends else
        self._reading = threading.Lock()
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int, at: int) -> bytes:
        """Return at most `size` bytes from the position `at`."""
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, size, at)
        # On Windows threads share the position. Processes, which would too, are not forked there.
        with self._reading:
            os.lseek(self._descriptor, at, os.SEEK_SET)
            return os.read(self._descriptor, size)


# Opening a file for each window is slow where the cache lies on a network file system.
open_file = functools.lru_cache(maxsize=128)(_OpenFile)


@dataclass(frozen=True)
class StoredIds:
    """Integers in a file, sliced and read like an array.

    Read, not memory-mapped: pages that a run has read do not count as its memory.
    """

    file: str
    first_byte: int
    size: int
    dtype: np.dtype[Any]

    def __getitem__(self, wanted: slice) -> StoredIds:
        start, stop, step = wanted.indices(self.size)
        assert step == 1
        return StoredIds(self.file, self.first_byte + start * self.dtype.itemsize, max(0, stop - start), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        file, length, data = open_file(self.file), self.size * self.dtype.itemsize, b""
        while left := length - len(data):  # one call reads at most 2 GB
            block = file.read(left, self.first_byte + len(data))
            if not block:
                raise DataError(
                    f"{self.file} was cut short; if it is in the token cache, remove it, and it is made again"
                )
            data = data + block if data else block
        return np.frombuffer(data, self.dtype).astype(dtype or self.dtype, copy=False)


AnyIds: TypeAlias = "npt.NDArray[Any] | StoredIds"


@dataclass(frozen=True, eq=False)
class Pieces:
    """Slices of `arrays`, one after another.

    Piece k begins at element first[k] of arrays[source[k]], and ends before position ends[k] of the whole. Arrays, not
    objects: documents that are held out for evaluation may leave a million pieces.
    """

    arrays: Sequence[AnyIds]
    source: Ints
    first: Ints
    ends: Ints

    @classmethod
    def whole(cls, arrays: Sequence[AnyIds]) -> Pieces:
        """Return the arrays themselves, one after another."""
        sizes = np.array([array.size for array in arrays], np.int64)
        return cls(arrays, np.arange(len(arrays)), np.zeros(len(arrays), np.int64), np.cumsum(sizes))

    @classmethod
    def joined(cls, parts: Sequence[Pieces]) -> Pieces:
        """Return the pieces of all parts, in order."""
        arrays = np.cumsum([0, *(len(part.arrays) for part in parts)])
        sizes = np.cumsum([0, *map(len, parts)])
        return cls(
            [array for part in parts for array in part.arrays],
            np.concatenate([part.source + arrays[n] for n, part in enumerate(parts)]),
            np.concatenate([part.first for part in parts]),
            np.concatenate([part.ends + sizes[n] for n, part in enumerate(parts)]),
        )

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.ends.size else 0

    @property
    def begins(self) -> Ints:
        """The position where each piece begins."""
        return np.concatenate((np.zeros(min(1, self.ends.size), np.int64), self.ends[:-1]))

    def views(self, start: int, stop: int) -> list[tuple[int, AnyIds]]:
        """Return the elements at positions start..stop-1 as (piece, view of its array)."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        piece, found = int(np.searchsorted(self.ends, start, side="right")), []
        while start < stop:
            end, begin = int(self.ends[piece]), int(self.ends[piece - 1]) if piece else 0
            base = int(self.first[piece]) - begin
            found.append((piece, self.arrays[self.source[piece]][base + start : base + min(stop, end)]))
            start, piece = end, piece + 1
        return found

    def select(self, starts: Ints, stops: Ints) -> tuple[Pieces, Ints, Ints]:
        """Return the pieces of the spans starts[i]..stops[i]-1, none of them empty; and of each its piece and span."""
        firsts = np.searchsorted(self.ends, starts, side="right")
        counts = np.searchsorted(self.ends, stops - 1, side="right") - firsts + 1
        span = np.repeat(np.arange(len(starts)), counts)
        piece = np.arange(len(span)) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
        begins = self.begins[piece]
        low, high = np.maximum(starts[span], begins), np.minimum(stops[span], self.ends[piece])
        chosen = Pieces(self.arrays, self.source[piece], self.first[piece] + low - begins, np.cumsum(high - low))
        return chosen, piece, span
