"""The picture of the loss: its smoothed line against fits by numpy, and what stands in the figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import TOKENS_PER_STEP, metric_lines, write_lines, write_run

from gpt_kit_hf.storage.run_history import read_run
from gpt_kit_hf.training.log.curve import draw_curve, smoothed


@pytest.mark.parametrize("length", [1, 2, 3, 10, 99, 400])
def test_the_smoothed_value_is_that_of_the_line_that_fits_the_window(length: int) -> None:
    values = np.random.default_rng(length).normal(size=length) + 100
    for place, value in enumerate(smoothed(values)):
        reach = min(max(1, round(length / 50)), place // 5)
        window = np.arange(place - reach, min(place + reach, length - 1) + 1)
        expected = np.polyval(np.polyfit(window - place, values[window], 1), 0) if len(window) > 1 else values[place]
        assert value == pytest.approx(expected, abs=1e-9)


def test_a_line_stays_a_line_up_to_its_end() -> None:
    line = 3 - 0.01 * np.arange(300)
    assert smoothed(line) == pytest.approx(line, abs=1e-9)
    assert len(smoothed([])) == 0


def test_the_smoothed_line_does_not_run_above_a_loss_that_falls_fast() -> None:
    steps = np.arange(1, 2001)
    loss = 1.5 + 4 / (1 + steps / 20)
    noise = np.random.default_rng(0).normal(scale=0.05, size=len(steps))
    assert np.abs(smoothed(loss) / loss - 1).max() < 0.005
    above = smoothed(loss + noise)[:200] - loss[:200]
    assert abs(above.mean()) < 0.01
    # What the picture must not do: a mean of the values so far, corrected for its start by its weights.
    keep = 0.5 ** (50 / len(steps))
    weights = keep ** np.arange(len(steps))
    trailing = np.convolve(loss, weights)[: len(steps)] / np.cumsum(weights)
    assert (trailing - loss)[:200].mean() > 0.2


def test_what_the_figure_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from gpt_kit_hf.training.log.curve import loss_figure

    folder = write_run(tmp_path / "mine", 200, checkpoints=(100,))
    record = json.loads((folder / "run.json").read_text())
    record["results"]["beside_bits_per_byte"] = {"gzip -9": 2.2, "byte unigram": 4.8}
    (folder / "run.json").write_text(json.dumps(record))
    write_lines(folder, [{"kind": "train", "step": 201, "loss": None, "skipped": "loss is nan"}])
    run = read_run(folder)
    figure = loss_figure(run)
    axes, above = figure.axes
    raw, smooth, scored, best, gzip = axes.lines
    losses = [line["loss"] for line in metric_lines(200) if line["kind"] == "train"]
    assert raw.get_xydata().tolist() == [[step, loss] for step, loss in enumerate(losses, 1)]
    assert smooth.get_ydata().tolist() == smoothed(losses).tolist()
    assert scored.get_ydata().tolist() == [line["loss"] for line in metric_lines(200) if line["kind"] == "eval"]
    assert best.get_xydata().tolist() == [list(run.best or ())]
    # 2.2 bits per byte, at 2.5 bytes per token, are in view as nats per token; the unigram's 4.8 are not.
    assert gzip.get_ydata() == pytest.approx([2.2 * math.log(2) * 2.5] * 2)
    assert axes.get_ylim()[1] < 4.8 * math.log(2) * 2.5
    assert [text.get_text() for text in axes.texts] == ["gzip -9: 2.20 bits per byte"]
    ticks = dict(zip((text.get_text() for text in above.get_xticklabels()), above.get_xticks(), strict=True))
    assert ticks["40k"] == pytest.approx(40_000 / TOKENS_PER_STEP)
    assert above.get_xlim() == axes.get_xlim()
    beside = axes.child_axes[0]
    assert beside.get_ylabel() == "bits per byte"


def test_a_run_without_steps_or_scores_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for steps in (0, 1, 3):
        folder = write_run(tmp_path / f"run{steps}", steps, planned=60, checkpoints=())
        assert draw_curve(read_run(folder), tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "run.json").read_text())["steps"] == 60
