"""File systems behind URLs, by fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec  # type: ignore[import-untyped, unused-ignore]
from fsspec.registry import known_implementations  # type: ignore[import-untyped, unused-ignore]

from gpt_kit_hf.errors import DataError, GPTKitError, UsageError


def file_system_of(url: str, option: str) -> tuple[Any, str]:
    """Return the file system that a URL names, and the path in it.

    Raises UsageError for a protocol that is unknown or whose package is missing, DataError if a file within a chain
    cannot be read.
    """
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
def file_system_errors(what: str, kind: type[GPTKitError]) -> Iterator[None]:
    """Raise `kind`, with one line that begins with `what`, for an error of a file system; each has its own errors."""
    try:
        yield
    except GPTKitError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise kind(f"{what}: {reason}") from error
