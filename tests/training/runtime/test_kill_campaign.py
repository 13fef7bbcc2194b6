"""The kill campaign in short: some kills of each kind; `python tests/support/kill_campaign.py` is the long form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def campaign(*arguments: str) -> str:
    """Run the program: a process that has computed nothing must do the forking."""
    ended = subprocess.run(
        [sys.executable, "tests/support/kill_campaign.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    return ended.stdout


def test_killed_runs_end_as_if_nobody_had_killed_them() -> None:
    said = campaign("--kills", "8", "--courses", "4")
    assert said.endswith(": 0 faults\n")
    assert said.count("identical") == 4


@pytest.mark.slow
def test_two_hundred_kills_change_nothing() -> None:
    said = campaign("--kills", "200")
    assert said.endswith(": 0 faults\n")
    assert said.count("identical") == 16
