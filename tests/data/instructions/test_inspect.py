from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import gpt_kit

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import sys
from transformers import PreTrainedTokenizerFast
loaded_by_transformers = set(sys.modules)  # transformers 5.17 imports torch for its tokenizers
from gpt_kit_hf import DataError, RowOptions, SupervisionOptions, inspect_rows
try:
    report = inspect_rows(RowOptions(rows=[sys.argv[1]]), SupervisionOptions())
    print(report.rows_used, report.tokens_trained)
except DataError as error:
    print(error)
for name in ("torch", "datasets", "accelerate"):
    assert name not in sys.modules.keys() - loaded_by_transformers, name
"""
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
ALPACA = {"instruction": "Say so", "input": "", "output": "so"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [(CHAT, "1 3"), (ALPACA, "1 3"), ({"prompt": "a"}, "rows.jsonl:1: 'completion' is missing; its keys: 'prompt'")],
)
def test_inspect_without_a_model_imports_no_torch(row: object, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    command = [sys.executable, "-c", PROGRAM, str(file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().endswith(expected)


def test_without_a_model_it_is_said_that_bytes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ALPACA))
    ended = gpt_kit("inspect", tmp_path / "rows.jsonl")
    assert ended.stdout.startswith("note      each byte is a token; --model_name_or_path ")
