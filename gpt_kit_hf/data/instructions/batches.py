"""Encoded instruction rows as torch batches: packed into sequences, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpt_kit_hf.data.instructions.tokenized import SupervisedRow, SupervisedRows, best_fit_decreasing
from gpt_kit_hf.data.text.windows import IGNORED, collate_windows
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.chunked_loss import padded_size
from gpt_kit_hf.model.losses import Batch


class PackedRows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Sequences of several rows: (input_ids, targets, position_ids), each (max_length,) int64.

    Positions restart with each row, so that rows do not attend to each other, and no row's first id is a target. The
    rest of a sequence is filled with EOS, untrained, as a document of its own. Rows are placed by
    `best_fit_decreasing`.

    Raises UsageError if a row is longer than `max_length`, by default that of the rows' options.
    """

    def __init__(self, rows: SupervisedRows, max_length: int | None = None) -> None:
        self.rows = rows
        self.max_length = rows.options.max_length if max_length is None else max_length
        lengths = rows.lengths - 1  # what the model reads of each
        longest = int(lengths.max())
        if longest > self.max_length:
            raise UsageError(f"max_length={self.max_length}: the longest row has {longest} tokens")
        self.sequences = best_fit_decreasing(lengths, self.max_length)

    def __len__(self) -> int:
        return len(self.sequences)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(sequences,) int64: what the model reads of each."""
        return np.full(len(self), self.max_length, np.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = np.full(self.max_length, self.rows.eos_token_id, np.int64)
        targets = np.full(self.max_length, IGNORED, np.int64)
        positions = np.empty(self.max_length, np.int64)
        start = 0
        for number in self.sequences[index]:
            row_ids, row_targets = _shifted(self.rows[number])
            stop = start + len(row_ids)
            ids[start:stop], targets[start:stop], positions[start:stop] = row_ids, row_targets, np.arange(stop - start)
            start = stop
        positions[start:] = np.arange(self.max_length - start)
        return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(positions)

    def batch_length(self, indices: Sequence[int]) -> int:
        """Return the length of a batch of these sequences: `max_length`."""
        return self.max_length

    def collate(self, items: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Batch:
        """Stack sequences to a batch, (B, max_length) each."""
        return collate_windows(items)


class PaddedRows(Dataset[tuple[Tensor, Tensor]]):
    """One row per item: (input_ids, targets), both (n - 1,) int64 for a row of n ids."""

    def __init__(self, rows: SupervisedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(rows,) int64: what the model reads of each."""
        return self.rows.lengths - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ids, targets = _shifted(self.rows[index])
        return torch.from_numpy(ids), torch.from_numpy(targets)

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Join rows to a batch (B, T), padded on the right with EOS, untrained; T as in `batch_length`."""
        shape = len(items), self._padded(max(len(ids) for ids, _ in items))
        batch = Batch(torch.full(shape, self.rows.eos_token_id), torch.full(shape, IGNORED))
        for row, (ids, targets) in enumerate(items):
            batch.input_ids[row, : len(ids)], batch.targets[row, : len(ids)] = ids, targets
        return batch

    def batch_length(self, indices: Sequence[int]) -> int:
        """Return the length of a batch of these rows: that of the longest, or up to an eighth more.

        There are few such lengths (`padded_size`); none is above `max_length` of the rows' options.
        """
        return self._padded(int(self.lengths[indices].max()))

    def _padded(self, longest: int) -> int:
        # Rows made by hand may be longer than their options say.
        return max(longest, min(padded_size(longest), self.rows.options.max_length))


def _shifted(row: SupervisedRow) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the ids that the model reads and the target of each, (n,) -> (n - 1,); position decides, not the id."""
    return row.input_ids[:-1], np.where(row.trained[1:], row.input_ids[1:], IGNORED)
