"""Runs that are asked to stop: real processes, real signals, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED, StopSignals
from gpt_kit_hf.training.verify import verify_run

ROOT = Path(__file__).resolve().parents[3]
RUN = [
    "--n_layer=2", "--n_head=2", "--n_embd=32", "--max_position_embeddings=32", "--max_length=32", "--dropout=0.1",
    "--encoding=bytes", "--batch_size=4", "--max_eval_samples=5", "--sample_steps=0", "--report_to=none", "--use_cpu",
    "--mixed_precision=fp32", "--save_steps=100000", "--eval_steps=100000", "--resume",
    "--lr_scheduler_type=constant_with_warmup",
]  # fmt: skip
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2",
    ],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"],
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 30)
    return file


def begin(launcher: str, folder: Path, text: Path, steps: int) -> subprocess.Popen[str]:
    command = [*LAUNCHERS[launcher], "examples/pretrain.py", *RUN]
    command += [f"--output_dir={folder}", f"--text_files={text}", f"--max_steps={steps}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    # A shell starts what is in its background with SIGINT ignored, and the run would respect it.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, preexec_fn=heard, **streams)


def wait_for_steps(folder: Path, wanted: int, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        file = folder / "metrics.jsonl"
        if file.exists() and file.read_bytes().count(b"\n") >= wanted:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("the run did not begin")


def steps_of(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_saves_and_says_how_to_go_on(number: signal.Signals, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin("python", folder, text, 100_000)
    wait_for_steps(folder, 5, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_STOPPED
    assert f"stopped by {number.name} after step" in said
    assert "continue with --resume" in said
    assert "Traceback" not in said
    assert not (folder / "run.lock").exists()
    stopped = verify_run(folder)
    assert stopped.problems == []
    done = len(steps_of(folder))
    [checkpoint] = (folder / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{done:08d}"
    more = begin("python", folder, text, done + 3)
    refused = more.communicate(timeout=60)[1]
    assert more.returncode == 2
    assert "training.max_steps was 100000" in refused
    assert "--allow_changes max_steps" in refused


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_that_is_stopped_leaves_no_orphan(launcher: str, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin(launcher, folder, text, 100_000)
    wait_for_steps(folder, 5, process)
    owner = json.loads((folder / "run.lock").read_text())["pid"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    for _ in range(3000):
        if not (folder / "run.lock").exists():
            break
        time.sleep(0.02)
    assert not (folder / "run.lock").exists(), f"process {owner} goes on"
    assert verify_run(folder).problems == []
    [checkpoint] = (folder / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{len(steps_of(folder)):08d}"


def test_signals_are_noted_only_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # SIGINT may be ignored where tests run
    with StopSignals() as stop:
        with stop.stop_between_steps():
            assert not stop.asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked()
            assert stop.reason == "SIGTERM"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)  # asked for again, by a person
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_end_of_the_launcher_counts_as_a_signal() -> None:
    assert not StopSignals(os.getppid()).asked()
    assert StopSignals(os.getppid() + 1).asked()
