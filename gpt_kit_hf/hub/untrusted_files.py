"""Files of a stranger, read without trust: JSON of bounded size, and what the header of a safetensors file claims."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from gpt_kit_hf.errors import CheckpointError, one_line
from gpt_kit_hf.storage.atomic_files import parse_object

Shapes: TypeAlias = dict[str, tuple[int, ...]]

_MOST_HEADER_BYTES = 16 << 20
# Few bytes make many objects: what parsing costs hangs on their number. A key costs as much as three values.
_MARKS = {b",": 1, b"{": 1, b"[": 1, b":": 2}
_MOST_VALUES = 750_000

# Bits of an element, by the names of the format.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


def refuse(path: Path, problem: str) -> NoReturn:
    """Raise CheckpointError in one line that a terminal shows as it is."""
    # A stranger names files, too: with line ends, or with what moves a terminal's cursor.
    line = one_line(f"{path}: {problem}")
    raise CheckpointError("".join(character if character.isprintable() else "?" for character in line)) from None


def show(value: object) -> str:
    """Return a stranger's value in one short line."""
    return reprlib.repr(value)


def check_size(path: Path, most: int) -> None:
    """Refuse a file of more than so many bytes."""
    if (size := path.stat().st_size) > most:
        refuse(path, f"it has {size:,} bytes; such a file may have {most:,}")


def read_object(path: Path, *, most_bytes: int, most_values: int = _MOST_VALUES) -> dict[str, Any]:
    """Return the JSON object in a file, as Python's own reader gives it to transformers, too."""
    check_size(path, most_bytes)
    data = path.read_bytes()
    _check_values(path, data, most_values)
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        refuse(path, f"it is not valid JSON: {error}")
    if not isinstance(value, dict):
        refuse(path, f"it must be a JSON object, is a {type(value).__name__}")
    return value


def _check_values(path: Path, data: bytes, most: int) -> None:
    if sum(cost * data.count(mark) for mark, cost in _MARKS.items()) > most:
        refuse(path, f"it holds more than the {most:,} values that such a file may have")


def count_numbers(shapes: Shapes) -> int:
    """Return how many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def largest_size(shapes: Shapes) -> int:
    """Return the largest size of a tensor that is not empty, 0 if there is none."""
    return max((size for shape in shapes.values() if math.prod(shape) for size in shape), default=0)


def read_header(path: Path) -> Shapes:
    """Return the shape of each tensor in a safetensors file whose header describes all of its bytes, each once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MOST_HEADER_BYTES, size - 8):
            refuse(path, f"its header claims {length:,} bytes of {size:,}; it may have {_MOST_HEADER_BYTES:,}")
        data = file.read(length)
    _check_values(path, data, _MOST_VALUES)
    try:
        # With more care than Python's own reader: the library that reads it is another.
        header = parse_object(data, "its header")
    except CheckpointError as error:
        refuse(path, str(error))
    header.pop("__metadata__", None)
    spans = [_read_span(path, name, entry) for name, entry in header.items()]
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            refuse(path, f"{show(name)} begins at byte {begin:,} of the data, the one before ends at {end:,}")
        end = stop
    if end != size - 8 - length:
        refuse(path, f"its header describes {end:,} bytes of data, the file has {size - 8 - length:,}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _read_span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Return where a tensor begins and ends in the data, which its shape and type must agree with."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        refuse(path, f"{show(name)} has the unknown type {show(dtype)}")
    if not _are_counts(shape) or len(shape) > 64:
        refuse(path, f"{show(name)} has the shape {show(shape)}; it must be a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        refuse(path, f"{show(name)} has the offsets {show(offsets)}; they must be where it begins and ends")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        refuse(path, f"{show(name)} of {dtype} {show(shape)} cannot have the offsets {show(offsets)}")
    return offsets[0], offsets[1], name


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(count) is int and 0 <= count < 1 << 63 for count in value)
