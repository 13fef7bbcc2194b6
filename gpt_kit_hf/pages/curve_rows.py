"""Curves for a chart: long ones are thinned, so that no spike is lost and rows that were sent stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpt_kit_hf.storage.run_history import RunHistory, Series

# Of the rows of a chart: what is drawn beside the same steps.
GROUPS = {
    "train": ("loss", "learning_rate", "grad_norm"),
    "eval": ("eval_loss", "bits_per_byte"),
    "speed": ("tokens_per_second", "memory_bytes", "elapsed"),
}
_SINGLE = 1024  # the first values of a series, each in a row of its own
_PER_OCTAVE = 512  # rows for each doubling of the length after that: as many as half a chart has pixels


def row_bounds(row: int) -> tuple[int, int]:
    """Return the places first..end (excluded) of the values that a row stands for.

    Rows of the first 1,024 values have one each, those of the next 1,024 two, of the next 2,048 four, and so on: the
    rows do not change when the series grows, except for the last.
    """
    if row < _SINGLE:
        return row, row + 1
    octave, place = divmod(row - _SINGLE, _PER_OCTAVE)
    width = 2 << octave
    first = (_SINGLE << octave) + place * width
    return first, first + width


def row_count(length: int) -> int:
    """Return how many rows a series of this length has."""
    if length <= _SINGLE:
        return length
    octave = ((length - 1) // _SINGLE).bit_length() - 1
    return _SINGLE + octave * _PER_OCTAVE + ((length - 1) - (_SINGLE << octave)) // (2 << octave) + 1


def curves(run: RunHistory, seen: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return the rows of each group in `GROUPS` from the last row that was `seen` on, as JSON.

    A group has `from`, the number of its first row; `steps` and `tokens` of the middle value of each row; `count`, the
    number of values; and for each name the columns `value` (the mean), `low` and `high` (the least and the greatest).
    Values have seven digits; those that are not finite do not count, and a row without others has null.
    """
    return {group: _group(run, names, seen.get(group, 0)) for group, names in GROUPS.items()}


def _group(run: RunHistory, names: tuple[str, ...], seen: int) -> dict[str, Any]:
    found = {name: run.elapsed if name == "elapsed" else run.series[name] for name in names}
    longest = max(found.values(), key=lambda series: len(series.steps))
    rows = row_count(len(longest.steps))
    # The last row of before may stand for more values now.
    first = max(0, min(seen, rows) - 1)
    bounds = [row_bounds(row) for row in range(first, rows)]
    bounds = [(start, min(end, len(longest.steps))) for start, end in bounds]
    middles = [(start + end - 1) // 2 for start, end in bounds]
    return {
        "from": first,
        "steps": [longest.steps[place] for place in middles],
        "tokens": [longest.tokens[place] for place in middles],
        "count": [end - start for start, end in bounds],
        "series": {name: _columns(series, bounds) for name, series in found.items()},
    }


def _columns(series: Series, bounds: list[tuple[int, int]]) -> dict[str, list[float | None]]:
    columns: dict[str, list[float | None]] = {"value": [], "low": [], "high": []}
    for start, end in bounds:
        values = [value for value in series.values[start:end] if math.isfinite(value)]
        row = (math.fsum(values) / len(values), min(values), max(values)) if values else (None, None, None)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(None if value is None else float(f"{value:.7g}"))
    return columns
