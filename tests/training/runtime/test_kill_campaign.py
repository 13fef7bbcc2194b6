"""The kill campaign in short: some kills of each kind; `python tests/support/kill_campaign.py` is the long form."""

from __future__ import annotations

import pytest
from programs import run_program


def test_killed_runs_end_as_if_nobody_had_killed_them() -> None:
    said = run_program("kill_campaign", "--kills", "8", "--courses", "4")
    assert said.endswith(": 0 faults\n")
    assert said.count("identical") == 4


@pytest.mark.slow
def test_two_hundred_kills_change_nothing() -> None:
    said = run_program("kill_campaign", "--kills", "200")
    assert said.endswith(": 0 faults\n")
    assert said.count("identical") == 16
