"""Where text comes from: options, the files and datasets that they name, and the units to read these in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_kit_hf.data.text.dataset_shards import RowsUnit, ShardUnit, load_split, row_units, shard_units
from gpt_kit_hf.data.text.shards import UNIT_BYTES, FileUnit, TextUnit, file_units
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.options.data import TextOptions, weighted_sources
from gpt_kit_hf.options.files import find_files

_SMALLEST_UNIT = 1 << 12


def train_sources(options: TextOptions) -> list[tuple[float, TextSource]]:
    """Return the sources to train on, with their weights."""
    if options.mixture is None:
        return [(1.0, _source(options, options.text_files, options.dataset_name, options.dataset_train_split))]
    return [
        (weight, _source(options, [files] if files else None, dataset, options.dataset_train_split, "mixture"))
        for weight, dataset, files in weighted_sources(options.mixture)
    ]


def eval_source(options: TextOptions) -> TextSource | None:
    """Return the source to evaluate on, None if it is a fraction of the others."""
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
        part=(None if option == "eval_files" else options.dataset_config, split),
        column=options.text_column,
        separator=options.document_separator,
        option=option,
    )


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Files, or one split of a dataset: `part` is its configuration and split. `option` is where a user named it."""

    files: list[str] | None
    dataset: str | None
    part: tuple[str | None, str]
    column: str
    separator: str | None
    option: str

    @property
    def name(self) -> str:
        """What a user called it."""
        return str(self.dataset) if self.files is None else ", ".join(self.files[:3])

    def resolved_files(self) -> set[Path]:
        """Return the files, whatever they are called."""
        return set() if self.files is None else {file.resolve() for file in find_files(self.files, self.option)}

    def units(self, may_cut: bool) -> list[TextUnit]:
        """Return the text in units; `may_cut` says whether a document may be encoded in parts.

        Raises DataError for files and datasets that are not there, empty, or without the column.
        """
        if self.files is not None:
            return [*self._file_units(find_files(self.files, self.option), may_cut, UNIT_BYTES)]
        rows = self._load(streaming=False)
        self._check_column(rows.column_names)
        units: list[RowsUnit] = row_units(rows, str(self.dataset), self.column)
        return [*units]

    def streamed_units(self, may_cut: bool) -> Sequence[TextUnit | ShardUnit]:
        """Return units that need not be on the disk, small files in more of them: for a dataset, its shards."""
        if self.files is not None:
            files = find_files(self.files, self.option)
            size = sum(file.stat().st_size for file in files)
            return self._file_units(files, may_cut, min(UNIT_BYTES, max(_SMALLEST_UNIT, size // 32)))
        rows = self._load(streaming=True)
        if rows.column_names is not None:
            self._check_column(rows.column_names)
        return shard_units(rows, str(self.dataset), self.column)

    def _file_units(self, files: list[Path], may_cut: bool, unit_bytes: int) -> list[FileUnit]:
        column, separator = self.column, self.separator
        return file_units(files, column=column, separator=separator, may_cut=may_cut, unit_bytes=unit_bytes)

    def _load(self, *, streaming: bool) -> Any:
        config, split = self.part
        named = f"dataset_name {self.dataset!r}, split {split!r},"
        return load_split(named, str(self.dataset), config, split, streaming=streaming)

    def _check_column(self, names: Sequence[str]) -> None:
        if self.column not in names:
            raise DataError(f"text_column {self.column!r} is not in {self.dataset!r}; its columns: {', '.join(names)}")
