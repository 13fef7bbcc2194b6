"""Files that options name: globs, and checks that need no large library."""

from __future__ import annotations

import glob
import os
import sysconfig
from pathlib import Path

from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.declare import Option, sections_of
from gpt_kit_hf.options.training import TrainingOptions

PYTHON_STDLIB = "python-stdlib"
# Tests repeat themselves and hold files that are not UTF-8 on purpose.
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}


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


def check_local_model(place: str) -> None:
    """Raise UsageError for a path that is no model folder or does not exist; a Hub id is not looked up."""
    # A Hub id has a name and at most an owner before it.
    if not Path(place).exists() and (place.count("/") > 1 or place.startswith((".", "/", "~"))):
        raise UsageError(f"{place!r}: no such folder")
    if Path(place).is_dir() and not any((Path(place) / name).exists() for name in ("config.json", "checkpoints")):
        raise UsageError(f"{place!r} holds no model: neither a config.json nor a checkpoint")


def check_named_files(options: object) -> None:
    """Raise UsageError for a file or folder that a command's options name and that does not exist or is taken."""
    if isinstance(training := getattr(options, "training", None), TrainingOptions):
        _check_output_folder(training)
    for name, section in sections_of(type(options)).items():
        holder = getattr(options, name) if name else options
        for each in section.options.values():
            if each.names and getattr(holder, each.name) is not None:
                _check(each, getattr(holder, each.name))


def _check_output_folder(training: TrainingOptions) -> None:
    """Refuse what `check_run_folder` of storage certainly refuses, too, but only once torch is imported."""
    run = Path(training.output_dir)
    if run.exists() and not run.is_dir():
        raise UsageError(f"output_dir {training.output_dir!r} cannot be made: {run.absolute()} is a file")
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # another process of this run may have just made the folder
    if alone and (run / "options.json").is_file() and not (training.resume or training.overwrite):
        raise UsageError(
            f"output_dir {training.output_dir!r} already holds a run: use resume, overwrite or another folder"
        )


def _check(option: Option, value: str | list[str]) -> None:
    for each in value if isinstance(value, list) else [value]:
        if option.names == "model":
            check_local_model(each)
        elif option.names == "folder":
            if not Path(each).is_dir():
                raise UsageError(f"{option.name} {each!r}: no such folder")
        else:
            pattern = each.partition(":")[2] if option.names == "weighted_files" else each
            if pattern != PYTHON_STDLIB and not pattern.startswith("dataset:"):
                find_files([pattern], option.name)
