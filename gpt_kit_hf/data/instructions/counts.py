"""Counts of the rows of an input: each row is used, or left out for a reason that is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from gpt_kit_hf.data.instructions.reader import SkippedRows
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.text import escaped


@dataclass(frozen=True)
class LeftOut:
    """Rows that were left out for one kind of fault: how many, and the first of them, each "place: reason"."""

    rows: int
    first: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What became of the rows of an input: files or a dataset, before any of them are split off for evaluation.

    Attributes:
        rows_read: rows that were read: `rows_used` of them, and those in `skipped` and `dropped`.
        skipped: rows that could not be used, by kind of fault; `dropped`: rows that were too long.
        rows_truncated: rows used whose prompt lost its beginning.
        unread_keys: keys that were not read, and how many rows or turns had each; `thinking_left_out`: answers whose
            thinking was left out. Both are counted in all rows that were not skipped.

    Raises DataError if the counts do not add up.

    """

    rows_read: int
    rows_used: int
    skipped: Mapping[str, LeftOut] = dataclasses.field(default_factory=dict)
    dropped: Mapping[str, LeftOut] = dataclasses.field(default_factory=dict)
    rows_truncated: int = 0
    unread_keys: Mapping[str, int] = dataclasses.field(default_factory=dict)
    thinking_left_out: int = 0

    def __post_init__(self) -> None:
        parts = {"used": self.rows_used, "skipped": count(self.skipped), "dropped": count(self.dropped)}
        check_sum("rows read", self.rows_read, parts)

    def summary(self) -> str:
        """Return the counts in a phrase: "60 read, 20 used, 40 skipped"."""
        parts = [f"{self.rows_read:,} read", f"{self.rows_used:,} used"]
        groups = (("skipped", self.skipped), ("dropped", self.dropped))
        return ", ".join(parts + [f"{count(kinds):,} {name}" for name, kinds in groups if kinds])

    def reasons(self) -> str:
        """Return why rows were left out: "40 skipped: null; 2 dropped: longer than max_length"."""
        return "; ".join(f"{left.rows:,} {name}: {kind}" for name, kind, left in self._left_out())

    def lines(self, label: str) -> list[str]:
        """Return the counts for a terminal, with the reasons and the first rows of each."""
        lines = [f"{label:<9} {self.summary()}"]
        for name, kind, left in self._left_out():
            lines.append(f"  {left.rows:,} {name}: {kind}")
            lines += [f"    {row}" for row in left.first]
        if self.rows_truncated:
            lines.append(f"  {self.rows_truncated:,} rows lost the beginning of their prompt")
        return lines + [f"  {note}" for note in self.notes()]

    def notes(self) -> list[str]:
        """Return which keys were not read, and of how many answers the thinking was left out, where there are any."""
        keys = ", ".join(f"{key} ({number:,})" for key, number in self.unread_keys.items())
        notes = [f"keys not read: {keys}"] if keys else []
        if self.thinking_left_out:
            notes.append(f"thinking left out of {self.thinking_left_out:,} answers; --thinking train includes it")
        return [escaped(note) for note in notes]

    def _left_out(self) -> list[tuple[str, str, LeftOut]]:
        groups = (("skipped", self.skipped), ("dropped", self.dropped))
        return [(name, kind, left) for name, kinds in groups for kind, left in kinds.items()]


def count(kinds: Mapping[str, LeftOut]) -> int:
    """Return the number of rows of all kinds."""
    return sum(left.rows for left in kinds.values())


def check_sum(name: str, total: int, parts: Mapping[str, int]) -> None:
    """Raise DataError unless the parts sum to the total."""
    if total != sum(parts.values()):
        shown = " + ".join(f"{number:,} {part}" for part, number in parts.items())
        raise DataError(
            f"{name}: {total:,} is not {shown}, but each row must be counted once; unless code of yours split the "
            "rows, this is a fault of gpt-kit: please report it"
        )


def left_out(rows: SkippedRows) -> dict[str, LeftOut]:
    """Return rows that were left out by kind of fault, the most frequent first."""
    return {
        kind: LeftOut(number, tuple(f"{row.place}: {row.reason}" for row in rows.first(kind)))
        for kind, number in rows.counts.most_common()
    }
