"""Two real processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from foreign_models import write_model
from tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE = [
    "--model=modern-xs",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--max_position_embeddings=32",
    "--max_length=32",
]
COURSE = ["--encoding=bytes", "--batch_size=8", "--per_device_train_batch_size=3", "--max_steps=8", "--eval_steps=3"]
QUIET = [
    "--max_eval_samples=5",
    "--save_steps=4",
    "--sample_steps=0",
    "--report_to=none",
    "--use_cpu",
    "--mixed_precision=fp32",
]


def launch(
    processes: int,
    folder: Path,
    text: Path,
    *arguments: str,
    script: str = "examples/pretrain.py",
    environment: dict[str, str] | None = None,
    shape: list[str] = SHAPE,
) -> subprocess.CompletedProcess[str]:
    """Run a script under torchrun, on a free port of this machine alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [
        f"--nproc-per-node={processes}",
        script,
        f"--output_dir={folder}",
        f"--text_files={text}",
    ]
    return subprocess.run(
        [*command, *shape, *COURSE, *QUIET, *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return what is equal within rounding, whatever the speed."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] in ("train", "eval")]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 30)
    return file


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_train_on_the_same_batches_as_one(streaming: bool, tmp_path: Path, text: Path) -> None:
    source = []
    if streaming:
        held_out = tmp_path / "held-out.txt"
        held_out.write_text(text.read_text())
        text.write_text(text.read_text() * 100)  # long enough for two shards, a stream shard each
        source = ["--streaming=true", f"--eval_files={held_out}", "--shuffle_windows=16"]
    for processes in (1, 2):
        ended = launch(processes, tmp_path / f"by-{processes}", text, *source)
        assert ended.returncode == 0, ended.stderr
        assert f"{processes} process" in ended.stdout
        assert ended.stdout.count("metrics ") == 1  # one process speaks
    alone, shared = metrics(tmp_path / "by-1"), metrics(tmp_path / "by-2")
    assert len(alone) == len(shared) == 8 + 3
    for one, other in zip(alone, shared, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), key


@pytest.mark.slow
def test_two_processes_train_a_model_of_another_family_further_as_one(tmp_path: Path, text: Path) -> None:
    write_model("llama", tmp_path / "llama")
    for processes in (1, 2):
        # Its own tokenizer, under its name: the encoding is sent from one process to the other.
        base = [f"--model_name_or_path={tmp_path / 'llama'}", f"--encoding={tmp_path / 'llama'}", "--max_steps=3"]
        ended = launch(processes, tmp_path / f"by-{processes}", text, *base, shape=["--max_length=32"])
        assert ended.returncode == 0, ended.stderr
    alone, shared = metrics(tmp_path / "by-1"), metrics(tmp_path / "by-2")
    assert [line["step"] for line in alone if line["kind"] == "eval"] == [0, 3]
    for one, other in zip(alone, shared, strict=True):
        for key, value in one.items():
            assert other[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), key


@pytest.mark.slow  # the refusal itself is tested in one process
def test_batch_size_must_be_divisible_by_the_processes(tmp_path: Path, text: Path) -> None:
    ended = launch(2, tmp_path / "run", text, "--batch_size=9")
    assert ended.returncode != 0
    assert "error: batch_size=9 must be divisible by the number of processes, 2" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_resume_on_another_number_of_processes_keeps_the_batches(tmp_path: Path, text: Path) -> None:
    """In the middle of an epoch: none lost, none repeated."""
    course = ["--lr_scheduler_type=constant_with_warmup", "--resume"]
    ended = launch(1, tmp_path / "whole", text, *course)
    assert ended.returncode == 0, ended.stderr
    for processes, steps in ((1, 3), (2, 6), (1, 8)):
        ended = launch(
            processes, tmp_path / "moved", text, *course, f"--max_steps={steps}", "--allow_changes", "max_steps"
        )
        assert ended.returncode == 0, ended.stderr
    whole, moved = (
        [line for line in metrics(tmp_path / name) if line["kind"] == "train"] for name in ("whole", "moved")
    )
    assert [line["chain"] for line in moved] == [line["chain"] for line in whole]
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in whole], abs=1e-4)
    sessions = json.loads((tmp_path / "moved" / "run.json").read_text())["sessions"]
    assert [session["processes"] for session in sessions] == [1, 2, 1]
    assert "note     processes was 2, is 1: the same batches" in ended.stdout


@pytest.mark.slow
def test_two_processes_count_each_row_once(tmp_path: Path) -> None:
    """Each process reads all rows; the counts are those of the input, as with one process."""
    write_tiny_model(tmp_path / "base")
    rows = [{"prompt": "q", "completion": None if number % 3 else "a" * 8} for number in range(30)]
    rows += [{"prompt": "q" * 50, "completion": "a"}] * 5
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc-per-node=2", "examples/finetune_instructions.py", f"--output_dir={tmp_path / 'run'}"]
    command += [f"--model_name_or_path={tmp_path / 'base'}", f"--rows={tmp_path / 'rows.jsonl'}", "--batch_size=2"]
    command += ["--max_length=40", "--on_bad_row=skip", "--truncation=drop", "--max_steps=1", *QUIET]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("rows      35 read, 10 used, 20 skipped, 5 dropped\n") == 1
    assert ended.stdout.count("eval      1 rows\ntrain     9 rows\n") == 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    report = record["supervision"]
    assert (record["processes"], record["eval_rows"]) == (2, 1)
    assert [report[f"rows_{name}"] for name in ("read", "used", "trained", "eval")] == [35, 10, 9, 1]
