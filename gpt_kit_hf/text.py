"""Formats text, numbers, durations and the names of folders for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def printable(text: str) -> str:
    """Return text with control characters replaced: an untrained model may write them, and a terminal obeys them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def escaped(text: str) -> str:
    """Return text on one line, with control characters as they are written in Python's strings."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record for JSON, which has no NaN and no infinity: these become None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def short(number: float) -> str:
    """Return a count in at most four characters and a unit: 950, 12.3k, 124M, 1.56B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def file_size(size: float) -> str:
    """Return a number of bytes as text: 3 kB, 45 MB, 1.24 GB."""
    if size >= 0.9995e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 0.9995e6 else f"{size / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Return a duration in at most two units: 40 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def display_names(folders: Iterable[Path]) -> dict[Path, str]:
    """Return the shortest names that tell the folders apart: the last part of a path, or as many as are needed."""
    whole = {folder: folder.resolve() for folder in folders}
    names = {}
    for folder, path in whole.items():
        others = [other for each, other in whole.items() if each != folder]
        depths = range(1, len(path.parts) + 1)
        depth = next((n for n in depths if all(other.parts[-n:] != path.parts[-n:] for other in others)), 1)
        names[folder] = "/".join(path.parts[-depth:])
    return names
