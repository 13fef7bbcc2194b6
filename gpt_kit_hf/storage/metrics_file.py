"""Reading metrics.jsonl while a run writes it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import parse_object

_MAX_JSON_BYTES = 64 << 20
# A pipe or a symbolic link in the place of a file is an error: nothing outside of the folder is read.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class MetricsReader:
    """Returns the lines of a metrics.jsonl, and on each later call those that were added since.

    A resumed run replaces the file by one without the steps that it repeats; the next call then begins anew, and
    `restarted` is true. A last line without its end is left for a later call.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.restarted = False
        self._identity, self._offset = (0, 0), 0
        self._number, self._last = 0, b""  # of the last line that was read

    def read(self) -> list[dict[str, Any]]:
        """Return the new lines; [] without a file. Raises CheckpointError, with the line, for what is not JSON."""
        self.restarted = False
        file = open_inside(self._path)
        if file is None:
            self.restarted = self._offset > 0
            self._forget()
            return []
        with os.fdopen(file, "rb") as lines:
            found = os.fstat(file)
            identity = (found.st_dev, found.st_ino)
            if self._offset and not (identity == self._identity and self._continues(file)):
                self.restarted = True
                self._forget()
            self._identity = identity
            lines.seek(self._offset)
            data = lines.read()
        *whole, _ = data.split(b"\n")
        numbered = enumerate(whole, self._number + 1)
        records = [parse_object(line, f"{self._path}:{number}") for number, line in numbered]
        if whole:
            self._offset += sum(map(len, whole)) + len(whole)
            self._number, self._last = self._number + len(whole), whole[-1]
        return records

    def _continues(self, file: int) -> bool:
        """Return whether the last line that was read is still in its place: an inode may be used again."""
        length = len(self._last) + 1
        os.lseek(file, self._offset - length, os.SEEK_SET)
        return os.read(file, length) == self._last + b"\n"

    def _forget(self) -> None:
        self._offset, self._number, self._last = 0, 0, b""


def open_inside(path: Path) -> int | None:
    """Open a regular file for reading and return its descriptor; None if there is no such file.

    Raises CheckpointError for a symbolic link and for what is no regular file.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link and is not read")
    try:
        file = os.open(path, _FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise CheckpointError(f"{path} is not a regular file")
    return file


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is no such file; raise CheckpointError as `open_inside` does."""
    file = open_inside(path)
    if file is None:
        return {}
    with os.fdopen(file, "rb") as stream:
        data = stream.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than the {_MAX_JSON_BYTES:,} bytes that such a file may have")
    return parse_object(data, str(path))
