"""Sources of text: the files and datasets that the options name, each divided into shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from gpt_kit_hf.data.text.dataset_shards import DatasetShard, RowsShard, load_split, rows_shards
from gpt_kit_hf.data.text.documents import Policy
from gpt_kit_hf.data.text.files.file_cache import PlainFile
from gpt_kit_hf.data.text.files.plain_files import FileReading, plain_files
from gpt_kit_hf.data.text.files.remote_files import remote_files
from gpt_kit_hf.data.text.shards import SHARD_BYTES, FileShard, file_shards
from gpt_kit_hf.data.text.tokens.token_files import TokenFile, describe_files, find_token_files
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.options.data import TextOptions, weighted_sources
from gpt_kit_hf.options.files import find_files, folder_notes, is_token_file, is_url

_SMALLEST_SHARD = 1 << 12


def train_sources(options: TextOptions) -> list[tuple[float, TextSource]]:
    """Return the sources of text to train on, with their weights; none of them for token files."""
    if options.token_files:
        return []
    if options.mixture is None:
        return [(1.0, _source(options, options.text_files, options.dataset_name, options.dataset_train_split))]
    return [
        (weight, _source(options, [files] if files else None, dataset, options.dataset_train_split, "mixture"))
        for weight, dataset, files in weighted_sources(options.mixture)
    ]


def eval_source(options: TextOptions) -> TextSource | None:
    """Return the text to evaluate on, or None if a fraction of the training text or token files are."""
    if options.eval_files is not None and not eval_token_files(options):
        return _source(options, options.eval_files, None, "", "eval_files")
    if options.dataset_test_split is not None:
        return _source(options, None, options.dataset_name, options.dataset_test_split, "dataset_test_split")
    return None


def eval_token_files(options: TextOptions) -> list[TokenFile]:
    """Return the token files to evaluate on, if `eval_files` names some."""
    named = options.eval_files or []
    return find_token_files(named, "eval_files") if options.token_files and any(map(is_token_file, named)) else []


def source_notes(options: TextOptions) -> list[str]:
    """Return lines on token files, and on what was left out of the folders and archives that the options name."""
    held_out = eval_source(options)
    sources = [source for _, source in train_sources(options)] + ([held_out] if held_out is not None else [])
    read = [*find_token_files(options.token_files or []), *eval_token_files(options)]
    return list(dict.fromkeys([*(note for source in sources for note in source.notes()), *describe_files(read)]))


def _streamed_size(size: int) -> int:
    return min(SHARD_BYTES, max(_SMALLEST_SHARD, size // 32))


def _source(
    options: TextOptions, files: list[str] | None, dataset: str | None, split: str, option: str = "text_files"
) -> TextSource:
    return TextSource(
        files=files,
        dataset=dataset or None,
        config=options.dataset_config,
        split=split,
        column=options.text_column,
        encoding=options.encoding_of_files,
        separator=options.separator,
        policy=Policy(options.eos_in_text, options.on_bad_text),
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
    encoding: str | None
    separator: str | None
    policy: Policy
    option: str

    @property
    def name(self) -> str:
        """The name in error messages."""
        return str(self.dataset) if self.files is None else ", ".join(self.files[:3])

    def resolved_files(self) -> set[Path]:
        """Return the absolute paths of the files, or of their copies, with symbolic links resolved."""
        local, remote = self._found()
        return {file.resolve() for file in (*local, *(each.file for each in remote))}

    def notes(self) -> list[str]:
        """Return lines on what was left out of folders and archives, and on columns that were chosen."""
        if self.files is None:
            return []
        return [*folder_notes(self.files), *self._plain_files()[1]]

    def shards(self, may_cut: bool) -> Sequence[FileShard | RowsShard]:
        """Return the text in shards; `may_cut` says whether a document may be encoded in chunks.

        Raises DataError for files and datasets that are missing, empty, no text or without the column.
        """
        if self.files is not None:
            return self._file_shards(may_cut, SHARD_BYTES)
        rows = self._load(streaming=False)
        return rows_shards(rows, str(self.dataset), self.column, self.policy)

    def streamed_shards(self, may_cut: bool) -> Sequence[FileShard | RowsShard | DatasetShard]:
        """Return shards that are read without being stored: a dataset's own, and at least about 32 of files."""
        if self.files is not None:
            return self._file_shards(may_cut, None)
        rows, source = self._load(streaming=True), str(self.dataset)
        if isinstance(rows, datasets.Dataset):  # it is on the disk
            return rows_shards(rows, source, self.column, self.policy, shard_bytes=_streamed_size(rows.data.nbytes))
        return [
            DatasetShard(dataset=rows, source=source, index=index, column=self.column, policy=self.policy)
            for index in range(rows.num_shards)
        ]

    def _plain_files(self) -> tuple[list[PlainFile], list[str]]:
        keep_bad = self.policy.on_bad_text != "stop"
        reading = FileReading(column=self.column, encoding=self.encoding, keep_bad=keep_bad)
        return plain_files(*self._found(), reading)

    def _found(self) -> tuple[list[Path], list[PlainFile]]:
        """Return the files of this machine's file systems, and the copies of those behind URLs."""
        named = self.files or []
        remote = [file for name in named if is_url(name) for file in remote_files(name, self.option)]
        return find_files([name for name in named if not is_url(name)], self.option), remote

    def _file_shards(self, may_cut: bool, shard_bytes: int | None) -> list[FileShard]:
        found, _ = self._plain_files()
        return file_shards(
            [place.file for place in found],
            column=self.column,
            separator=self.separator,
            may_cut=may_cut,
            shard_bytes=shard_bytes or _streamed_size(sum(place.file.stat().st_size for place in found)),
            names={file: name for file, name in found if name != str(file)},
            policy=self.policy,
        )

    def _load(self, *, streaming: bool) -> Any:
        named = f"dataset_name {self.dataset!r}, split {self.split!r},"
        rows = load_split(named, str(self.dataset), self.config, self.split, streaming=streaming)
        names = rows.column_names  # None for a stream of unknown columns
        if names is not None and self.column not in names:
            raise DataError(f"text_column {self.column!r} is not in {self.dataset!r}; its columns: {', '.join(names)}")
        return rows
