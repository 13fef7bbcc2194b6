"""Thinned curves against the whole ones."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_lines, write_run

from gpt_kit_hf.pages.curve_rows import GROUPS, curves, row_bounds, row_count
from gpt_kit_hf.storage.run_history import RunReader, read_run


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025, 1026, 2047, 2048, 2049, 5000, 100_000])
def test_each_value_is_in_one_row(length: int) -> None:
    bounds = [row_bounds(row) for row in range(row_count(length))]
    assert [place for first, end in bounds for place in range(first, end)][:length] == list(range(length))
    assert not bounds or bounds[-1][0] < length <= bounds[-1][1]
    assert len(bounds) < 4500


def test_as_many_rows_as_pixels_in_each_half_of_the_chart() -> None:
    length = 1 << 17
    rows = row_count(length) - row_count(length // 2)
    assert rows == 512
    assert {end - first for first, end in map(row_bounds, range(1024))} == {1}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "long", 0, planned=20_000, checkpoints=())
    rng = random.Random(1)
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "loss": rng.gauss(3, 0.1), "grad_norm": 1.0, "trained_tokens": 10}
        for step in range(1, 20_001)
    ]
    lines[17_776]["loss"] = 1000.0
    lines[19_000]["loss"] = None
    write_lines(folder, lines)
    return folder


def test_no_spike_is_lost_and_the_mean_is_that_of_the_values(long_run: Path) -> None:
    found = curves(read_run(long_run), {})["train"]
    losses = [json.loads(line)["loss"] for line in (long_run / "metrics.jsonl").read_text().splitlines()]
    column = found["series"]["loss"]
    assert max(column["high"]) == 1000.0
    place = 0
    for row, count in enumerate(found["count"]):
        values = [value for value in losses[place : place + count] if value is not None]
        assert column["value"][row] == pytest.approx(sum(values) / len(values), rel=1e-6)
        assert (column["low"][row], column["high"][row]) == pytest.approx((min(values), max(values)), rel=1e-6)
        assert place + 1 <= found["steps"][row] <= place + count
        assert found["tokens"][row] == found["steps"][row] * 10
        place += count
    assert place == len(losses)
    assert set(found["series"]["learning_rate"]["value"]) == {None}  # these lines have none


def test_rows_in_pieces_are_the_rows_at_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, planned=5000, checkpoints=())
    reader, rng = RunReader(folder), random.Random(0)
    kept: dict[str, dict[str, Any]] = {}
    step = 0
    while step < 4000:
        new = rng.choice((0, 1, 2, 500, 1000))
        losses = [rng.random() for _ in range(new)]
        write_lines(folder, [{"kind": "train", "step": step + i, "loss": loss} for i, loss in enumerate(losses, 1)])
        step += new
        seen = {group: len(rows["steps"]) for group, rows in kept.items()}
        for group, rows in curves(reader.read(), seen).items():
            held = kept.setdefault(group, {"steps": [], "tokens": [], "count": [], "series": {}})
            for name in ("steps", "tokens", "count"):
                held[name][rows["from"] :] = rows[name]
            for name, columns in rows["series"].items():
                held["series"].setdefault(name, {"value": [], "low": [], "high": []})
                for kind, values in columns.items():
                    held["series"][name][kind][rows["from"] :] = values
    whole = curves(read_run(folder), {})
    assert kept == {group: {name: rows[name] for name in rows if name != "from"} for group, rows in whole.items()}


def test_more_was_seen_than_there_is(long_run: Path) -> None:
    found = curves(read_run(long_run), {"train": 10**9})
    assert found["train"]["from"] == row_count(20_000) - 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == set(GROUPS)


def test_times_of_several_sessions_add_up(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, planned=100, checkpoints=())
    times = [(10, 5.0), (20, 10.0), (30, 4.0), (40, 8.0), (50, 20.0)]
    write_lines(folder, [{"kind": "speed", "step": step, "seconds": seconds} for step, seconds in times])
    record = json.loads((folder / "run.json").read_text())
    record["sessions"] = [{"after_step": step} for step in (0, 20, 40, 40)]  # the third ended before a speed
    (folder / "run.json").write_text(json.dumps(record))
    elapsed = read_run(folder).elapsed
    assert list(elapsed.values) == [5.0, 10.0, 14.0, 18.0, 38.0]
    assert math.isnan(read_run(folder).series["tokens_per_second"].last)
