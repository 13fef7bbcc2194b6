"""Files of unknown origin: JSON of bounded size, and the tensor shapes in the header of a safetensors file."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from safetensors import SafetensorError, safe_open

from gpt_kit_hf.errors import CheckpointError, one_line

Shapes: TypeAlias = dict[str, tuple[int, ...]]

_MAX_HEADER_BYTES = 16 << 20
# The cost of parsing JSON depends on the number of objects, which few bytes can make. A key costs as much as 3 values.
_VALUE_COSTS = {b",": 1, b"{": 1, b"[": 1, b":": 2}
_MAX_VALUES = 750_000


def refuse(path: Path, problem: str) -> NoReturn:
    """Raise CheckpointError with one printable line."""
    # File names are untrusted, too: they may hold line breaks or a terminal's control sequences.
    line = one_line(f"{path}: {problem}")
    raise CheckpointError("".join(character if character.isprintable() else "?" for character in line)) from None


def show(value: object) -> str:
    """Return an untrusted value as one short line."""
    return reprlib.repr(value)


def check_size(path: Path, max_bytes: int) -> None:
    """Raise CheckpointError for a file of more than `max_bytes`."""
    if (size := path.stat().st_size) > max_bytes:
        refuse(path, f"it has {size:,} bytes; such a file may have {max_bytes:,}")


def read_object(path: Path, *, max_bytes: int, max_values: int = _MAX_VALUES) -> dict[str, Any]:
    """Return the JSON object in a file, parsed as transformers parses it; CheckpointError for anything else."""
    check_size(path, max_bytes)
    data = path.read_bytes()
    _check_values(path, data, max_values)
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        refuse(path, f"it is not valid JSON: {error}")
    if not isinstance(value, dict):
        refuse(path, f"it must be a JSON object, is a {type(value).__name__}")
    return value


def _check_values(path: Path, data: bytes, maximum: int) -> None:
    if sum(cost * data.count(mark) for mark, cost in _VALUE_COSTS.items()) > maximum:
        refuse(path, f"it holds more than the {maximum:,} values that such a file may have")


def count_elements(shapes: Shapes) -> int:
    """Return the number of elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def largest_dimension(shapes: Shapes) -> int:
    """Return the largest dimension of the tensors that are not empty, 0 if there are none."""
    return max((size for shape in shapes.values() if math.prod(shape) for size in shape), default=0)


def read_header(path: Path) -> Shapes:
    """Return the shape of each tensor of a safetensors file by its header; no tensor is read.

    The safetensors library checks that known types, shapes and offsets agree and cover the file without a gap or an
    overlap; it is the library that loads the file later. The header's size is bounded before. Raises CheckpointError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            refuse(path, f"its header claims {length:,} bytes of {size:,}; it may have {_MAX_HEADER_BYTES:,}")
        _check_values(path, file.read(length), _MAX_VALUES)
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        refuse(path, f"it is not valid safetensors: {str(error)[:200]}")
