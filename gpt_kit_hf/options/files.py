"""Files that options name: lists, globs, Python's standard library, their encodings, and files of token ids."""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from encodings.aliases import aliases
from pathlib import Path

from gpt_kit_hf.errors import DataError, UsageError, unknown_name

PYTHON_STDLIB = "python-stdlib"
STANDARD_INPUT = Path("/dev/stdin")
# Codecs of Python that encode no text in files.
_NO_TEXT = {"hex", "base64", "bz2", "zlib", "rot13", "uu", "quopri", "undefined"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# Tests repeat themselves and hold files that are not UTF-8 on purpose.
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
# Options of text that do not apply to ids; how text is read applies to evaluation files beside token files.
_OF_TEXT = ("text_column", "encoding_of_files", "document_separator", "eos_in_text", "on_bad_text", "num_proc")
_OF_STREAMS = ("streaming", "shuffle_windows", "stream_shards")


def is_url(name: str) -> bool:
    """Return whether a name is a URL, such as s3://bucket/*.jsonl."""
    return _URL.match(name) is not None


def check_local(option: str, place: str, remedy: str = "copy it from there") -> None:
    """Raise UsageError for a URL where a folder of this machine's file systems is needed."""
    if is_url(place):
        raise UsageError(f"{option} {place!r} is a URL: name a folder of a file system, and {remedy}")


def check_url(option: str, place: str) -> None:
    """Raise UsageError for a name that is no URL, and for a URL with a password, which files of the run would keep."""
    if not is_url(place):
        raise UsageError(f"{option} {place!r} is not a URL, such as s3://bucket/run or file:///shared/run")
    if "@" in (address := place.partition("://")[2].partition("/")[0]) and ":" in address.rpartition("@")[0]:
        shown = f"{place.partition('://')[0]}://...@{address.rpartition('@')[2]}"
        raise UsageError(f"{option} {shown!r} has a password: give it to the file system by its own settings instead")


def find_files(patterns: list[str], option: str = "text_files") -> list[Path]:
    """Return the files that the patterns name, sorted within a pattern.

    A folder names the files in it, at any depth, that are not hidden; `python-stdlib` Python's own source, and "-"
    the standard input. Raises DataError for a pattern without a file, for a file that cannot be read and for a
    pattern without text.
    """
    found: list[Path] = []
    for pattern in patterns:
        try:
            files = _stdlib_files() if pattern == PYTHON_STDLIB else _matching_files(pattern, option)
            filled = [file for file in files if file.stat().st_size or _is_pipe(file)]
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


def folder_notes(patterns: list[str]) -> list[str]:
    """Return a line on each folder of which files were left out."""
    notes = []
    for pattern in patterns:
        folder = Path(pattern).expanduser()
        if pattern and folder.is_dir():
            files, hidden = _files_in(folder)
            empty = sum(not file.stat().st_size for file in files)
            left = [f"{number} {kind}" for number, kind in ((hidden, "hidden"), (empty, "empty")) if number]
            read = len(files) - empty
            counted = f"{read:,} file{'s' * (read != 1)} read"
            notes.append(f"{pattern}: {counted}, {' and '.join(left) or 'none'} left out")
    return notes


def _matching_files(pattern: str, option: str) -> list[Path]:
    if not pattern:
        raise DataError(f"{option}: a name is empty")
    if is_url(pattern):
        raise DataError(f"{option} {pattern!r}: a URL is read by text_files, mixture and eval_files of text only")
    if pattern == "-" and sys.stdin is not None and sys.stdin.isatty():
        raise DataError(f"{option} '-': the standard input is a terminal: pipe text into the command")
    if pattern == "-" and not (STANDARD_INPUT.is_file() or _is_pipe(STANDARD_INPUT)):
        raise DataError(f"{option} '-': the standard input is neither a pipe nor a file: pipe text into the command")
    name = str(STANDARD_INPUT) if pattern == "-" else os.path.expanduser(pattern)  # noqa: PTH111 (keeps ./ and globs)
    if Path(name).is_dir():
        return _files_in(Path(name))[0]
    # A name that exists is meant as it stands, brackets and stars included.
    names = [name] if Path(name).exists() else glob.glob(name, recursive=True)  # noqa: PTH207 (absolute patterns, too)
    return [Path(name) for name in sorted(names) if Path(name).is_file() or _is_pipe(Path(name))]


def _files_in(folder: Path) -> tuple[list[Path], int]:
    """Return the files of a folder at any depth, sorted, and the number of hidden ones, which are left out."""
    found, hidden = [], 0
    for place, folders, names in os.walk(folder):
        inside = any(part.startswith(".") for part in Path(place).relative_to(folder).parts)
        folders.sort()
        for name in sorted(names):
            if inside or name.startswith("."):
                hidden += 1
            elif (file := Path(place) / name).is_file():
                found.append(file)
    return sorted(found), hidden


def _is_pipe(file: Path) -> bool:
    mode = file.stat().st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        file
        for file in sorted(root.rglob("*.py"))
        if not _STDLIB_WITHOUT.intersection(file.relative_to(root).parts[:-1])
    ]


def may_be_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id, a name with at most an owner before it, and not of a path."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def check_encoding_of_files(name: str | None) -> None:
    """Raise UsageError for a name that is none of Python's codecs of text."""
    if name is None:
        return
    try:
        "".encode(name)  # a codec that is none of text is a LookupError here
    except (LookupError, UnicodeError, ValueError):
        known = {alias.replace("_", "-") for alias in (*aliases, *aliases.values())}
        raise UsageError(unknown_name("encoding_of_files", name, sorted(known - _NO_TEXT))) from None


def is_token_file(name: str) -> bool:
    """Return whether a name is that of a token file."""
    return name.endswith((".bin", ".ds"))


def check_options_of_ids(given: Mapping[str, object], eval_files: Sequence[str] | None) -> None:
    """Raise UsageError for an option that does not apply to token files; `given` are those that were given."""
    has_text = eval_files is not None and not any(map(is_token_file, eval_files))
    refused = {
        **dict.fromkeys(() if has_text else _OF_TEXT, "is for text, and token_files hold ids"),
        **dict.fromkeys(_OF_STREAMS, "is for a text that is streamed, and token_files are read where they lie"),
        "dataset_train_split": "is for dataset_name, and token_files have no splits",
    }
    for name, value in given.items():
        if name in refused and value is not None:
            raise UsageError(f"{name}={value!r} {refused[name]}: leave it out")
