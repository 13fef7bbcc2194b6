"""Options of evaluation: scores of text, rows and benchmark tasks, checks of models and runs, and looks at runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.data import (
    ColumnOptions,
    EosInText,
    OnBadText,
    RowOptions,
    RowReadingOptions,
    SupervisionOptions,
    ThinkingOptions,
    bad_text_option,
    eos_option,
    separator_option,
)
from gpt_kit_hf.options.declare import REQUIRED, Options, option
from gpt_kit_hf.options.files import check_encoding_of_files, check_local
from gpt_kit_hf.options.generation import LoadedModelOptions, device_option, page_open_option, page_port_option

Kind: TypeAlias = Literal["auto", "text", "rows"]
PaddingSide: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ColumnOptions, ThinkingOptions):
    """The data to score, and how."""

    data: list[str] = option(
        [],
        "files, folders or globs to score, or - for the standard input: text (one document per file), .jsonl, .json, "
        ".csv, .tsv or .parquet (one document or instruction row per row), also compressed as .gz or .zst; .tar or "
        ".zip archives of these; or python-stdlib",
        names="files",
        metavar="DATA",
    )
    kind: Kind = option("auto", "what the data is; auto is rows if the rows have the keys of instructions")
    text_column: str = option("text", "column or key that holds the text")
    encoding_of_files: str | None = option(
        None, "encoding of text, CSV and JSON files without a byte-order mark, such as cp1252", unset="utf-8"
    )
    document_separator: str | None = separator_option()
    eos_in_text: EosInText = eos_option()
    on_bad_text: OnBadText = bad_text_option()
    max_length: int | None = option(None, "tokens per window or row", minimum=1, unset="the model's context")
    stride: int | None = option(
        None,
        "tokens between the starts of two windows; fewer give each token more context",
        minimum=1,
        unset="max_length",
    )
    batch_size: int = option(8, "windows per forward pass; does not change the result", minimum=1)
    padding_side: PaddingSide = option("right", "side on which batches are padded; does not change the result")
    max_tokens: int | None = option(
        None, "score about this many tokens, sampled from the whole text", minimum=1, unset="all"
    )
    samples: int = option(0, "number of documents or rows whose beginning the model continues, to show", minimum=0)
    device: str = device_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoding_of_files(self.encoding_of_files)
        if not self.data:
            raise UsageError("data: name at least one file")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoreOptions):
    """A model, and the data or benchmark tasks to score it on."""

    positionals: ClassVar[tuple[str, ...]] = ("model_name_or_path", "data")

    model_name_or_path: str = option(REQUIRED, "folder of a run or model, or Hub id", names="model", metavar="MODEL")
    tasks: list[str] | None = option(
        None,
        "tasks of lm-evaluation-harness, instead of data (needs the extra eval)",
        unset="none",
        excludes=("data",),
    )
    include_path: str | None = option(
        None, "folder with task files of your own", unset="none", names="folder", metavar="FOLDER"
    )
    limit: int | None = option(None, "examples per task", minimum=1, unset="all")
    output_json: str | None = option(None, "also write the result to this file", unset="none", metavar="FILE")

    def __post_init__(self) -> None:
        if bool(self.data) == bool(self.tasks):
            raise UsageError("give either DATA to score or --tasks" + (", not both" if self.data else ""))
        if self.tasks:
            Options.__post_init__(self)
        else:
            super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class CheckOptions(LoadedModelOptions):
    """A model, and the ways in which it is asked."""

    positionals: ClassVar[tuple[str, ...]] = ("model_name_or_path",)

    attention: list[str] | None = option(
        None,
        "attention implementations to check",
        choices=("eager", "sdpa", "flex_attention"),
        unset="all that run on this machine",
    )
    compile_flex: bool | None = option(None, "run flex_attention as a compiled kernel", unset="true, except on a CPU")
    seed: int = option(0, "seed of the random prompts", minimum=0, below=2**63)
    output_json: str | None = option(None, "also write the result to this file", unset="none", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """A run, and the steps to compute again."""

    positionals: ClassVar[tuple[str, ...]] = ("run",)

    run: str = option(REQUIRED, "folder of a run", names="run", metavar="RUN")
    replay: str | None = option(
        None, "compute these steps again and compare them with the run", unset="none", metavar="FROM:TO"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.steps

    @property
    def steps(self) -> tuple[int, int] | None:
        """The first and the last step to replay."""
        if self.replay is None:
            return None
        first, _, last = self.replay.partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            raise UsageError(f"replay must be FROM:TO, two step numbers, got {self.replay!r}")
        return int(first), int(last)


@dataclass(frozen=True, kw_only=True)
class RunsOptions(Options):
    """Where to look for runs, and their order."""

    positionals: ClassVar[tuple[str, ...]] = ("folder",)

    folder: str = option("runs", "folder with runs in it, or in folders in it", names="folder", metavar="FOLDER")
    sort: Literal["name", "date", "loss"] = option(
        "name",
        "order of the runs: by name, from the oldest to the newest, or from the lowest to the highest eval loss",
    )


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """The runs to compare."""

    positionals: ClassVar[tuple[str, ...]] = ("runs",)

    runs: list[str] = option(REQUIRED, "folders of two runs or more", names="run", metavar="RUN")
    all: bool = option(False, "show what is equal, too")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(RowOptions, RowReadingOptions):
    """The rows to inspect, and how they would be read."""

    positionals: ClassVar[tuple[str, ...]] = ("rows",)

    model_name_or_path: str | None = option(
        None,
        "folder of a run or model, or Hub id, whose tokenizer to use",
        unset="a token per byte",
        names="model",
        metavar="MODEL",
    )
    max_length: int | None = option(
        None, "tokens per row", minimum=1, unset="the model's context, 1024 without a model"
    )
    examples: int = option(3, "number of rows to show, with the trained tokens marked", minimum=0)

    def supervision(self, max_length: int) -> SupervisionOptions:
        """Return the options that finetuning would read the rows with."""
        names = (field.name for field in dataclasses.fields(RowReadingOptions))
        return SupervisionOptions(**{name: getattr(self, name) for name in names}, max_length=max_length)

    def row_options(self) -> RowOptions:
        """Return where the rows come from."""
        return RowOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RowOptions)})


@dataclass(frozen=True, kw_only=True)
class WatchOptions(Options):
    """The runs to watch, and their page."""

    positionals: ClassVar[tuple[str, ...]] = ("runs",)

    runs: list[str] = option(
        REQUIRED, "folders of runs, or folders that hold runs; a run may begin there later", metavar="RUN"
    )
    port: int = page_port_option()
    open: bool = page_open_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        for run in self.runs:
            check_local("runs", run)
            if Path(run).is_file():
                raise UsageError(f"runs {run!r} is a file; a run is a folder")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """A run, and what its report shows."""

    positionals: ClassVar[tuple[str, ...]] = ("run", "file")

    run: str = option(REQUIRED, "folder of a run", names="run", metavar="RUN")
    file: str | None = option(
        None,
        "file to write; a report that was written before is replaced, any other file is not",
        unset="RUN/report.html",
        metavar="FILE.html",
    )
    text_files: list[str] | None = option(
        None,
        "text to show by token, as files, folders or globs",
        unset="the run's own held-out text, if its files are where they were",
        names="files",
        metavar="FILE",
    )
    tokens: int = option(
        1024, "about this many tokens of the text are shown with their probabilities; 0 shows none", minimum=0
    )
    device: str = device_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local("file", self.file or "")
