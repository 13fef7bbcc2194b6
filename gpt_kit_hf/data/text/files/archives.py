"""Members of tar and ZIP archives, in the order of the archive."""

from __future__ import annotations

import bz2
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from gpt_kit_hf.data.text.files.file_types import COMPRESSIONS, office_document
from gpt_kit_hf.errors import DataError


class Member(NamedTuple):
    """A file in an archive, to be read before the next one is asked for; `stream` is None for what is no file."""

    name: str
    stream: IO[bytes] | None


def open_file(file: Path, compression: str) -> Any:
    """Open a file for reading, decompressed; `compression` is "", ".gz", ".zst", ".bz2" or ".xz"."""
    if compression in (".bz2", ".xz"):
        return bz2.open(file) if compression == ".bz2" else lzma.open(file)
    return pa.input_stream(str(file), compression=COMPRESSIONS.get(compression))


def tar_members(file: Path, compression: str) -> Iterator[Member]:
    """Yield the members of a tar archive. Raises READ_ERRORS if it is damaged or does not have its end."""
    with closing(open_file(file, compression)) as stream:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictHeader) as archive:
            for header in archive:
                if not header.isdir():
                    yield Member(header.name, archive.extractfile(header) if header.isreg() else None)
        while stream.read(1 << 20):  # its checksum comes last
            pass


def zip_members(file: Path, label: str) -> Iterator[Member]:
    """Yield the members of a ZIP archive. Raises READ_ERRORS, and DataError for an encrypted or office document."""
    with zipfile.ZipFile(file) as archive:
        if (what := office_document(set(archive.namelist()))) is not None:
            raise DataError(f"{label}: {what}")
        for header in archive.infolist():
            if header.is_dir():
                continue
            if header.flag_bits & 1:
                raise DataError(f"{label}: {header.filename!r} is encrypted: unpack it and name the files")
            with archive.open(header) as stream:
                yield Member(header.filename, stream)


def is_hidden(name: str) -> bool:
    """Return whether a path is hidden, or what macOS adds to archives: __MACOSX/, ._name."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


class _StrictHeader(tarfile.TarInfo):
    """A header that ends an archive only by the end mark: tarfile takes damage after the first member as the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error) or "a header is damaged") from None
