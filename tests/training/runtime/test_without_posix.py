"""Training where Python offers what it does on Windows: a stand-in, as the tests run on Linux."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_campaign import Course, differences, write_texts
from kill_campaign import options as campaign_options

from gpt_kit_hf import RunOptions, train
from gpt_kit_hf.data.text.tokens.stored_arrays import StoredIds
from gpt_kit_hf.storage import processes
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.training.steps import Steps


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what Windows lacks: flock, pread, open folders, flushing files that are open for reading, /proc."""
    open_, fsync = os.open, os.fsync

    def open_no_folder(path: Any, *arguments: Any, **options: Any) -> int:
        if os.path.isdir(path):  # noqa: PTH112
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *arguments, **options)

    def fsync_if_writable(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(descriptor)

    for name in ("pread", "O_DIRECTORY", "fork", "sched_getaffinity", "register_at_fork"):
        monkeypatch.delattr(os, name)
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(os, "fsync", fsync_if_writable)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(processes, "_machine", lambda: "")
    monkeypatch.setattr(processes, "_started", lambda pid: "")


def options(folder: Path, texts: Path) -> RunOptions:
    made = campaign_options(Course(processes=1, workers=0, accumulation=2, stream=False), folder, texts)
    return replace(made, training=replace(made.training, max_steps=6))


def test_a_run_trains_stops_and_resumes(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path)
    train(options(tmp_path / "whole", tmp_path), stream=None)
    request.getfixturevalue("windows")
    take = Steps.take

    def stop_before_step_4(self: Steps) -> Any:
        if self.step == 3:
            monkeypatch.setattr(Steps, "take", take)
            raise KeyboardInterrupt
        return take(self)

    monkeypatch.setattr(Steps, "take", stop_before_step_4)
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path / "run", tmp_path), stream=None)
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    train(options(tmp_path / "run", tmp_path), stream=None)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.usefixtures("windows")
def test_threads_read_at_once(tmp_path: Path) -> None:
    values = np.arange(200_000, dtype=np.uint32)
    values.tofile(tmp_path / "values")
    stored = StoredIds(str(tmp_path / "values"), 0, values.size, values.dtype)

    def read(seed: int) -> bool:
        places = np.random.default_rng(seed).integers(0, values.size - 1000, 500)
        return all(np.array_equal(stored[at : at + 1000], values[at : at + 1000]) for at in places)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
