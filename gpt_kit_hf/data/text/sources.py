"""Sources of text: the files and datasets that the options name, each divided into shards."""

from __future__ import annotations

import dataclasses
import glob
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_kit_hf.data.text.dataset_shards import DatasetShard, RowsShard, load_split, rows_shards
from gpt_kit_hf.data.text.shards import SHARD_BYTES, FileShard, file_units
from gpt_kit_hf.errors import DataError, UsageError

PYTHON_STDLIB = "python-stdlib"
# Tests repeat themselves and hold files that are deliberately not UTF-8.
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
_DATASET = "dataset:"
_SMALLEST_SHARD = 1 << 12


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Where text comes from and how it becomes documents."""

    text_files: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "files or globs: UTF-8 text (a document each), .jsonl and .parquet (a document a row), also "
            ".gz and .zst; 'python-stdlib' is the source of the Python that runs"
        },
    )
    dataset_name: str | None = dataclasses.field(
        default=None,
        metadata={"help": "dataset of the Hub, or a folder that `datasets` reads, instead of text_files"},
    )
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "configuration of the dataset"})
    dataset_split: str = dataclasses.field(default="train", metadata={"help": "split of the dataset"})
    text_column: str = dataclasses.field(
        default="text", metadata={"help": "column of the dataset, or of the rows of files, that holds text"}
    )
    document_separator: str | None = dataclasses.field(
        default=None, metadata={"help": "text that ends a document inside a text file, such as '<|endoftext|>'"}
    )
    mixture: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "several sources with weights, instead of text_files: WEIGHT:FILES and WEIGHT:dataset:NAME, such "
            "as 0.7:web/*.jsonl 0.3:books/*.txt"
        },
    )
    eval_files: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "held-out files or globs, instead of eval_fraction"}
    )
    eval_split: str | None = dataclasses.field(
        default=None, metadata={"help": "split of the dataset to hold out, instead of eval_fraction"}
    )
    eval_fraction: float = dataclasses.field(
        default=0.1,
        metadata={"help": "share of the tokens to hold out: whole documents, then the end of one"},
    )
    eval_max_tokens: int = dataclasses.field(
        default=2_000_000,
        metadata={"help": "hold out no more than so many tokens by eval_fraction, or of a streamed eval_split"},
    )
    streaming: bool = dataclasses.field(
        default=False,
        metadata={"help": "tokenise while training, and store nothing: needs max_steps, and eval_files or eval_split"},
    )
    shuffle_windows: int = dataclasses.field(
        default=1024, metadata={"help": "windows of a stream that are shuffled together"}
    )
    num_proc: int = dataclasses.field(default=1, metadata={"help": "threads that tokenise"})

    def __post_init__(self) -> None:
        given = [name for name in ("text_files", "dataset_name", "mixture") if getattr(self, name)]
        if len(given) != 1:
            raise UsageError(
                "give text: exactly one of text_files, dataset_name and mixture (try text_files python-stdlib)"
            )
        if not 0.0 < self.eval_fraction < 1.0:
            raise UsageError(f"eval_fraction must lie between 0 and 1, got {self.eval_fraction}")
        for name in ("num_proc", "eval_max_tokens", "shuffle_windows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.document_separator == "":
            raise UsageError("document_separator must not be empty; leave it out if a file is one document")
        if self.document_separator is not None and self.dataset_name:
            raise UsageError("document_separator is for text_files: a row of dataset_name is one document")
        if self.eval_split is not None and (self.eval_files or not self.dataset_name):
            raise UsageError("eval_split is for dataset_name, and without eval_files")
        if self.dataset_config is not None and self.text_files:
            raise UsageError(
                f"dataset_config={self.dataset_config!r} is for dataset_name and mixture; files have none"
            )
        if self.eval_split is not None and self.eval_split == self.dataset_split:
            raise UsageError(f"eval_split={self.eval_split!r} is the split to train on: name another one")
        if self.streaming and self.mixture:
            raise UsageError("streaming and mixture: a mixture is read from stored tokens; give one of them")
        if self.streaming and not (self.eval_files or self.eval_split):
            raise UsageError("streaming needs eval_files or eval_split: a stream has no end to hold out")
        self.sources()

    def sources(self) -> list[tuple[float, TextSource]]:
        """Return the sources to train on, with their weights."""
        if self.mixture is None:
            return [(1.0, self._source(self.text_files, self.dataset_name, self.dataset_config, self.dataset_split))]
        found = []
        for entry in self.mixture:
            weight, _, place = entry.partition(":")
            if not place or not _is_positive(weight):
                raise UsageError(f"mixture {entry!r}: give WEIGHT:FILES, such as 0.3:books/*.txt, the weight above 0")
            dataset_name = place.removeprefix(_DATASET) if place.startswith(_DATASET) else None
            files = None if dataset_name else [place]
            found.append(
                (float(weight), self._source(files, dataset_name, self.dataset_config, self.dataset_split, "mixture"))
            )
        return found

    def held_out(self) -> TextSource | None:
        """Return the source that is held out, None if it is a fraction of the others."""
        if self.eval_files is not None:
            return self._source(self.eval_files, None, None, "", "eval_files")
        if self.eval_split is not None:
            return self._source(None, self.dataset_name, self.dataset_config, self.eval_split, "eval_split")
        return None

    def _source(
        self, files: list[str] | None, dataset: str | None, config: str | None, split: str, option: str = "text_files"
    ) -> TextSource:
        column, separator = self.text_column, self.document_separator
        part = (config, split)
        return TextSource(files=files, dataset=dataset, part=part, column=column, separator=separator, option=option)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Files, or one split of a dataset.

    `part` is the dataset's configuration and split; `option` is the option that names the source.
    """

    files: list[str] | None
    dataset: str | None
    part: tuple[str | None, str]
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

    def streamed_units(self, may_cut: bool) -> Sequence[FileShard | DatasetShard]:
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
        return file_units(files, column=column, separator=separator, may_cut=may_cut, shard_bytes=shard_bytes)

    def _load(self, *, streaming: bool) -> Any:
        config, split = self.part
        named = f"dataset_name {self.dataset!r}, split {split!r},"
        rows = load_split(named, str(self.dataset), config, split, streaming=streaming)
        names = rows.column_names  # None for a stream of unknown columns
        if names is not None and self.column not in names:
            raise DataError(f"text_column {self.column!r} is not in {self.dataset!r}; its columns: {', '.join(names)}")
        return rows


def _is_positive(weight: str) -> bool:
    try:
        return 0.0 < float(weight) < float("inf")
    except ValueError:
        return False


def find_files(patterns: list[str], option: str = "text_files") -> list[Path]:
    """Return the files of the patterns, sorted within each; `python-stdlib` is the source of Python's own library.

    Raises DataError for a pattern without a file or without text, and for a file that cannot be read.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        try:
            files = _stdlib_files() if pattern == PYTHON_STDLIB else _matching_files(pattern, option)
            filled = [file for file in files if file.stat().st_size]
        except OSError as error:
            raise DataError(f"{option} {pattern!r}: {error.strerror}") from None
        if not filled:
            reason = "empty, there is no text to train on" if files else "no such file"
            raise DataError(f"{option} {pattern!r}: {reason}")
        for file in filled:
            found.setdefault(file.resolve(), file)  # a file under two names is one file
    return list(found.values())


def _matching_files(pattern: str, option: str) -> list[Path]:
    if not pattern:
        raise DataError(f"{option}: a name is empty")
    if Path(pattern).is_dir():
        raise DataError(f"{option} {pattern!r} is a folder: name its files, such as {pattern}/**/*.txt")
    # The name of an existing file is not a pattern, even with brackets or stars in it.
    names = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207 (absolute patterns, too)
    return [Path(name) for name in sorted(names) if Path(name).is_file()]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = ((file, file.relative_to(root).parts[:-1]) for file in sorted(root.rglob("*.py")))
    return [file for file, folders in files if not _STDLIB_WITHOUT.intersection(folders)]
