"""JSON, JSONL and tensor files that a kill or a full disk cannot leave half-written, and that are read strictly.

A file that cannot be written or read, or is not valid, raises CheckpointError.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from gpt_kit_hf.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

# Far more than the largest preset needs, and still quick to read.
_MAX_JSON_BYTES = 64 << 20
_MAX_HEADER_BYTES = 16 << 20

_log = logging.getLogger(__name__)
Report = Callable[[str], None]


def sync_path(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk (fsync)."""
    flags = os.O_RDONLY
    if not hasattr(os, "O_DIRECTORY"):
        # Windows opens no folder, and flushes a file only if it is open for writing.
        if path.is_dir():
            return
        flags = os.O_RDWR
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes | str) -> None:
    """Write a file atomically: it has its old content or the new, never a part of one. An error keeps the old."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            write_synced(temporary, data.encode() if isinstance(data, str) else data)
            temporary.replace(path)
            sync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} was not written: {error}") from error


def save_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object that `load_json` returns unchanged, floats included.

    Raises CheckpointError for what JSON changes (a tuple, a key that is not a string) or cannot hold (NaN), and for
    more than 64 MiB.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not representable as JSON: {error}") from error
    if parse_object(text.encode(), str(path)) != value:
        raise CheckpointError(f"{path}: contains a tuple or a key that is not a string, which JSON would change")
    if len(text) >= _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {len(text):,} bytes, more than the {_MAX_JSON_BYTES:,} allowed")
    replace_file(path, text + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most 64 MiB; a repeated key or infinite number is an error."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(data) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than the {_MAX_JSON_BYTES:,} bytes that such a file may have")
    return parse_object(data, str(path))


def append_jsonl(path: Path, record: Mapping[str, object]) -> None:
    """Append a JSON object as one line, in one write; a write that fails midway is undone.

    A kill after the call does not lose the line; a power cut may, until `sync_path`. A run that resumes must call
    `cut_jsonl` first, as the new line would be appended to an incomplete one.
    """
    try:
        data = json.dumps(record, allow_nan=False).encode() + b"\n"
        with path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            written = 0
            try:
                written = file.write(data)
            finally:
                if written != len(data):
                    file.truncate(start)
        if written != len(data):
            raise OSError("it was written only in part")
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"no line was added to {path}: {error}") from error


def read_jsonl(path: Path, *, report: Report = _log.warning) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; an incomplete last line, as a kill leaves it, is dropped and reported.

    The error for any other invalid line has its number.
    """
    return [record for _, record in _jsonl_lines(path, report)]


def cut_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool], *, report: Report = _log.warning) -> int:
    """Drop the lines for which `keep` is false, and an incomplete last one; return how many whole lines were dropped.

    The file is rewritten atomically, the kept lines byte for byte.
    """
    lines = _jsonl_lines(path, report)
    kept = [line for line, record in lines if keep(record)]
    replace_file(path, b"".join(line + b"\n" for line in kept))
    return len(lines) - len(kept)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of any device and strides as safetensors, also tensors that share storage.

    Raises CheckpointError for sparse, meta and sharded tensors.
    """
    import torch  # here, so that a folder can be looked at without it
    from safetensors.torch import save_file

    ready: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_meta:
            raise CheckpointError(f"{path}: {name} is not a plain dense tensor and cannot be stored")
        value = tensor.detach().to("cpu").contiguous()
        # The format refuses two tensors with one storage, so the second is copied.
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        ready[name] = value
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} was not written: {error}") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file on the CPU; a header over 16 MiB is refused before it is read."""
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
        if header > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: its header claims {header:,} bytes, the file has {size:,}")
        # Not memory-mapped: on NFS the tensors would be lost when rotation deletes the file.
        return load_file(path, backend="pread")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def write_synced(path: Path, data: bytes) -> None:
    """Create a file and flush it to the disk; raise FileExistsError if it exists."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def parse_object(data: bytes, source: str) -> dict[str, Any]:
    """Return the JSON object in `data`, as strictly as `load_json`; `source` names it in error messages."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is not a JSON number")

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return keys

    try:
        value = json.loads(data.decode(), parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: must be a JSON object, is a {type(value).__name__}")
    return value


def check_can_be_made(path: str | Path) -> None:
    """Raise UsageError if a file stands where a folder above `path` would be."""
    existing = next(each for each in Path(path).absolute().parents if each.exists())
    if not existing.is_dir():
        raise UsageError(f"{str(path)!r} cannot be written: {str(existing)!r} is a file, not a folder")


def free_name(path: Path) -> Path:
    """Return the first of path-1, path-2, ... that does not exist."""
    candidates = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


def _jsonl_lines(path: Path, report: Report) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        *whole, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    lines = [(line, parse_object(line, f"{path}:{number}")) for number, line in enumerate(whole, 1)]
    if last:
        try:
            lines.append((last, parse_object(last, f"{path}:{len(whole) + 1}")))
        except CheckpointError as error:
            report(f"dropped an incomplete last line: {error}")
    return lines


def update_digest(digest: Any, path: Path) -> None:
    """Update a hashlib digest with the bytes of a file."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
