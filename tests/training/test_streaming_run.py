"""Runs on streamed text: they train, and continue to the bit."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from programs import write_rotated
from test_pretrain import LINES, assert_same_run, killed_copy, options

from gpt_kit_hf import RunOptions, TextOptions, UsageError, train


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rotated(tmp_path_factory.mktemp("texts"), LINES, files=4, times=300)


def streamed(folder: Path, texts: Path, **changes: Any) -> RunOptions:
    asked = options(folder, "unused", **changes)
    text = TextOptions(
        text_files=[str(texts / "*.txt")],
        eval_files=[str(texts / "held.out")],
        streaming=True,
        shuffle_windows=8,
    )
    return replace(asked, text=text)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_run_resumes_to_the_bit(workers: int, texts: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    train(streamed(tmp_path / "whole", texts), stream=output)
    assert "a stream of" in output.getvalue()
    killed = killed_copy(tmp_path / "whole", tmp_path / "again", "step-00000008", "step-00000012")
    train(streamed(killed, texts, resume=True, dataloader_num_workers=workers), stream=None)
    assert_same_run(tmp_path / "whole", killed)


def test_streaming_needs_max_steps(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="streaming needs max_steps"):
        train(streamed(tmp_path / "run", texts, max_steps=None), stream=None)
    assert not (tmp_path / "run").exists()
