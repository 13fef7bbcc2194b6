"""Options of publishing: push, pull, the model card, and the export for other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.declare import REQUIRED, Options, option

CardBase: TypeAlias = Literal["hub", "run"]
ExportFormat: TypeAlias = Literal["transformers", "gguf"]
Quantization: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """How a model is published."""

    private: bool | None = option(
        None, "make a new repository private, or public if false", unset="the account's default"
    )
    revision: str | None = option(
        None, "branch to commit to; it is created if necessary", unset="main", excludes=("create_pr",)
    )
    native: bool = option(
        False,
        "publish it as a class of transformers, GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM, which other "
        "programs know and which needs no code in the repository; the same commit removes that of an earlier push",
    )
    tensorboard: bool = option(
        True,
        "publish the curves that TensorBoard has of the run, up to 50 MB, which the Hub shows as a tab; its files "
        "with the options of the run are not published",
    )
    create_pr: bool = option(False, "open a pull request instead of committing to a branch")
    commit_message: str = option("Publish the model", "message of the commit")
    keep_card: CardBase | None = option(
        None,
        "whose text to keep if the model card was edited both on the Hub and in the run",
        unset="stop with an error",
    )
    dry_run: bool = option(False, "list the files that would be sent, and send nothing")

    def __post_init__(self) -> None:
        if self.revision is not None and self.create_pr:
            raise UsageError("revision and create_pr: a pull request has a branch of its own; give one of them")
        super().__post_init__()
        if not self.commit_message.strip():
            raise UsageError("commit_message must not be empty")


@dataclass(frozen=True, kw_only=True)
class PushCommandOptions(PushOptions):
    """A model to publish, and where."""

    positionals: ClassVar[tuple[str, ...]] = ("run", "repo")

    run: str = option(REQUIRED, "folder of a run or model; left out with --verify_only", metavar="RUN")
    repo: str | None = option(None, "repository on the Hub, OWNER/NAME", unset="none", metavar="REPO")
    verify_only: bool = option(False, "only verify that REPO still holds what was published")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verify_only:
            return
        if self.repo is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise UsageError(f"give REPO, OWNER/NAME on the Hub{f', got {self.repo!r}' if self.repo else ''}")
        if Path(self.run).is_file():
            raise UsageError(f"run {self.run!r} is a file: give the folder of a run or model")
        if not Path(self.run).is_dir():
            raise UsageError(f"run {self.run!r}: no such folder")


@dataclass(frozen=True, kw_only=True)
class PullOptions(Options):
    """A repository to download, and where to."""

    positionals: ClassVar[tuple[str, ...]] = ("repo", "folder")

    repo: str = option(REQUIRED, "repository on the Hub, OWNER/NAME", metavar="REPO")
    folder: str = option(
        REQUIRED, "folder to write; it must be empty or not exist yet", names="new_folder", metavar="FOLDER"
    )
    revision: str | None = option(None, "branch, tag or commit", unset="main")


@dataclass(frozen=True, kw_only=True)
class CardOptions(Options):
    """A run whose model card to write."""

    positionals: ClassVar[tuple[str, ...]] = ("run",)

    run: str = option(REQUIRED, "folder of a run or model", names="folder", metavar="RUN")
    repo: str | None = option(
        None, "repository on the Hub, used in the card's code examples", unset="the name of the run"
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """A model to write for other programs."""

    positionals: ClassVar[tuple[str, ...]] = ("source", "destination")

    source: str = option(REQUIRED, "folder of a run or model, or Hub id", names="model", metavar="SOURCE")
    destination: str = option(
        REQUIRED,
        "folder to write, which must be empty or not exist yet; for gguf a file NAME.gguf, which must not exist",
        names="new_folder",
        metavar="DESTINATION",
    )
    format: ExportFormat = option(
        REQUIRED,
        "transformers: a folder that transformers and others load by a class of transformers itself; gguf: a file for "
        "llama.cpp, with a Modelfile for Ollama beside it (needs the extra gguf)",
    )
    quantization: Quantization | None = option(
        None, "type of the matrices in a GGUF file; q8_0 has 8 bits and a scale per 32 weights", unset="f16"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "transformers":
            if self.quantization is not None:
                raise UsageError(f"quantization={self.quantization} is for format=gguf; leave it out")
        elif Path(self.destination).suffix != ".gguf":
            raise UsageError(f"destination must end in .gguf with format=gguf, got {self.destination!r}")
        elif Path(self.destination).exists():
            raise UsageError(f"destination {self.destination!r} exists; nothing is overwritten")
