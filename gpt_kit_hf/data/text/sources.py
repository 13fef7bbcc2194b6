"""Where text comes from: options, the files and datasets that they name, and the units to read these in."""

from __future__ import annotations

import dataclasses
import glob
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_kit_hf.data.text.dataset_shards import RowsUnit, ShardUnit, load_split, row_units, shard_units
from gpt_kit_hf.data.text.shards import UNIT_BYTES, FileUnit, TextUnit, file_units
from gpt_kit_hf.errors import DataError, UsageError

PYTHON_STDLIB = "python-stdlib"
# Tests repeat themselves and hold files that are not UTF-8 on purpose.
_STDLIB_WITHOUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib-dynload",
}
_DATASET = "dataset:"
_SMALLEST_UNIT = 1 << 12


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


def _is_positive(weight: str) -> bool:
    try:
        return 0.0 < float(weight) < float("inf")
    except ValueError:
        return False


def find_files(patterns: list[str], option: str = "text_files") -> list[Path]:
    """Return the files that the patterns name, sorted within a pattern; `python-stdlib` names Python's own source.

    Raises DataError for a pattern without a file, for a file that cannot be read and for a pattern without text.
    """
    found: list[Path] = []
    for pattern in patterns:
        try:
            files = _stdlib_files() if pattern == PYTHON_STDLIB else _matching_files(pattern, option)
            filled = [file for file in files if file.stat().st_size]
        except OSError as error:
            raise DataError(f"{option} {pattern!r}: {error.strerror}") from None
        if not files:
            raise DataError(f"{option} {pattern!r}: no such file")
        if not filled:
            raise DataError(f"{option} {pattern!r}: empty, there is no text to train on")
        found += filled
    once: dict[Path, Path] = {}
    for file in found:
        once.setdefault(file.resolve(), file)  # a file under two names is one file
    return list(once.values())


def _matching_files(pattern: str, option: str) -> list[Path]:
    if not pattern:
        raise DataError(f"{option}: a name is empty")
    if Path(pattern).is_dir():
        raise DataError(f"{option} {pattern!r} is a folder: name its files, such as {pattern}/**/*.txt")
    # A name that exists is meant as it stands, brackets and stars included.
    names = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207 (absolute patterns, too)
    return [Path(name) for name in sorted(names) if Path(name).is_file()]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        file
        for file in sorted(root.rglob("*.py"))
        if not _STDLIB_WITHOUT.intersection(file.relative_to(root).parts[:-1])
    ]
