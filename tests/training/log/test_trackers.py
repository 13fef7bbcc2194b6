"""What trackers write, read back from their files."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing import event_accumulator

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.training.log import trackers
from gpt_kit_hf.training.log.trackers import Trackers

# Two sessions of a run: the second computes the last step of the first again.
PROGRAM = """
import sys
from accelerate import PartialState
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.training.log.trackers import Trackers

PartialState(cpu=True)
for done, steps in ((0, (1, 2)), (1, (2, 3))):
    options = TrainingOptions(output_dir=sys.argv[1], report_to=["trackio"], project="letters", run_name="a first run")
    written = Trackers(options, lambda line: print(line, flush=True), main=True)
    written.start("0123456789abcdef", {"training.seed": 7, "text.text_files": ["a.txt"], "model.n_inner": None}, done)
    for step in steps:
        written.log("train", step, {"loss": 1.0 / step})
    written.log("eval", steps[-1], {"bits_per_byte": 0.5})
    written.close()
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of trackio after PROGRAM, and what that printed."""
    folder = tmp_path_factory.mktemp("trackio")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO")}
    environment = {**kept, "TRACKIO_DIR": str(folder / "store"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / "mine")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "store", ended.stdout.splitlines()


def rows(store: Path, table: str) -> list[dict[str, Any]]:
    [file] = store.rglob("letters*.db")
    with closing(sqlite3.connect(file)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"select * from {table} order by id")]


def test_trackio_keeps_name_project_configuration_and_values_on_this_machine(store: tuple[Path, list[str]]) -> None:
    folder, said = store
    where = f"tracker  trackio: project letters, run a first run, on this machine, in {folder}; look at it by: "
    assert said == [f"{where}trackio show --project letters"] * 2
    written = rows(folder, "metrics")
    assert {row["run_name"] for row in written} == {"a first run"}
    assert len({row["run_id"] for row in written}) == 1  # the second session continues the run
    values = [(row["step"], json.loads(row["metrics"])) for row in written]
    assert [(step, each["train/loss"]) for step, each in values if "train/loss" in each] == [
        (1, 1.0), (2, 0.5), (2, 0.5), (3, 1.0 / 3.0),
    ]  # fmt: skip
    assert [(step, each["eval/bits_per_byte"]) for step, each in values if "eval/bits_per_byte" in each] == [
        (2, 0.5), (3, 0.5),
    ]  # fmt: skip
    configuration = json.loads(rows(folder, "configs")[0]["config"])
    expected = {"training.seed": 7, "text.text_files": '["a.txt"]', "model.n_inner": "null"}
    assert {name: configuration[name] for name in expected} == expected


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    PartialState(cpu=True)
    said: list[str] = []
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        options = TrainingOptions(output_dir=str(tmp_path / "mine"), report_to=["tensorboard"])
        written = Trackers(options, said.append, main=True)
        written.start("0123456789abcdef", {"training.seed": 7}, done)
        for step in steps:
            written.log("train", step, {"loss": 10.0 * (done + 1) + step})
        written.close()
    folder = tmp_path / "mine" / "tensorboard"
    assert said == [f"tracker  tensorboard: {folder}; look at it by: tensorboard --logdir {tmp_path / 'mine'}"] * 2
    read = event_accumulator.EventAccumulator(str(folder / "mine")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        (1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0),
    ]  # fmt: skip


class Failing:
    """A tracker whose `start` or `log` fails."""

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, 0

    def start(self) -> None:
        if self.where == "start":
            raise RuntimeError("no network")

    def store_init_configuration(self, values: object) -> None:
        pass

    def log(self, values: object, step: int) -> None:
        self.calls += 1
        if self.where == "log":
            raise sqlite3.OperationalError("database is locked")

    def finish(self) -> None:
        if self.where == "finish":
            raise OSError("disk full")


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing, said = Failing(where), []
    monkeypatch.setattr(trackers, "chosen_trackers", lambda names: ["aim"])
    monkeypatch.setattr(Trackers, "_tracker", lambda *arguments: failing)
    written = Trackers(TrainingOptions(output_dir=str(tmp_path)), said.append, main=True)
    if where == "start":
        with pytest.raises(UsageError, match="report_to 'aim' cannot be started: no network"):
            written.start("id", {}, 0)
        return
    written.start("id", {}, 0)
    for step in (1, 2):
        written.log("train", step, {"loss": 1.0})
    written.close()
    assert failing.calls == (1 if where == "log" else 2)
    reason = {
        "log": "the tracker aim is no longer updated: database is locked",
        "finish": "the tracker aim was not closed: disk full",
    }
    assert said[1:] == [reason[where]]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    PartialState(cpu=True)
    written = Trackers(TrainingOptions(output_dir=str(tmp_path), report_to=["tensorboard"]), print, main=False)
    written.start("id", {}, 0)
    written.log("train", 1, {"loss": 1.0})
    written.close()
    assert not list(tmp_path.iterdir())
