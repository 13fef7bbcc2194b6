"""Sources of text: the files and datasets that the options name, each divided into shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_kit_hf.data.text.dataset_shards import DatasetShard, RowsShard, load_split, rows_shards
from gpt_kit_hf.data.text.shards import SHARD_BYTES, FileShard, file_shards
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.options.data import TextOptions, weighted_sources
from gpt_kit_hf.options.files import find_files

_SMALLEST_SHARD = 1 << 12


def train_sources(options: TextOptions) -> list[tuple[float, TextSource]]:
    """Return the sources to train on, with their weights."""
    if options.mixture is None:
        return [(1.0, _source(options, options.text_files, options.dataset_name, options.dataset_train_split))]
    return [
        (weight, _source(options, [files] if files else None, dataset, options.dataset_train_split, "mixture"))
        for weight, dataset, files in weighted_sources(options.mixture)
    ]


def eval_source(options: TextOptions) -> TextSource | None:
    """Return the source to evaluate on, or None if a fraction of the training text is."""
    if options.eval_files is not None:
        return _source(options, options.eval_files, None, "", "eval_files")
    if options.dataset_test_split is not None:
        return _source(options, None, options.dataset_name, options.dataset_test_split, "dataset_test_split")
    return None


def _source(
    options: TextOptions, files: list[str] | None, dataset: str | None, split: str, option: str = "text_files"
) -> TextSource:
    return TextSource(
        files=files,
        dataset=dataset or None,
        config=options.dataset_config,
        split=split,
        column=options.text_column,
        separator=options.document_separator,
        option=option,
    )


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Files, or one split of a dataset; `option` is the option that names them."""

    files: list[str] | None
    dataset: str | None
    config: str | None
    split: str
    column: str
    separator: str | None
    option: str

    @property
    def name(self) -> str:
        """The name in error messages."""
        return str(self.dataset) if self.files is None else ", ".join(self.files[:3])

    def resolved_files(self) -> set[Path]:
        """Return the absolute paths of the files, with symbolic links resolved."""
        return set() if self.files is None else {file.resolve() for file in find_files(self.files, self.option)}

    def shards(self, may_cut: bool) -> Sequence[FileShard | RowsShard]:
        """Return the text in shards; `may_cut` says whether a document may be encoded in chunks.

        Raises DataError for files and datasets that are missing, empty or without the column.
        """
        if self.files is not None:
            return self._file_shards(find_files(self.files, self.option), may_cut, SHARD_BYTES)
        rows = self._load(streaming=False)
        return rows_shards(rows, str(self.dataset), self.column)

    def streamed_shards(self, may_cut: bool) -> Sequence[FileShard | DatasetShard]:
        """Return shards that are read without being stored: a dataset's own, and at least about 32 of files."""
        if self.files is not None:
            files = find_files(self.files, self.option)
            size = sum(file.stat().st_size for file in files)
            return self._file_shards(files, may_cut, min(SHARD_BYTES, max(_SMALLEST_SHARD, size // 32)))
        rows, source = self._load(streaming=True), str(self.dataset)
        return [
            DatasetShard(dataset=rows, source=source, index=index, column=self.column)
            for index in range(rows.num_shards)
        ]

    def _file_shards(self, files: list[Path], may_cut: bool, shard_bytes: int) -> list[FileShard]:
        column, separator = self.column, self.separator
        return file_shards(files, column=column, separator=separator, may_cut=may_cut, shard_bytes=shard_bytes)

    def _load(self, *, streaming: bool) -> Any:
        named = f"dataset_name {self.dataset!r}, split {self.split!r},"
        rows = load_split(named, str(self.dataset), self.config, self.split, streaming=streaming)
        names = rows.column_names  # None for a stream of unknown columns
        if names is not None and self.column not in names:
            raise DataError(f"text_column {self.column!r} is not in {self.dataset!r}; its columns: {', '.join(names)}")
        return rows
