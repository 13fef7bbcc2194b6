"""Files behind URLs, by the file systems of fsspec; copied once into the cache of `datasets`."""

from __future__ import annotations

import posixpath
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from gpt_kit_hf.data.text.files.file_cache import PlainFile, downloaded
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.storage.file_systems import file_system_errors, file_system_of


def remote_files(pattern: str, option: str) -> list[PlainFile]:
    """Return local copies of the files that a URL names: a file, a glob or a folder, sorted; empty ones are left out.

    A copy is made again when what the file system tells of the file changes: an ETag, a checksum, a time, the size.
    Raises UsageError for a protocol that is unknown or whose package is missing, DataError for what cannot be read.
    """
    system, path = file_system_of(pattern, option)
    with _reported(pattern, option):
        found = _matching(system, path)
        filled = [(name, info) for name in found if (info := system.info(name))["size"] != 0]
    if not found:
        raise DataError(f"{option} {pattern!r}: no such file")
    if not filled:
        raise DataError(f"{option} {pattern!r}: empty, there is no text to train on")
    return [_copied(system, name, info, option) for name, info in filled]


def _matching(system: Any, path: str) -> list[str]:
    if system.isfile(path):
        return [path]
    found = system.find(path) if system.isdir(path) else filter(system.isfile, system.glob(path))
    named = set(path.split("/"))
    # Hidden files are left out unless they are named, as on the disk.
    return [name for name in sorted(found) if not any(p.startswith(".") and p not in named for p in name.split("/"))]


def _copied(system: Any, name: str, info: dict[str, Any], option: str) -> PlainFile:
    url = str(system.unstrip_protocol(name))
    identity = repr((url, system.ukey(name), sorted(info.items(), key=str)))
    with _reported(url, option):
        copy = downloaded(identity, posixpath.basename(name), partial(_download, system, name, info))
    return PlainFile(copy, url)


def _download(system: Any, name: str, info: dict[str, Any], target: Path) -> None:
    system.get_file(name, str(target))
    size = target.stat().st_size
    if info["size"] is not None and size != info["size"]:
        raise OSError(f"{size:,} of {info['size']:,} bytes arrived")


def _reported(url: str, option: str) -> AbstractContextManager[None]:
    return file_system_errors(f"{option} {url!r}: cannot be read", DataError)
