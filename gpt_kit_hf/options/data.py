"""Options of the data: text, its encoding and windows, and instruction rows."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.options.declare import Options, Resume, changed_values, option
from gpt_kit_hf.options.files import check_encoding_of_files, check_local, check_options_of_ids

TRAINED_BPE = "bpe"
KEEP = "keep"
DEFAULT_MAX_LENGTH = 256
DEFAULT_VOCAB_SIZE = 4096
RowFormat: TypeAlias = Literal["auto", "alpaca", "chat", "prompt_completion", "text"]
TrainOn: TypeAlias = Literal["answers", "last_answer", "everything"]
EosInText: TypeAlias = Literal["split", "keep", "error"]
OnBadText: TypeAlias = Literal["stop", "skip", "replace"]
Truncation: TypeAlias = Literal["error", "drop", "truncate_prompt"]
Thinking: TypeAlias = Literal["drop", "train"]
UnknownKeys: TypeAlias = Literal["report", "error"]
# The fields of rows, to which columns of other names can be mapped.
ROW_FIELDS = (
    *("instruction", "input", "output", "system", "history"),
    *("prompt", "completion", "messages", "text"),
)


_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|([ntr\\]))")


def separator_option() -> Any:
    """Declare `document_separator`."""
    return option(
        None,
        "string that separates documents within a plain text file, such as '<|endoftext|>' or '\\n\\n'; the escapes "
        "\\n, \\t, \\r, \\\\, \\xNN and \\uNNNN are read",
        unset="a file is one document",
    )


def eos_option() -> Any:
    """Declare `eos_in_text`."""
    return option(
        "split",
        "how <|endoftext|> that is written in the text is read: split ends a document where it stands at the end of a "
        "line, and is text elsewhere; keep is text everywhere; error refuses it",
    )


def bad_text_option() -> Any:
    """Declare `on_bad_text`."""
    return option(
        "stop",
        "what to do at text that is null, no string, not UTF-8 or holds half a surrogate: stop with an error, skip "
        "the document and count it, or replace bad characters by U+FFFD (and skip what has no text)",
    )


def read_escapes(separator: str) -> str:
    """Return a document separator with its escapes read; a backslash before another character stays."""
    simple = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    found = _ESCAPE.sub(lambda match: simple.get(match[3]) or chr(int(match[1] or match[2], 16)), separator)
    if not found.isascii() and any("\ud800" <= character <= "\udfff" for character in found):
        raise UsageError(f"document_separator {separator!r} holds half a surrogate, which no text does")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """The text: where it comes from and which part of it is for evaluation."""

    resume_by_default: ClassVar[Resume] = "text"

    text_files: list[str] | None = option(
        None,
        "files, folders, globs or URLs of these such as s3://..., or - for the standard input: plain text (one "
        "document per file), .jsonl, .csv, .tsv or .parquet (one document per row), also compressed as .gz or .zst, "
        "and .tar or .zip archives of these; "
        "python-stdlib is the source code of the running Python's standard library",
        unset="none",
        excludes=("dataset_name", "mixture"),
        card="path",
        names="files",
    )
    token_files: list[str] | None = option(
        None,
        "files of token ids that another program wrote, read where they lie: .bin of nanoGPT, llm.c and Megatron-LM "
        "(with .idx), .ds of datatrove (with .ds.index); needs encoding unless a file states it",
        unset="none",
        excludes=("text_files", "dataset_name", "mixture"),
        card="path",
        names="files",
    )
    dataset_name: str | None = option(
        None,
        "dataset on the Hub, or local folder that the datasets library can load or has saved (save_to_disk)",
        unset="none",
        excludes=("mixture",),
        card="path_or_id",
    )
    dataset_config: str | None = option(None, "configuration (subset) of the dataset", unset="the dataset's default")
    dataset_train_split: str = option("train", "split of the dataset to train on")
    text_column: str = option("text", "column of the dataset, or key of the rows of files, that holds the text")
    encoding_of_files: str | None = option(
        None,
        "encoding of text, CSV and JSON files without a byte-order mark, such as cp1252: a name of Python's codecs",
        unset="utf-8",
    )
    document_separator: str | None = separator_option()
    eos_in_text: EosInText = eos_option()
    on_bad_text: OnBadText = bad_text_option()
    mixture: list[str] | None = option(
        None,
        "weighted sources, as WEIGHT:FILES or WEIGHT:dataset:NAME, such as 0.7:web/*.jsonl 0.3:books/*.txt",
        unset="none",
        card="mixture",
        names="weighted_files",
    )
    eval_files: list[str] | None = option(
        None,
        "files or globs to evaluate on; with token_files, .bin and .ds files are token files",
        unset="eval_fraction of the text",
        excludes=("dataset_test_split",),
        card="path",
        names="files",
    )
    dataset_test_split: str | None = option(
        None, "split of the dataset to evaluate on", unset="eval_fraction of the text"
    )
    eval_fraction: float = option(
        0.1,
        "fraction of the tokens to evaluate on instead of training: whole documents, and the end of one",
        above=0,
        below=1,
    )
    eval_max_tokens: int = option(
        2_000_000,
        "upper limit, in tokens, of the evaluation text that eval_fraction or a streamed dataset_test_split gives",
        minimum=1,
    )
    streaming: bool = option(
        False, "tokenize during training and store nothing; needs max_steps, and eval_files or dataset_test_split"
    )
    shuffle_windows: int = option(
        1024, "size of the shuffle buffer of a streamed text, in windows of max_length tokens", minimum=1
    )
    stream_shards: int | None = option(
        None,
        "parts in which a streamed text is read at once, a divisor of batch_size; a part that several processes share "
        "is tokenized by each of them",
        unset="up to 8",
        minimum=1,
    )
    num_proc: int = option(1, "threads of a machine that tokenize", minimum=1, resume="free")
    token_cache_dir: str | None = option(
        None,
        "folder in which the tokens are kept; in one on a shared file system, the machines of a run divide the work",
        unset="gpt-kit-tokens in the cache of datasets",
        resume="free",
        metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        if sum(1 for name in ("text_files", "token_files", "dataset_name", "mixture") if getattr(self, name)) != 1:
            raise UsageError(
                "give text: exactly one of text_files, token_files, dataset_name and mixture (try text_files "
                "python-stdlib)"
            )
        super().__post_init__()
        check_encoding_of_files(self.encoding_of_files)
        check_local("token_cache_dir", self.token_cache_dir or "")
        if self.document_separator == "":
            raise UsageError("document_separator must not be empty; leave it out if a file is one document")
        if self.token_files:
            check_options_of_ids(changed_values(self), self.eval_files)
        if self.document_separator is not None and self.dataset_name:
            raise UsageError("document_separator is for text_files: a row of dataset_name is one document")
        if self.dataset_test_split is not None and not self.dataset_name:
            raise UsageError("dataset_test_split is for dataset_name: name eval_files instead")
        if self.dataset_config is not None and (self.text_files or self.token_files):
            raise UsageError(
                f"dataset_config={self.dataset_config!r} is for dataset_name and mixture; files have none"
            )
        if self.dataset_test_split is not None and self.dataset_test_split == self.dataset_train_split:
            raise UsageError(
                f"dataset_test_split={self.dataset_test_split!r} is the split to train on: name another one"
            )
        if self.streaming and self.mixture:
            raise UsageError("streaming and mixture: a mixture is read from stored tokens; give one of them")
        if self.stream_shards is not None and not self.streaming:
            raise UsageError(f"stream_shards={self.stream_shards} is for streaming: add it, or leave this out")
        if self.streaming and not (self.eval_files or self.dataset_test_split):
            raise UsageError("streaming needs eval_files or dataset_test_split: a stream has no end to split off")
        weighted_sources(self.mixture or [])
        _ = self.separator

    @property
    def separator(self) -> str | None:
        """The document separator, its escapes read."""
        return None if self.document_separator is None else read_escapes(self.document_separator)


def weighted_sources(mixture: list[str]) -> list[tuple[float, str, str]]:
    """Return (weight, dataset or "", files or "") of each entry of `mixture`. Raises UsageError."""
    found = []
    for entry in mixture:
        weight, _, place = entry.partition(":")
        if not place or not _is_positive(weight):
            raise UsageError(f"mixture {entry!r}: give WEIGHT:FILES, such as 0.3:books/*.txt, the weight above 0")
        dataset = place.removeprefix("dataset:") if place.startswith("dataset:") else ""
        found.append((float(weight), dataset, "" if dataset else place))
    return found


def _is_positive(weight: str) -> bool:
    try:
        return 0.0 < float(weight) < float("inf")
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingOptions(Options):
    """The tokenizer."""

    encoding: str = option(
        TRAINED_BPE,
        "bpe (trained on the text), bytes, gpt2, or a folder with a tokenizer.json; with token_files theirs, "
        "with model_name_or_path only that model's own, which needs no name",
        card="path",
        metavar="NAME|FOLDER",
    )
    vocab_size: int = option(
        DEFAULT_VOCAB_SIZE, "vocabulary size of a trained bpe: 256 bytes, the merges, the end of text and the padding"
    )
    vocab_text_mb: int = option(100, "megabytes of text, sampled from the whole corpus, to train a bpe on", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [TRAINED_BPE, "bytes", "gpt2"]
        if self.encoding not in known and not Path(self.encoding).is_dir():
            raise UsageError(unknown_name("encoding", self.encoding, known))
        if self.vocab_size < 258:
            raise UsageError(
                f"vocab_size must be at least 258 (256 bytes, end of text, padding), got {self.vocab_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowOptions(Options):
    """The windows of tokens that a model is trained on."""

    max_length: int | None = option(
        None, "tokens per window", minimum=1, unset="256, at most the positions of model_name_or_path"
    )
    stride: int | None = option(None, "tokens between the starts of two windows", unset="max_length")
    packing: bool = option(
        False, "mask attention between the documents of a window, and do not train on the token after a document"
    )
    reshuffle: bool = option(
        True,
        "cut other windows in each further pass over the text: its documents in another order, from another token on",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stride(self.step, self.length)

    @property
    def length(self) -> int:
        """max_length, or its default."""
        return DEFAULT_MAX_LENGTH if self.max_length is None else self.max_length

    @property
    def step(self) -> int:
        """The stride, or the length if none is given."""
        return self.length if self.stride is None else self.stride


def check_stride(stride: int, max_length: int) -> None:
    """Raise UsageError for a stride that does not advance or leaves out tokens."""
    if not 1 <= stride <= max_length:
        raise UsageError(f"stride must lie between 1 and max_length={max_length}, got {stride}: it would skip tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnOptions(Options):
    """The columns of instruction rows, and what happens to an invalid row."""

    columns: list[str] | None = option(
        None,
        "columns to read the fields of a row from, as FIELD=COLUMN, such as instruction=question,output=answer; the "
        f"fields are {', '.join(ROW_FIELDS)}",
        unset="recognized by their names",
        metavar="FIELD=COLUMN",
    )
    on_bad_row: Literal["stop", "skip"] = option(
        "stop", "what to do at an invalid row: stop with an error, or skip and count it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.column_of

    @property
    def column_of(self) -> dict[str, str]:
        """The column of each field that `columns` names."""
        found: dict[str, str] = {}
        for pair in (pair for words in self.columns or () for pair in _NEXT_FIELD.split(words)):
            field, equals, column = pair.partition("=")
            if not (equals and column):
                raise UsageError(f"columns: {pair!r} must be FIELD=COLUMN, such as instruction=question")
            if field not in ROW_FIELDS:
                raise UsageError(f"columns {pair!r}: unknown field {field!r}; known: {', '.join(ROW_FIELDS)}")
            if field in found or column in found.values():
                raise UsageError(f"columns {pair!r}: the field or the column is named twice; name each once")
            found[field] = column
        return found


# A comma that a field follows; a column's name may hold others.
_NEXT_FIELD = re.compile(r",\s*(?=\w*=)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions(ColumnOptions):
    """The instruction rows: where they come from."""

    rows: list[str] | None = option(
        None,
        "files or globs of rows: .json, .jsonl, .ndjson, .csv, .tsv (also compressed as .gz or .zst) and .parquet",
        unset="none",
        excludes=("dataset_name",),
        card="path",
        names="files",
        metavar="DATA",
    )
    dataset_name: str | None = option(
        None,
        "dataset on the Hub, or local folder that the datasets library can load or has saved (save_to_disk)",
        unset="none",
        card="path_or_id",
    )
    dataset_config: str | None = option(None, "configuration (subset) of dataset_name", unset="the dataset's default")
    dataset_train_split: str | None = option(None, "split of dataset_name", unset="train")
    encoding_of_files: str | None = option(
        None,
        "encoding of JSON and CSV files without a byte-order mark, such as cp1252: a name of Python's codecs",
        unset="utf-8",
    )
    unknown_keys: UnknownKeys = option(
        "report",
        "what to do with keys of rows and turns that are not read: list them in the report, or treat the row as "
        "invalid",
        resume="free",
    )

    def __post_init__(self) -> None:
        if bool(self.rows) == bool(self.dataset_name):
            raise UsageError("give rows: exactly one of rows (files) and dataset_name")
        super().__post_init__()
        check_encoding_of_files(self.encoding_of_files)
        if self.dataset_name is None and (self.dataset_config is not None or self.dataset_train_split is not None):
            raise UsageError("dataset_config and dataset_train_split are for dataset_name; files have neither")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkingOptions(Options):
    """The thinking of answers."""

    thinking: Thinking = option(
        "drop",
        "what to do with the thinking of an answer, its reasoning_content or <think>...</think> at its start: leave "
        "it out and count it, or train it; reasoning_content is written in the form of the chat template",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowReadingOptions(ThinkingOptions):
    """How a row becomes tokens."""

    format: RowFormat = option("auto", "format of the rows; auto decides by the keys of each row")
    train_on: TrainOn = option(
        "answers",
        "tokens that are trained: the answers and the end of text after each, the last answer of each row alone, or "
        "everything; rows of text need everything",
    )
    truncation: Truncation = option(
        "error",
        "what to do with a row longer than max_length: stop with an error, drop it, or cut off the start of its "
        "prompt",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisionOptions(RowReadingOptions):
    """How a row becomes tokens, and which of them are trained."""

    max_length: int = option(256, "tokens per row, and length of a packed sequence", minimum=1)
    packing: bool = option(True, "pack several rows into one sequence, with attention masked between them")
