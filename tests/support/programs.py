"""Programs of tests/support that a test runs in a process of their own, and the texts that runs are given."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_program(name: str, *arguments: str) -> str:
    """Return what a program of this folder prints: a process that has computed nothing must do the forking."""
    ended = subprocess.run(
        [sys.executable, f"tests/support/{name}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    return ended.stdout


def write_rotated(folder: Path, lines: Sequence[str], *, files: int, times: int) -> Path:
    """Write the lines to text files, each beginning with another line, and once more to evaluate on."""
    for index in range(files):
        (folder / f"{index}.txt").write_text("".join([*lines[index:], *lines[:index]]) * times)
    (folder / "held.out").write_text("".join(lines) * 4)
    return folder
