"""`gpt-kit runs` and `compare` on run folders that are written by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt_kit_hf.commands.main import main

DATA = {"eval_fingerprint": "e1", "data_fingerprint": "d1", "tokenizer_fingerprint": "t1"}


def write_run(
    folder: Path,
    steps: int,
    planned: int,
    *,
    loss: float | None,
    published: int | None = None,
    options: dict[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """Write a run of 10 tokens a step, with evaluations of 5 / step nats; `loss` is the result, None without one."""
    published = steps if published is None else published
    folder.mkdir(parents=True)
    chosen = {"training.output_dir": str(folder), "training.seed": 0, "optimizer.learning_rate": 1e-3}
    (folder / "options.json").write_text(json.dumps({**chosen, **(options or {})}))
    record: dict[str, Any] = {
        "steps": planned,
        "parameters": 1_350_400,
        **DATA,
        "versions": {"torch": "2.13.0"},
        **facts,
    }
    record.setdefault("sessions", [{"after_step": 0}])
    if loss is not None:
        record["results"] = {"loss": loss, "bits_per_byte": loss / 2, "steps": steps, "published_step": published}
    (folder / "run.json").write_text(json.dumps(record))
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({"kind": "train", "step": step, "loss": 6.0 / step, "grad_norm": 1.0, "trained_tokens": 10})
        if step % 10 == 0:
            speed = {"tokens_per_second": 1234.0, "seconds": 6.5 * step, "memory_bytes": 2_500_000_000}
            lines.append({"kind": "speed", "step": step, **speed})
            lines.append({"kind": "eval", "step": step, "loss": 5 / step, "bits_per_byte": 4 / step, "tokens": 9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The output of a command that succeeds: the cells of each line."""
    assert main(list(arguments)) == 0
    return [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in capsys.readouterr().out.splitlines()
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    write_run(runs / "done", 20, 20, loss=0.75)
    stopped = write_run(runs / "deeper" / "stopped", 30, 4000, loss=None)
    (stopped / "checkpoints" / "step-00000020").mkdir(parents=True)
    write_run(runs / "broken", 10, 50, loss=None, sessions=[{"after_step": 0, "error": "disk full\x1b[2J"}])
    live = write_run(runs / "live", 10, 50, loss=None)
    owner = {"host": "elsewhere", "pid": 1, "id": "x", "lease": 90.0}
    (live / "run.lock").write_text(json.dumps(owner))
    for number, name in enumerate(("deeper/stopped", "live", "broken", "done")):
        for file in ("metrics.jsonl", "run.json"):
            os.utime(runs / name / file, (1_700_000_000 + number,) * 2)
    return runs


def damage(run: Path) -> None:
    run.mkdir(parents=True)
    (run / "options.json").write_text("{}")
    (run / "run.json").write_text("{")


def test_runs_lists_states_steps_scores_and_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heading, *lines = said(capsys, "runs", str(folder))
    assert heading == ["RUN", "STATE", "STEPS", "EVAL LOSS", "BITS/BYTE", "PARAMETERS", "SIZE", "CHANGED"]
    rows = {line[0].removeprefix(f"{folder}/"): line[1:] for line in lines[:4]}
    assert {name: row[:5] for name, row in rows.items()} == {
        "broken": ["failed", "10/50", "0.5000", "0.4000", "1.35M"],
        "deeper/stopped": ["interrupted", "30/4,000", "0.1667", "0.1333", "1.35M"],
        "done": ["finished", "20/20", "0.7500", "0.3750", "1.35M"],
        "live": ["running", "10/50", "0.5000", "0.4000", "1.35M"],
    }
    for name, row in rows.items():
        size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        assert row[5] == f"{size / 1e6:.1f} MB"
        assert row[6].startswith("2023-11-1")
    notes = [" ".join(line) for line in lines[4:]]
    assert notes[0].startswith("Scores of runs that are not finished are those of their last evaluation")
    assert f"{folder}/broken failed: disk full\\x1b[2J" in notes
    assert f"{folder}/broken has no checkpoint and begins again with --resume and the options of before" in notes
    assert f"{folder}/deeper/stopped continues after step 20 with --resume and the options of before" in notes
    assert "stopped early" not in " ".join(notes)


def test_runs_that_cannot_be_read_are_named_after_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder / "torn")
    assert main(["runs", str(folder)]) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[1:5]] == [
        f"{folder}/{name}" for name in ("broken", "deeper/stopped", "done", "live")
    ]
    assert said.err.startswith(f"error: {folder}/torn cannot be read: ")
    assert said.err.count("\n") == 1
    assert main(["runs", str(folder / "torn")]) == 1
    assert capsys.readouterr().out == ""


def test_a_run_that_stopped_early_shows_its_plan_and_what_it_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "early", 50, 50, loss=0.75, published=30, planned_steps=4000)
    _, row, *notes = said(capsys, "runs", str(tmp_path))
    assert row[1:3] == ["finished", "50/4,000"]
    assert [" ".join(note) for note in notes] == [
        f"{run} stopped early, after step 50 of 4,000",
        f"{run} published the model of step 30",
    ]
    other = write_run(tmp_path / "other", 50, 50, loss=0.75)
    shown = {line[0]: line[1:] for line in said(capsys, "compare", str(run), str(other))[1:]}
    assert shown["published step, if not the last"] == ["30", "-"]


COMMAND = "import sys; from gpt_kit_hf.commands.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("arguments", [["runs"], ["compare"], ["--help"], ["runs", "--help"], ["--version"]])
@pytest.mark.parametrize("output", ["closed", "without a reader"])
def test_an_output_that_nobody_reads_ends_without_a_word(output: str, arguments: list[str], folder: Path) -> None:
    names = {("runs",): [str(folder)], ("compare",): [str(folder / "done"), str(folder / "live")]}
    command = [sys.executable, "-c", COMMAND, *arguments, *names.get(tuple(arguments), [])]
    if output == "closed":
        command = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command]
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=120)
    os.close(writing)
    expected = 141 if output == "without a reader" else 0
    assert (ended.stderr, ended.returncode) == (b"", expected)


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("date", ["deeper/stopped", "live", "broken", "done"]),
        ("loss", ["deeper/stopped", "broken", "live", "done"]),
        ("name", ["broken", "deeper/stopped", "done", "live"]),
    ],
)
def test_the_order_of_runs(order: str, names: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "runs", str(folder), "--sort", order)
    assert [line[0] for line in lines[1:5]] == [f"{folder}/{name}" for name in names]


def test_compare_shows_only_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", 20, 20, loss=0.75, options={"text.text_files": ["a.txt", "b.txt"]})
    two = write_run(
        tmp_path / "two", 10, 10, loss=1.5, options={"optimizer.learning_rate": 2e-3, "text.text_files": ["a.txt"]},
        data_fingerprint="d2", versions={"torch": "2.14.0"}, text_read={"documents_used": 3},
    )  # fmt: skip
    heading, *lines = said(capsys, "compare", str(one), str(two))
    assert heading == [str(one), str(two)]
    shown = {line[0]: line[1:] for line in lines if len(line) > 1}
    paths = [each if len(each) <= 40 else f"{each[:18]}...{each[-18:]}" for each in (str(one), str(two))]
    assert shown == {
        "steps": ["20", "10"],
        "trained tokens": ["200", "100"],
        "training loss, last step": ["0.3000", "0.6000"],
        "eval loss, all held-out data": ["0.7500", "1.5000"],
        "bits per byte": ["0.3750", "0.7500"],
        "time of training": ["2 min 10 s", "1 min 5 s"],
        "training.output_dir": paths,
        "optimizer.learning_rate": ["0.001", "0.002"],
        "text.text_files": ["a.txt b.txt", "a.txt"],
        "data_fingerprint": ["d1", "d2"],
        "text_read.documents_used": ["-", "3"],
        "torch": ["2.13.0", "2.14.0"],
    }
    assert [line[0] for line in lines if len(line) == 1] == ["RESULTS", "OPTIONS", "DATA AND MODEL", "VERSIONS"]
    everything = {line[0]: line[1:] for line in said(capsys, "compare", "--all", str(one), str(two))}
    assert everything["training.seed"] == ["0", "0"]
    assert everything["memory, most"] == ["2.50 GB", "2.50 GB"]
    assert everything.items() >= shown.items()


@pytest.mark.parametrize(
    ("facts", "caution"),
    [
        ({"eval_fingerprint": "e2"}, "The held-out data differ, or may"),
        ({"tokenizer_fingerprint": "t2"}, "The tokenizers differ: compare bits per byte"),
        ({}, None),
    ],
)
def test_compare_says_which_scores_cannot_be_compared(
    facts: dict[str, str], caution: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name, 10, 10, loss=1.0, **extra)) for name, extra in (("a", {}), ("b", facts))]
    last = " ".join(said(capsys, "compare", *runs)[-1])
    assert last.startswith(caution) if caution else "differ" not in last


def test_they_need_no_large_library(folder: Path) -> None:
    """And no module that a hand-written list of names could miss: the whole command, in a process of its own."""
    program = """
import sys
from gpt_kit_hf.commands.main import main
assert main(["runs", sys.argv[1]]) == 0
assert main(["compare", sys.argv[1] + "/done", sys.argv[1] + "/live"]) == 0
large = {"torch", "transformers", "datasets", "numpy", "accelerate", "rich", "huggingface_hub"} & sys.modules.keys()
assert not large, large
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
