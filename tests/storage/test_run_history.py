"""What is read of a run folder, compared with what was written, also while the files change."""

from __future__ import annotations

import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import TOKENS_PER_STEP, metric_lines, write_lines, write_run

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import cut_jsonl
from gpt_kit_hf.storage.lock import RunLock
from gpt_kit_hf.storage.run_history import SERIES, RunReader, eval_changed_after, find_runs, read_run


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_series_are_what_the_lines_say(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", 40))
    lines = metric_lines(40)
    for name, (kind, key) in SERIES.items():
        expected = [
            (line["step"], line["step"] * TOKENS_PER_STEP, line[key]) for line in lines if line["kind"] == kind
        ]
        series = run.series[name]
        assert list(zip(series.steps, series.tokens, series.values, strict=True)) == expected
    assert [(s.step, s.prompt, s.text) for s in run.samples] == [
        (step, "The", f" text of step {step}") for step in (10, 20, 30, 40)
    ]
    assert (run.steps_done, run.steps_planned, run.trained_tokens) == (40, 40, 40 * TOKENS_PER_STEP)
    assert run.baselines == {"gzip -9": 3.2, "byte unigram": 4.8}
    assert run.bytes_per_token == pytest.approx(2.5)
    assert run.checkpoints == (20, 40)


def test_the_best_checkpoint_is_one_that_is_kept(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40, checkpoints=(10, 20))
    losses = {line["step"]: line["loss"] for line in metric_lines(40) if line["kind"] == "eval"}
    assert min(losses, key=losses.__getitem__) == 40
    assert read_run(folder).best == (20, losses[20])
    data = {"before": {"eval_fingerprint": "a"}, "now": {"eval_fingerprint": "b"}}
    change(folder / "run.json", sessions=[{"after_step": 0}, {"after_step": 20, "data_changed": data}])
    assert eval_changed_after(json.loads((folder / "run.json").read_text())) == 20
    assert read_run(folder).best is None


def test_the_last_evaluation_is_compared_only_with_those_on_as_many_tokens(tmp_path: Path) -> None:
    def best(name: str, *scores: tuple[int, float, int | None], last: tuple[int, float, int]) -> object:
        steps = tuple({step for step, *_ in (*scores, last)})
        folder = write_run(tmp_path / name, 0, planned=40, checkpoints=steps)
        lines: list[dict[str, Any]] = [
            {"kind": "eval", "step": step, "loss": loss, "tokens": n} for step, loss, n in scores
        ]
        step, loss, tokens = last
        lines.append({"kind": "eval", "step": step, "loss": loss, "tokens": tokens, "last": True})
        write_lines(folder, lines)
        return read_run(folder).best

    part, whole = 4096, 90_000
    assert best("easier", (20, 3.0, part), (30, 2.9, part), last=(40, 2.5, whole)) == (30, 2.9)
    assert best("scored twice", (20, 3.0, part), (40, 3.2, part), last=(40, 2.5, whole)) == (20, 3.0)
    # As many tokens are the same text. The last is of the published model, which may be another than that of its step.
    assert best("short text", (20, 3.0, part), last=(40, 2.5, part)) == (40, 2.5)
    assert best("published", (20, 3.0, part), (40, 3.2, part), last=(40, 2.5, part)) == (20, 3.0)
    assert best("alone", last=(40, 2.5, whole)) == (40, 2.5)
    assert best("before training", (0, 1.0, whole), (20, 3.0, part), last=(40, 2.5, whole)) == (20, 3.0)
    assert best("unknown", (20, 3.0, None), last=(40, 2.5, whole)) == (20, 3.0)


def test_reading_in_pieces_gives_what_reading_at_once_gives(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, planned=40, checkpoints=())
    data = "".join(json.dumps(line) + "\n" for line in metric_lines(40)).encode()
    reader, rng, written = RunReader(folder), random.Random(0), 0
    while written < len(data):
        size = rng.choice((1, 7, 100, 1000))  # lines are seen in part
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(data[written : written + size])
        written += size
        before = data[:written].count(b'"kind": "train"', 0, data.rfind(b"\n", 0, written) + 1)
        assert len(reader.read().series["loss"].steps) == before
    assert reader.read() == read_run(folder)


def test_only_new_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt_kit_hf.storage import metrics_file

    parsed: list[bytes] = []
    original = metrics_file.parse_object
    monkeypatch.setattr(
        metrics_file, "parse_object", lambda data, source: parsed.append(data) or original(data, source)
    )
    folder = write_run(tmp_path / "run", 20, planned=40)
    reader = RunReader(folder)
    reader.read()
    parsed.clear()
    write_lines(folder, metric_lines(21, first=21))
    assert reader.read().steps_done == 21
    assert sum(b'"kind"' in data for data in parsed) == 1


def test_a_resume_that_cuts_the_file_starts_the_curves_anew(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 35, planned=60)
    reader = RunReader(folder)
    assert reader.read().steps_done == 35
    cut_jsonl(folder / "metrics.jsonl", lambda line: line["step"] <= 20)
    write_lines(folder, [line | {"loss": 9.0} for line in metric_lines(50, first=21)])  # longer than it was
    assert reader.read() == read_run(folder)
    assert reader.read().series["loss"].values[30] == 9.0


def test_a_file_with_the_same_inode_is_told_from_one_that_grew(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, planned=60)
    reader = RunReader(folder)
    reader.read()
    with (folder / "metrics.jsonl").open("r+") as file:  # in place, as if the inode were used again
        file.truncate()
    write_lines(folder, [line | {"loss": 9.0} for line in metric_lines(50)])
    assert reader.read() == read_run(folder)


def test_a_run_that_begins_later_and_one_that_is_moved_away(tmp_path: Path) -> None:
    reader = RunReader(tmp_path / "run")
    assert reader.read().state == "missing"
    write_run(tmp_path / "run", 30, planned=60)
    assert (reader.read().state, reader.read().steps_done) == ("interrupted", 30)
    (tmp_path / "run").rename(tmp_path / "other")
    assert (reader.read().state, reader.read().steps_done) == ("missing", 0)


def test_the_states(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, planned=60)
    assert read_run(folder).state == "interrupted"
    with RunLock(folder):
        assert read_run(folder).state == "running"
        lock = (folder / "run.lock").read_text()
    change(folder / "run.json", sessions=[{"after_step": 0, "error": "NonFiniteError: 20 updates"}])
    assert (read_run(folder).state, read_run(folder).error) == ("failed", "NonFiniteError: 20 updates")
    (folder / "run.lock").write_text(json.dumps(json.loads(lock) | {"started": "1 ticks after boot"}))  # it was killed
    assert read_run(folder).state == "failed"
    assert read_run(write_run(tmp_path / "done", 20)).state == "finished"
    change(tmp_path / "done" / "run.json", steps=40)  # resumed for more steps
    assert read_run(tmp_path / "done").state == "interrupted"


def test_a_run_of_another_machine_runs_while_it_renews_its_lease(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, planned=60)
    lock = folder / "run.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "machine": "m", "pid": 1, "started": "", "lease": 90.0}))
    assert read_run(folder).state == "running"
    os.utime(lock, (time.time() - 100,) * 2)
    assert read_run(folder).state == "interrupted"


def test_losses_that_are_not_finite_and_skipped_updates(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 10, planned=60, checkpoints=())
    skipped = {"kind": "train", "step": 11, "loss": None, "skipped": "loss", "trained_tokens": 512}
    write_lines(folder, [skipped, *metric_lines(12, first=12)])
    run = read_run(folder)
    assert math.isnan(run.series["loss"].values[10])
    assert math.isfinite(run.series["loss"].last)
    assert (run.skipped, run.trained_tokens) == (1, 11 * TOKENS_PER_STEP)


def test_a_run_before_there_were_speeds_and_samples(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    cut_jsonl(folder / "metrics.jsonl", lambda line: line["kind"] in ("train", "eval"))
    run = read_run(folder)
    assert run.samples == ()
    assert list(run.series["memory_bytes"].values) == []
    assert len(run.series["loss"].values) == 20


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "options.json", "evaluations.json"])
def test_nothing_outside_of_the_folder_is_read(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", 20)
    (tmp_path / "secret").write_text('{"kind": "train", "step": 1, "loss": 123}\n')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        read_run(folder)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_run(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"{]\n", r"metrics.jsonl:\d+: not valid JSON"), (b'{"kind": "train"}\n', "has the step None")],
)
def test_a_line_that_no_run_writes_is_an_error(tmp_path: Path, line: bytes, message: str) -> None:
    folder = write_run(tmp_path / "run", 20)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(CheckpointError, match=message):
        read_run(folder)


def test_find_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 2, checkpoints=()) for name in ("a", "group/b", "group/deep/c")]
    write_run(tmp_path / "group/deep/too/deep", 2, checkpoints=())
    write_run(tmp_path / ".hidden", 2, checkpoints=())
    write_run(tmp_path / "a" / "inner", 2, checkpoints=())
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert find_runs(tmp_path) == sorted(runs)
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    assert find_runs(tmp_path / "nowhere") == []


def test_torch_is_not_imported() -> None:
    import subprocess
    import sys

    code = "import sys, gpt_kit_hf.storage.run_history; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
