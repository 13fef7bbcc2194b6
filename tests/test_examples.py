"""The examples' configurations reach the numbers that they are there for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt_kit_hf import parse_run_options

ROOT = Path(__file__).resolve().parents[1]


def run_example(config: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Train by a configuration of the examples and return what the run recorded."""
    command = [sys.executable, "examples/train_gpt.py", "--config", f"examples/configs/{config}", "--output_dir"]
    ended = subprocess.run([*command, str(folder), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


@pytest.mark.parametrize("config", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_parses(config: Path) -> None:
    options = parse_run_options(["--config", str(config), "--text_files", "any.txt"])
    assert options.training.output_dir.startswith("runs/")


@pytest.mark.slow
def test_the_smallest_anchor_of_the_field(shared_data: Path, tmp_path: Path) -> None:
    """nanoGPT reports 1.88 nats a character for this shape, text and number of steps."""
    text = shared_data / "tinyshakespeare.txt"
    record = run_example("tinyshakespeare_bytes.yaml", tmp_path / "run", "--text_files", str(text))
    results = record["results"]
    assert results["tokens"] == record["held_out_tokens"] - 1
    assert results["loss"] <= 1.88


@pytest.mark.slow
def test_the_quickstart_predicts_python_better_than_gzip(tmp_path: Path) -> None:
    results = run_example("quickstart.yaml", tmp_path / "run")["results"]
    assert results["bits_per_byte"] < results["beside_bits_per_byte"]["gzip"]
