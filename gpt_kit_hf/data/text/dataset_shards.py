"""Text in datasets of the `datasets` library, in units of work like those of files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt_kit_hf.data.text.shards import UNIT_BYTES, Position, TextPart
from gpt_kit_hf.errors import DataError

if TYPE_CHECKING:
    import datasets

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class RowsUnit:
    """Rows start..stop-1 of a dataset on the disk, a document each, in `column`."""

    dataset: datasets.Dataset
    source: str
    start: int
    stop: int
    column: str
    bytes_per_row: float

    @property
    def name(self) -> str:
        """The dataset and the rows."""
        return f"{self.source} rows {self.start} to {self.stop - 1}"

    @property
    def size(self) -> int:
        """About how many bytes the rows take."""
        return int(self.bytes_per_row * (self.stop - self.start))

    def content_key(self) -> str:
        """Return what `datasets` knows the rows by."""
        return f"{self.dataset._fingerprint} {self.column} {self.start} {self.stop}"

    def sketch(self) -> str:
        """Return the key, which costs nothing."""
        return self.content_key()

    def stamp(self) -> str | None:
        """Return None: the key costs nothing."""
        return None

    def parts(self, position: Position | None = None) -> Iterator[TextPart]:
        """Yield the rows' texts; a position is a row's number. Raises DataError with it."""
        for first in range(self.start if position is None else position, self.stop, _ROWS_AT_ONCE):
            texts = self.dataset[first : min(first + _ROWS_AT_ONCE, self.stop)][self.column]
            for row, text in enumerate(texts, start=first):
                yield TextPart(_checked(text, f"{self.source} row {row}"), True, row + 1)


@dataclass(frozen=True, kw_only=True)
class ShardUnit:
    """A shard of a dataset that is streamed, a document a row, in `column`."""

    dataset: datasets.IterableDataset
    source: str
    index: int
    column: str

    @property
    def name(self) -> str:
        """The dataset and the shard."""
        return f"{self.source} shard {self.index}"

    def sketch(self) -> str:
        """Return what the dataset says of itself: its name, split, shards and files' digests, where it has them."""
        info = self.dataset.info
        known = (info.builder_name, info.config_name, str(self.dataset.split), info.download_checksums, info.splits)
        return repr((self.name, self.column, self.dataset.num_shards, *known))

    def parts(self, position: Position | None = None) -> Iterator[TextPart]:
        """Yield the rows' texts; a position is the state that `datasets` resumes from."""
        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.index)
        if position is not None:
            shard.load_state_dict(position)
        # By `iter`: iterating over the dataset itself would share its rows out among a loader's workers once more.
        for number, rows in enumerate(shard.iter(batch_size=1)):
            if self.column not in rows:
                raise DataError(f"{self.name}: no column {self.column!r} (text_column); it has {', '.join(rows)}")
            # Counted from where reading began: the library's state does not say how many rows lie before it.
            where = f"{self.name}, row {number}" + ("" if position is None else " after the place it resumed from")
            yield TextPart(_checked(rows[self.column][0], where), True, shard.state_dict())


def load_split(named: str, name: str, config: str | None, split: str, *, streaming: bool = False) -> Any:
    """Return a split of a dataset of the Hub or of a folder. Raises DataError with `named`, what a user called it."""
    import datasets  # heavy: only where a dataset is read

    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # The library's own sentence is that an error occurred.
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        told = cause or error
        reason = (str(told).strip() or type(told).__name__).split("\n")[0]
        raise DataError(f"{named} cannot be loaded: {reason}") from None


def row_units(dataset: datasets.Dataset, source: str, column: str) -> list[RowsUnit]:
    """Cut a dataset into units of about UNIT_BYTES, the same ones at each call."""
    size = max(1, dataset.data.nbytes)  # asked once: it is summed over all batches
    per_unit = max(1, len(dataset) * UNIT_BYTES // size)
    return [
        RowsUnit(
            dataset=dataset,
            source=source,
            start=first,
            stop=min(first + per_unit, len(dataset)),
            column=column,
            bytes_per_row=size / len(dataset),
        )
        for first in range(0, len(dataset), per_unit)
    ]


def shard_units(dataset: datasets.IterableDataset, source: str, column: str) -> list[ShardUnit]:
    """Return the shards of a streamed dataset."""
    return [
        ShardUnit(dataset=dataset, source=source, index=index, column=column) for index in range(dataset.num_shards)
    ]


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where} must hold text, got {text!r:.60}")
    return text
