"""`gpt-kit runs` and `compare`: what the folders of runs tell, without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from gpt_kit_hf.commands.running import write
from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.options.evaluation import CompareOptions, RunsOptions
from gpt_kit_hf.storage.run_folder import METRICS_FILE, RECORD_FILE
from gpt_kit_hf.storage.run_history import RunHistory, find_runs, read_run
from gpt_kit_hf.text import duration, escaped, short

_ABSENT = "-"
_WIDEST = 40  # characters of a value in a table
# Facts of run.json that are shown otherwise, or that differ between any two runs.
_NOT_COMPARED = {"options", "steps", "versions", "sessions", "results", "run_id"}


def runs(options: RunsOptions) -> None:
    """List the runs in a folder.

    Raises UsageError if there are none, and CheckpointError, after the list, for those that cannot be read.
    """
    folder = Path(options.folder)
    found = find_runs(folder)
    if not found:
        raise UsageError(f"{options.folder!r} holds no run, nor do the folders in it")
    rows, unreadable = [], []
    for run in found:
        try:
            rows.append(_Row(read_run(run)))
        except CheckpointError as error:
            unreadable.append(f"{run} cannot be read: {error}")
    order = {"name": lambda row: str(row.run.folder), "date": lambda row: row.changed, "loss": lambda row: row.loss}
    rows.sort(key=order[options.sort])
    if rows:
        heading = ["RUN", "STATE", "STEPS", "EVAL LOSS", "BITS/BYTE", "PARAMETERS", "SIZE", "CHANGED"]
        lines = [heading, *(row.cells() for row in rows)]
        write("".join(f"{line}\n" for line in [*_aligned(lines), *_notes(rows)]))
    if unreadable:
        raise CheckpointError("; ".join(unreadable))


def compare(options: CompareOptions) -> None:
    """Show in what runs differ. Raises UsageError for fewer than two runs."""
    if len(options.runs) < 2:
        raise UsageError(f"runs: give two runs or more to compare, got {len(options.runs)}")
    found = [read_run(Path(run)) for run in options.runs]
    table = [["", *options.runs]]
    for title, rows in _groups(found).items():
        shown = [[name, *values] for name, values in rows if options.all or len(set(values)) > 1]
        table += [[title.upper()], *shown] if shown else []
    if len(table) == 1:
        write("the runs do not differ in options, data, versions and results\n")
        return
    write("".join(f"{line}\n" for line in [*_aligned(table), *_cautions(found)]))


class _Row:
    """A run in the list."""

    def __init__(self, run: RunHistory) -> None:
        self.run = run
        self.scored = dict(run.results) or {"loss": run.series["eval_loss"].last}
        if not run.results:
            self.scored["bits_per_byte"] = run.series["bits_per_byte"].last
        self.loss = float(self.scored["loss"])
        self.loss = math.inf if math.isnan(self.loss) else self.loss
        self.changed = max(_changed(run.folder / name) for name in (METRICS_FILE, RECORD_FILE))

    def cells(self) -> list[str]:
        """Return the columns."""
        run = self.run
        planned = f"/{run.steps_planned:,}" if run.steps_planned is not None else ""
        parameters = run.record.get("parameters")
        return [
            str(run.folder),
            run.state,
            f"{run.steps_done:,}{planned}",
            _number(self.scored["loss"]),
            _number(self.scored["bits_per_byte"]),
            short(parameters) if isinstance(parameters, int) else _ABSENT,
            f"{_size(run.folder) / 1e6:,.1f} MB",
            datetime.fromtimestamp(self.changed).strftime("%Y-%m-%d %H:%M") if self.changed else _ABSENT,
        ]


def _notes(rows: Sequence[_Row]) -> Iterator[str]:
    """Yield what the columns do not say."""
    unfinished = [row for row in rows if not row.run.results and math.isfinite(row.loss)]
    if unfinished:
        yield "Scores of runs that are not finished are those of their last evaluation, on part of the held-out data."
    for row in rows:
        run = row.run
        if run.state == "failed":
            yield f"{run.folder} failed: {escaped(str(run.error))}"
        if run.state in ("failed", "interrupted"):
            step = max(run.checkpoints, default=0)
            resumed = f"continues after step {step:,}" if step else "has no checkpoint and begins again"
            yield f"{run.folder} {resumed} with --resume and the options of before"
        elif run.state == "finished":
            yield from _ending(run)


def _ending(run: RunHistory) -> Iterator[str]:
    """Yield what a finished run did otherwise than to train all steps and publish the last."""
    done, planned = run.steps_done, run.steps_planned
    if planned is not None and done < planned:
        yield f"{run.folder} stopped early, after step {done:,} of {planned:,}"
    if (published := _published(run)) != _ABSENT:
        yield f"{run.folder} published the model of step {published}"


def _published(run: RunHistory) -> str:
    step = run.step_published
    return _ABSENT if step in (None, run.steps_done) else f"{step:,}"


def _groups(found: Sequence[RunHistory]) -> dict[str, list[tuple[str, list[str]]]]:
    """Return the rows to compare by group: a name, and the value of each run as text."""
    return {
        "results": _rows([_results(run) for run in found]),
        "options": _rows([run.options for run in found]),
        "data and model": _rows([_facts(run.record) for run in found]),
        "versions": _rows([_mapping(run.record.get("versions")) for run in found]),
    }


def _results(run: RunHistory) -> dict[str, Any]:
    results, speed = run.results, run.series["tokens_per_second"].last
    peak = [value for value in run.series["memory_bytes"].values if math.isfinite(value)]
    best = run.best
    return {
        "state": run.state,
        "steps": f"{run.steps_done:,}",
        "published step, if not the last": _published(run),
        "trained tokens": f"{run.trained_tokens:,}",
        "skipped updates": run.skipped,
        "training loss, last step": _number(run.series["loss"].last),
        "eval loss, all held-out data": _number(results.get("loss")),
        "bits per byte": _number(results.get("bits_per_byte")),
        "eval loss, best checkpoint": _ABSENT if best is None else f"{best[1]:.4f} (step {best[0]:,})",
        "tokens per second, last": short(speed) if math.isfinite(speed) else _ABSENT,
        "memory, most": f"{max(peak) / 1e9:.2f} GB" if peak else _ABSENT,
        "time of training": _time(run),
    }


def _time(run: RunHistory) -> str:
    """Return the time that the sessions took together, up to their last measured step."""
    total = run.elapsed.values
    return duration(total[-1]) if len(total) else _ABSENT


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what run.json says about data, model and device, one level of it as "name.key"."""
    facts: dict[str, Any] = {}
    for name, value in record.items():
        if name in _NOT_COMPARED:
            continue
        if isinstance(value, dict):
            facts |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            facts[name] = value
    return facts


def _cautions(found: Sequence[RunHistory]) -> Iterator[str]:
    """Yield what the scores of the runs do not allow."""
    if len({run.record.get("eval_fingerprint") for run in found}) > 1:
        yield "The held-out data differ, or may: scores of one run are not comparable with those of another."
    elif len({run.record.get("tokenizer_fingerprint") for run in found}) > 1:
        yield "The tokenizers differ: compare bits per byte, not losses per token."


def _rows(values: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return (name, the value of each run), in the order in which the names come first."""
    names = dict.fromkeys(name for each in values for name in each)
    return [(name, [_text(each[name]) if name in each else _ABSENT for each in values]) for name in names]


def _text(value: object) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return escaped(str(value))


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) and math.isfinite(value) else _ABSENT


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows with their cells below each other; long values lose their middle, names and headings do not."""
    cut = [list(rows[0]), *([row[0], *map(_cut, row[1:])] for row in rows[1:])]
    widths = [max(len(row[column]) for row in cut if column < len(row)) for column in range(max(map(len, cut)))]
    for row in cut:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()


def _cut(value: str) -> str:
    if len(value) <= _WIDEST:
        return value
    half = (_WIDEST - 3) // 2
    return f"{value[:half]}...{value[-half:]}"


def _size(folder: Path) -> int:
    return sum(_bytes(Path(place) / name) for place, _, names in os.walk(folder) for name in names)


def _bytes(path: Path) -> int:
    with suppress(OSError):  # a checkpoint may be deleted at this moment
        return path.lstat().st_size
    return 0


def _changed(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
