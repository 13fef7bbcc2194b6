"""The header of a GGUF file: what a model is, its vocabulary, and where its tensors are.

Layout: the magic, the version, the numbers of tensors and of metadata entries; then the entries, each a name, a type
and a value; then of each tensor its name, shape, type and place. Source: the ggml repository's description of GGUF.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gpt_kit_hf.errors import UsageError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The types of numbers, as `struct` names them; the other two types are strings and arrays.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Of tensor types: values in a block, bytes of a block. Of other types the size is not checked.
_BLOCKS = {0: (1, 4), 1: (1, 2), 8: (32, 34), 30: (1, 2)}
TENSOR_TYPES = {0: "F32", 1: "F16", 8: "Q8_0", 30: "BF16"}


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """The shape of a tensor, the fastest dimension first, the number of its type, and its place in the data."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """The metadata and the tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]

    @property
    def architecture(self) -> str:
        """The name of the architecture, such as "gpt2"."""
        return str(self.metadata["general.architecture"])

    @property
    def context_length(self) -> int:
        """The number of positions that the model was trained for."""
        return int(self.metadata[f"{self.architecture}.context_length"])

    @property
    def precision(self) -> str:
        """The type of most matrices, such as "F16", or its number where it has no name here."""
        kinds = [each.type for each in self.tensors.values() if len(each.shape) > 1]
        most = max(set(kinds), key=kinds.count, default=0)
        return TENSOR_TYPES.get(most, f"type {most}")


def is_gguf(place: Path) -> bool:
    """Return whether a path is a file that is named, or begins, like a GGUF file."""
    if not place.is_file():
        return False
    if place.suffix.lower() == ".gguf":
        return True
    with place.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_gguf_header(path: Path) -> GGUFHeader:
    """Return the header of a GGUF file of a language model, checked; the data of the tensors are not read.

    Raises UsageError for a file of another kind, of another version, or that is not complete, and for a model without
    an architecture, a context length or a vocabulary.
    """
    try:
        with path.open("rb") as file:
            header, data = _read(file, path)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (struct.error, EOFError, UnicodeDecodeError, MemoryError, OverflowError, RecursionError):
        raise UsageError(f"{str(path)!r} is not complete: its header ends early or is damaged") from None
    _check_size(header, data, path)
    named = header.metadata.get("general.architecture")
    for key in ("general.architecture", f"{named}.context_length", "tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if key not in header.metadata:
            raise UsageError(f"{str(path)!r} has no {key}: it is no GGUF file of a language model")
    return header


def _read(file: BinaryIO, path: Path) -> tuple[GGUFHeader, int]:
    """Return the header and the place of the data."""
    magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise UsageError(f"{str(path)!r} is no GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
    version = _number(file, "I")
    if version not in _VERSIONS:
        raise UsageError(f"{str(path)!r} has GGUF version {version}; known: {', '.join(map(str, _VERSIONS))}")
    n_tensors, n_entries = _number(file, "Q"), _number(file, "Q")
    metadata = {}
    for _ in range(n_entries):
        name = _string(file)
        metadata[name] = _value(file, _number(file, "I"))
    tensors = {}
    for _ in range(n_tensors):
        name, n_dimensions = _string(file), _number(file, "I")
        shape = tuple(_number(file, "Q") for _ in range(n_dimensions))
        tensors[name] = TensorPlace(shape=shape, type=_number(file, "I"), offset=_number(file, "Q"))
    alignment = int(metadata.get("general.alignment", 32))
    return GGUFHeader(metadata=metadata, tensors=tensors), math.ceil(file.tell() / alignment) * alignment


def _check_size(header: GGUFHeader, data: int, path: Path) -> None:
    end = data
    for tensor in header.tensors.values():
        values, size = _BLOCKS.get(tensor.type, (1, 0))
        end = max(end, data + tensor.offset + math.prod(tensor.shape) // values * size)
    if (found := path.stat().st_size) < end:
        raise UsageError(f"{str(path)!r} is not complete: it has {found:,} bytes, and its tensors end at {end:,}")


def _bytes(file: BinaryIO, length: int) -> bytes:
    content = file.read(length)
    if len(content) < length:
        raise EOFError
    return content


def _number(file: BinaryIO, code: str) -> int:
    (value,) = struct.unpack(f"<{code}", _bytes(file, struct.calcsize(code)))
    return int(value)


def _string(file: BinaryIO) -> str:
    return _bytes(file, _number(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        element, length = _number(file, "I"), _number(file, "Q")
        if element in _NUMBERS:
            code = f"<{length}{_NUMBERS[element]}"
            return list(struct.unpack(code, _bytes(file, struct.calcsize(code))))
        return [_value(file, element) for _ in range(length)]
    if kind not in _NUMBERS:
        raise EOFError
    (value,) = struct.unpack(f"<{_NUMBERS[kind]}", _bytes(file, struct.calcsize(f"<{_NUMBERS[kind]}")))
    return value
