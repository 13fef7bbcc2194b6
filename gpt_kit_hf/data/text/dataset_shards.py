"""Shards of datasets of the `datasets` library: rows of a stored dataset, and shards of a streamed one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_kit_hf.data.text.documents import AS_IT_IS, Policy, arrow_values, check_value
from gpt_kit_hf.data.text.shards import SHARD_BYTES, Position, Tally, TextChunk
from gpt_kit_hf.errors import DataError

if TYPE_CHECKING:  # slow to import, and not needed for text in files
    import datasets

_ROWS_AT_ONCE = 256
# Files in the folder of a dataset and of a DatasetDict.
_SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")


@dataclass(frozen=True, kw_only=True)
class RowsShard:
    """Rows start..stop-1 of a stored dataset, one document per row, in `column`."""

    dataset: datasets.Dataset
    source: str
    start: int
    stop: int
    column: str
    bytes_per_row: float
    policy: Policy = AS_IT_IS

    @property
    def name(self) -> str:
        """The name in error messages: the dataset and the rows."""
        return f"{self.source} rows {self.start} to {self.stop - 1}"

    @property
    def size(self) -> int:
        """The approximate size in bytes, for progress."""
        return int(self.bytes_per_row * (self.stop - self.start))

    def content_key(self) -> str:
        """Return the fingerprint of the rows; `datasets` has it under a private name only."""
        return f"{self.dataset._fingerprint} {self.column} {self.start} {self.stop}"

    def sketch(self) -> str:
        """Return what stands for the text of a stream."""
        return self.content_key()

    def stamp(self) -> str | None:
        """Return None: the content key costs nothing."""
        return None

    def chunks(self, position: Position | None = None, tally: Tally | None = None) -> Iterator[TextChunk]:
        """Yield the text of each row; a position is a row number, or [row, documents read of it].

        Raises DataError with the row.
        """
        tally = Counter() if tally is None else tally
        begin, inside = position if isinstance(position, list) else (self.start if position is None else position, 0)
        rows = self.dataset.select_columns([self.column]).with_format("arrow")
        for first in range(begin, self.stop, _ROWS_AT_ONCE):
            values = arrow_values(rows[first : min(first + _ROWS_AT_ONCE, self.stop)][self.column])
            for row, value in enumerate(values, start=first):
                read = partial(check_value, value, repr(self.column))
                where = partial("{} row {}".format, self.source, row)
                skip = inside if row == begin else 0
                for text, done in self.policy.row_documents(read, tally, where, skip):
                    yield TextChunk(text, True, [row, done] if done else row + 1)


@dataclass(frozen=True, kw_only=True)
class DatasetShard:
    """One shard of a streamed dataset, one document per row, in `column`."""

    dataset: datasets.IterableDataset
    source: str
    index: int
    column: str
    policy: Policy = AS_IT_IS

    @property
    def name(self) -> str:
        """The name in error messages: the dataset and the shard."""
        return f"{self.source} shard {self.index}"

    def sketch(self) -> str:
        """Return what the metadata tells of the text: the name, the split, the shards, and checksums if it has any."""
        info = self.dataset.info
        known = (info.builder_name, info.config_name, str(self.dataset.split), info.download_checksums, info.splits)
        return repr((self.name, self.column, self.dataset.num_shards, *known))

    def chunks(self, position: Position | None = None, tally: Tally | None = None) -> Iterator[TextChunk]:
        """Yield the text of each row; a position is a state of `datasets`, or [state, documents read of the row].

        Raises DataError with the row.
        """
        tally = Counter() if tally is None else tally
        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.index)
        state, inside = position if isinstance(position, list) else (position, 0)
        if state is not None:
            shard.load_state_dict(state)
        before = shard.state_dict()
        # By `iter`: iterating over the dataset itself would divide its rows among a loader's workers once more.
        for number, rows in enumerate(shard.iter(batch_size=1)):
            if self.column not in rows:
                raise DataError(f"{self.name}: no column {self.column!r} (text_column); it has {', '.join(rows)}")
            # Counted from where reading began: a state of the library does not tell the number of rows before it.
            resumed = "" if position is None else " after the place it resumed from"
            where = partial("{}, row {}{}".format, self.name, number, resumed)
            read = partial(check_value, rows[self.column][0], repr(self.column))
            skip = inside if number == 0 else 0
            after = shard.state_dict()
            for text, done in self.policy.row_documents(read, tally, where, skip):
                yield TextChunk(text, True, [before, done] if done else after)
            before = after


def load_split(named: str, name: str, config: str | None, split: str, *, streaming: bool = False) -> Any:
    """Return a split of a dataset on the Hub, in a folder, or saved by `save_to_disk`, which is never streamed.

    Raises DataError that begins with `named`.
    """
    import datasets

    folder = Path(name).expanduser() if name.startswith("~") else Path(name)
    try:
        if any((folder / marker).is_file() for marker in _SAVED_BY_DATASETS):
            return _saved_split(named, datasets.load_from_disk(str(folder)), config, split)
        place = str(folder) if name.startswith("~") else name
        return datasets.load_dataset(place, config, split=split, streaming=streaming)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        # A DatasetGenerationError says only that an error occurred.
        generation = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if generation and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).split("\n")[0]
        raise DataError(f"{named} cannot be loaded: {reason}") from None


def _saved_split(named: str, saved: Any, config: str | None, split: str) -> Any:
    """Return a split of what `save_to_disk` saved: a DatasetDict, or one dataset, whose split may be known."""
    if config is not None:
        raise DataError(f"{named} cannot be loaded: save_to_disk saves no configurations, leave out dataset_config")
    splits = dict(saved) if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise DataError(
            f"{named} cannot be loaded: save_to_disk saved no split {split!r} there; its splits: {', '.join(splits)}"
        )
    return splits[split]


def rows_shards(
    dataset: datasets.Dataset,
    source: str,
    column: str,
    policy: Policy = AS_IT_IS,
    *,
    shard_bytes: int | None = None,
) -> list[RowsShard]:
    """Divide a dataset into shards of about `shard_bytes`, by default SHARD_BYTES; the same ones at each call."""
    total, size = len(dataset), max(1, dataset.data.nbytes)
    step = max(1, total * (shard_bytes or SHARD_BYTES) // size)
    return [
        RowsShard(
            dataset=dataset,
            source=source,
            start=first,
            stop=min(first + step, total),
            column=column,
            bytes_per_row=size / total,
            policy=policy,
        )
        for first in range(0, total, step)
    ]
