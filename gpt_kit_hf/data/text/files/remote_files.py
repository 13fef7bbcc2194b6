"""Files behind URLs, by the file systems of fsspec; copied once into the cache of `datasets`."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped, unused-ignore]
from fsspec.registry import known_implementations  # type: ignore[import-untyped, unused-ignore]

from gpt_kit_hf.data.text.files.file_cache import PlainFile, downloaded
from gpt_kit_hf.errors import DataError, GPTKitError, UsageError


def remote_files(pattern: str, option: str) -> list[PlainFile]:
    """Return local copies of the files that a URL names: a file, a glob or a folder, sorted; empty ones are left out.

    A copy is made again when what the file system tells of the file changes: an ETag, a checksum, a time, the size.
    Raises UsageError for a protocol that is unknown or whose package is missing, DataError for what cannot be read.
    """
    system, path = _file_system(pattern, option)
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


def _file_system(url: str, option: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        needed = str(error) if package == "fsspec" else f"pip install {package}"
        raise UsageError(f"{option} {url!r}: {protocol}:// needs a package that is not installed: {needed}") from None
    except OSError as error:  # of a chain such as zip://a.txt::b.zip
        raise DataError(f"{option} {url!r}: cannot be read: {error}") from None
    except ValueError as error:
        raise UsageError(f"{option} {url!r}: {str(error).splitlines()[0]}") from None
    return system, path


@contextmanager
def _reported(url: str, option: str) -> Iterator[None]:
    """Raise DataError for what a file system raises; each has errors of its own."""
    try:
        yield
    except GPTKitError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{option} {url!r}: cannot be read: {reason}") from error
