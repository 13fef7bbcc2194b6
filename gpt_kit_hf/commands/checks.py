"""Checks of a command's options against the disk that need no large library: they come before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from gpt_kit_hf.commands.engines import check_engine
from gpt_kit_hf.data.text.files.file_types import file_refusal
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.options.declare import Option, sections_of
from gpt_kit_hf.options.evaluation import VerifyOptions
from gpt_kit_hf.options.files import PYTHON_STDLIB, check_local, find_files, is_url, may_be_hub_id
from gpt_kit_hf.options.generation import EngineOptions
from gpt_kit_hf.options.run import PlanOptions, RunOptions
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.storage.atomic_files import check_can_be_made, load_json
from gpt_kit_hf.storage.gguf_header import is_gguf
from gpt_kit_hf.storage.run_folder import check_run_folder, holds_run, recorded_steps

# Options that name files of text.
_TEXT = ("text_files", "mixture", "eval_files", "data")
_FILES_CHECKED = 100


def check_options(options: object) -> None:
    """Raise UsageError or DataError for files, folders, models and runs that the options name and cannot be used."""
    training = getattr(options, "training", None)
    # Another process of this run may have just made the folder.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if isinstance(training, TrainingOptions) and alone and not isinstance(options, PlanOptions):
        check_run_folder(Path(training.output_dir), resume=training.resume, overwrite=training.overwrite)
    # A checkpoint replaces the model that a text is trained further on, which may be gone.
    resumes = (
        isinstance(options, RunOptions) and options.training.resume and holds_run(Path(options.training.output_dir))
    )
    if isinstance(options, RunOptions) and not resumes:
        _check_length(options)
    for name, section in sections_of(type(options)).items():
        holder = getattr(options, name) if name else options
        for each in section.options.values():
            if resumes and each.names == "model":
                continue
            value = getattr(holder, each.name)
            for named in value if isinstance(value, list) else [value]:
                if each.names and named is not None:
                    # In another encoding, text may hold NUL bytes.
                    text = each.name in _TEXT and getattr(holder, "encoding_of_files", None) is None
                    # Beside token files, these may be some, too.
                    ids = isinstance(holder, TextOptions) and holder.token_files and each.name == "eval_files"
                    _check(each, named, text and not ids)
    if isinstance(options, EngineOptions):
        check_engine(options)
    if isinstance(options, VerifyOptions) and options.steps is not None:
        recorded_steps(Path(options.run), *options.steps)


def _check_length(options: RunOptions) -> None:
    """Refuse windows that are longer than the context of the model to train further, if that is a folder."""
    named, length = options.model.model_name_or_path, options.windows.max_length
    config = Path(named or "") / "config.json"
    if named is None or length is None or not config.is_file():
        return
    found = load_json(config)
    positions = next((found[name] for name in ("max_position_embeddings", "n_positions") if name in found), None)
    if isinstance(positions, int) and length > positions:
        raise UsageError(
            f"max_length={length} is above the context of {named!r}, max_position_embeddings={positions}: lower it"
        )


def _check(option: Option, named: str, text: bool) -> None:
    place = Path(named)
    if option.names in ("model", "model_or_gguf", "model_or_weights"):
        files = {"model_or_gguf": is_gguf(place), "model_or_weights": place.is_file()}
        if not files.get(option.names):
            _check_model(named)
    elif option.names in ("folder", "run"):
        if place.is_file():
            what = "the folder of a run" if option.names == "run" else "a folder"
            raise UsageError(f"{option.name} {named!r} is a file: give {what}")
        if not place.is_dir():
            raise UsageError(f"{option.name} {named!r}: no such folder")
        if option.names == "run" and not holds_run(place):
            raise UsageError(f"{option.name} {named!r} holds no run")
    elif option.names == "new_folder":
        check_local(option.name, named)
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            raise UsageError(f"{option.name} {named!r} exists and is not an empty folder; nothing is overwritten")
        check_can_be_made(place)
    else:
        pattern = named.partition(":")[2] if option.names == "weighted_files" else named
        if pattern == PYTHON_STDLIB or pattern.startswith("dataset:"):
            return
        if is_url(pattern) and option.name in ("text_files", "mixture", "eval_files"):
            return  # it is looked for when it is read
        found = find_files([pattern], option.name)
        # Reading the text checks every file, and more of it.
        for file in found[:_FILES_CHECKED] if text else ():
            if file.is_file() and (reason := file_refusal(file)) is not None:
                raise DataError(f"{file}: {reason}")


def _check_model(named: str) -> None:
    """Refuse a path that is no model folder or does not exist; a Hub id is not looked up."""
    place = Path(named)
    if is_gguf(place):
        raise UsageError(f"{named!r} is a GGUF file, which only generate, chat and serve run: give a folder or Hub id")
    if place.is_file():
        raise UsageError(f"{named!r} is a file; a model is a folder or a Hub id")
    if not place.exists() and (not may_be_hub_id(named) or place.suffix == ".gguf"):
        raise UsageError(f"{named!r}: no such {'file' if place.suffix == '.gguf' else 'folder'}")
    if place.is_dir() and not any((place / name).exists() for name in ("config.json", "checkpoints")):
        raise UsageError(f"{named!r} holds no model: neither a config.json nor a checkpoint")
