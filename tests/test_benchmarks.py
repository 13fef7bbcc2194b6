"""The programs in benchmarks/ import what exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_every_program_is_imported() -> None:
    names = sorted(file.stem for file in FOLDER.glob("*.py"))
    script = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
