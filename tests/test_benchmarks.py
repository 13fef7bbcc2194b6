"""The programs in benchmarks/ import what exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
# Programs of these are imported only where they are installed.
OPTIONAL = {"llama_cpp", "lm_eval", "lightning", "trl", "peft"}


def test_every_program_is_imported() -> None:
    names = sorted(file.stem for file in FOLDER.glob("*.py"))
    script = f"""
import importlib, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(FOLDER)!r})
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in {OPTIONAL!r}:
            raise
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
