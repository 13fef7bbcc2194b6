"""Finds text, reads it as documents, and stores their token ids once, in Arrow, on disk."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tiktoken

from gpt_kit_hf import tokenization
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


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Where text comes from and how it becomes documents."""

    text_files: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "UTF-8 text files or globs, a document each; 'python-stdlib' is the source of the Python that runs"
        },
    )
    dataset_name: str | None = dataclasses.field(
        default=None,
        metadata={"help": "dataset of the Hub, or a folder that `datasets` reads, instead of text_files"},
    )
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "configuration of the dataset"})
    dataset_split: str = dataclasses.field(default="train", metadata={"help": "split of the dataset"})
    text_column: str = dataclasses.field(default="text", metadata={"help": "column of the dataset that holds text"})
    document_separator: str | None = dataclasses.field(
        default=None, metadata={"help": "text that ends a document inside a file, such as '<|endoftext|>'"}
    )
    eval_files: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "held-out text files or globs, instead of eval_fraction"}
    )
    eval_fraction: float = dataclasses.field(
        default=0.1,
        metadata={"help": "share of the tokens to hold out: whole documents, then the end of one"},
    )
    num_proc: int = dataclasses.field(default=1, metadata={"help": "processes that tokenise"})

    def __post_init__(self) -> None:
        if bool(self.text_files) == bool(self.dataset_name):
            raise UsageError("give text: exactly one of text_files and dataset_name (try text_files python-stdlib)")
        if not 0.0 < self.eval_fraction < 1.0:
            raise UsageError(f"eval_fraction must lie between 0 and 1, got {self.eval_fraction}")
        if self.num_proc < 1:
            raise UsageError(f"num_proc must be at least 1, got {self.num_proc}")
        if self.document_separator == "":
            raise UsageError("document_separator must not be empty; leave it out if a file is one document")
        if self.document_separator is not None and self.dataset_name:
            raise UsageError("document_separator is for text_files: a row of dataset_name is one document")


def load_documents(options: TextOptions) -> datasets.Dataset:
    """Return the documents to train on, a row each, in the column "text"."""
    if options.text_files is not None:
        return load_text_files(options.text_files, options.document_separator)
    try:
        rows = datasets.load_dataset(options.dataset_name, options.dataset_config, split=options.dataset_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"dataset_name {options.dataset_name!r} cannot be loaded: {reason}") from None
    if options.text_column not in rows.column_names:
        raise DataError(
            f"text_column {options.text_column!r} is not in {options.dataset_name!r}; "
            f"its columns: {', '.join(rows.column_names)}"
        )
    rows = rows.select_columns([options.text_column])
    return rows if options.text_column == "text" else rows.rename_column(options.text_column, "text")


def load_text_files(patterns: list[str], separator: str | None = None, option: str = "text_files") -> datasets.Dataset:
    """Return the documents of text files, cached by the files' content.

    Raises DataError, with `option` or file and line, for a missing or empty file and for bytes that are not UTF-8.
    """
    files = find_files(patterns, option)
    # Not by size and time: an archive unpacked gives different files the same of both.
    stamps = [(str(file.absolute()), _digest(file)) for file in files]
    try:
        return datasets.Dataset.from_generator(
            _read_rows,
            features=datasets.Features({"text": datasets.Value("large_string")}),
            gen_kwargs={"stamps": stamps, "separator": separator},
            # A row can be a whole book: few at a time keep memory small.
            writer_batch_size=64,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


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


def _read_rows(stamps: list[tuple[str, str]], separator: str | None) -> Iterator[dict[str, str]]:
    blank = True
    for name, _ in stamps:
        text = read_text(Path(name))
        for document in [text] if separator is None else text.split(separator):
            if document.strip():
                blank = False
                yield {"text": document}
    if blank:
        raise DataError(f"{', '.join(name for name, _ in stamps[:3])}: only white space, there is no text to train on")


def read_text(file: Path) -> str:
    """Return a UTF-8 file's text, line ends as they are and without a byte order mark."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start})"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def tokenize_documents(
    documents: datasets.Dataset, encoding: tiktoken.Encoding, num_proc: int = 1
) -> datasets.Dataset:
    """Return rows of `input_ids`, a document each and ended by end of text, in the smallest unsigned integer type.

    The result is stored by `datasets` under a fingerprint of the documents and the vocabulary: the same text is
    tokenised once.
    """
    dtype = tokenization.id_dtype(encoding.n_vocab)
    features = datasets.Features({"input_ids": datasets.LargeList(datasets.Value(dtype.name))})
    vocabulary = tokenization.fingerprint(encoding)
    stored_as = hashlib.sha256(f"{documents._fingerprint} {vocabulary} ids-1".encode()).hexdigest()[:16]
    return documents.map(
        _tokenize_rows,
        batched=True,
        with_indices=True,
        batch_size=64,
        writer_batch_size=64,
        fn_kwargs={"encoding": encoding},
        remove_columns=documents.column_names,
        features=features,
        num_proc=num_proc if num_proc > 1 else None,
        new_fingerprint=stored_as,
        desc="tokenising",
    )


def _tokenize_rows(
    rows: dict[str, list[Any]], indices: list[int], encoding: tiktoken.Encoding
) -> dict[str, list[Any]]:
    for index, text in zip(indices, rows["text"], strict=True):
        if not isinstance(text, str):
            raise DataError(f"row {index} of the dataset must hold text, got {text!r}")
    ids = tokenization.encode_ordinary_batch(encoding, rows["text"])
    # Text that spells the marker stays text: only the end of a document ends one.
    end = encoding.encode_single_token(tokenization.END_OF_TEXT)
    return {"input_ids": [np.append(document, document.dtype.type(end)) for document in ids]}
