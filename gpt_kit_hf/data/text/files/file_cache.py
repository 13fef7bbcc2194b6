"""Copies in the cache of `datasets`: of files in another form and of pipes, named by their content, and of URLs."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import datasets
import xxhash

from gpt_kit_hf.data.text.files.archives import open_file
from gpt_kit_hf.data.text.files.file_types import COMPRESSED, HEAD_BYTES, READ_ERRORS, container_of
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.files import STANDARD_INPUT

_LAYOUT = "files-1"
_INDEX = "index.json"
_BLOCK = 1 << 20
_SECONDS_A_DAY = 24 * 60 * 60
_JSON_ROW = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')


class PlainFile(NamedTuple):
    """A file in a form that shards read, and its name in messages: of a converted file, that of the original."""

    file: Path
    name: str


@dataclass(kw_only=True)
class Index:
    """What a conversion made: (file, name of the member) and what was left out, by reason."""

    files: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""


def head_of(place: PlainFile, compression: str) -> bytes:
    """Return the first bytes of a file, decompressed. Raises DataError."""
    try:
        if not compression:
            with place.file.open("rb") as raw:
                return raw.read(HEAD_BYTES)
        with open_file(place.file, compression) as stream:
            return bytes(stream.read(HEAD_BYTES))
    except READ_ERRORS as error:
        raise unreadable(place.name, error, "be decompressed" if compression else "be read") from None


def unreadable(label: str, error: BaseException, what: str) -> DataError:
    """Return the error for a file that cannot `what`, such as "be read", because of another error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{label}: no space left for a converted copy: set HF_DATASETS_CACHE to a larger disk")
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    return DataError(f"{label}: cannot {what}: {reason}")


# --- where converted files are


def converted(place: PlainFile, how: tuple[object, ...], write: Callable[[Path], Index]) -> tuple[Path, Index]:
    """Return the folder of the converted files and its index; `write` makes them unless they are there."""
    folder = _cache() / hashlib.sha256(repr((_LAYOUT, _digest(place), how)).encode()).hexdigest()[:32]
    kept = _read_index(folder)
    if kept is not None:
        return folder, kept
    with _stage() as stage:
        index = write(stage)
        sizes = {name: (stage / name).stat().st_size for name, _ in index.files}
        (stage / _INDEX).write_text(json.dumps({"index": asdict(index), "sizes": sizes}))
        if _read_index(folder) is None:  # another process may have made it meanwhile
            _publish(stage, folder)
    return folder, index


def downloaded(identity: str, name: str, fetch: Callable[[Path], None]) -> Path:
    """Return the copy, under its `name`, of what `identity` stands for; `fetch` writes it unless it is there."""
    file = _cache() / f"remote-{hashlib.sha256(identity.encode()).hexdigest()[:32]}" / name
    if not file.is_file():
        with _stage() as stage:
            fetch(stage / name)
            if not file.is_file():
                _publish(stage, file.parent)
    return file


def _read_index(folder: Path) -> Index | None:
    """Return the index of a folder of converted files; None if it is missing or a file is not as it was written."""
    try:
        kept = json.loads((folder / _INDEX).read_bytes())
        if any((folder / name).stat().st_size != size for name, size in kept["sizes"].items()):
            return None
        return Index(**{**kept["index"], "files": [(name, member) for name, member in kept["index"]["files"]]})
    except (OSError, ValueError):
        return None


def _cache() -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "gpt-kit-files"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _stage() -> Iterator[Path]:
    """Make a folder to write into, removed afterwards unless it was published; those of killed processes, too."""
    for left in _cache().glob(".stage-*"):
        if time.time() - left.stat().st_mtime > _SECONDS_A_DAY:
            shutil.rmtree(left, ignore_errors=True)
    stage = _cache() / f".stage-{secrets.token_hex(8)}"
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, folder: Path) -> None:
    """Give a written folder its name; one that has it is damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        stage.rename(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: cannot be written; set HF_DATASETS_CACHE to another folder")


def _digest(place: PlainFile) -> str:
    try:
        found = place.file.stat()
        return _digest_of(place.file, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except OSError as error:
        raise unreadable(place.name, error, "be read") from None


@functools.lru_cache(maxsize=1 << 16)
def _digest_of(file: Path, *stamp: int) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# --- pipes


_SPOOLED: dict[tuple[int, int], PlainFile] = {}  # pipes that this process has read, by device and inode


def spooled(file: Path) -> PlainFile:
    """Return a copy of what a pipe gives, which can be read once only; its name is that of its form."""
    label = "standard input" if file == STANDARD_INPUT else str(file)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{label}: a pipe can be read by one process only: save its text to a file, and name that")
    found = file.stat()
    key = (found.st_dev, found.st_ino)
    if key not in _SPOOLED:
        with _stage() as stage:
            with file.open("rb") as source, (stage / "all").open("wb") as target:
                shutil.copyfileobj(source, target, _BLOCK)
            name = f"text{_suffix_by_content(PlainFile(stage / 'all', label))}"
            (stage / "all").rename(stage / name)
            folder = _cache() / f"pipe-{_digest(PlainFile(stage / name, label))}"
            if not (folder / name).is_file():
                _publish(stage, folder)
        _SPOOLED[key] = PlainFile(folder / name, label)
    copy = _SPOOLED[key]
    if not copy.file.stat().st_size:
        raise DataError(f"{label}: the pipe gave no text; to resume a run, give it the same text again")
    return copy


def _suffix_by_content(place: PlainFile) -> str:
    """Return the suffix that the name of a file with this content should have."""
    head = head_of(place, "")
    compression = COMPRESSED.get(container_of(head) or "", "")
    if compression in (".gz", ".zst"):
        head = head_of(place, compression)
    if (container := container_of(head)) in ("tar", "zip"):
        return f".{container}{compression}"
    if head.startswith(b"PAR1"):
        return ".parquet"
    return f"{'.jsonl' if _JSON_ROW.match(head) else '.txt'}{compression}"
