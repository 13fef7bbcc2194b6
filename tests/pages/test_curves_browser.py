"""Watch and report in Chromium: what is drawn equals metrics.jsonl and plain forward passes; text stays text."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, Page
from run_folders import metric_lines, write_lines, write_run
from starlette.types import ASGIApp
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM

from gpt_kit_hf.pages import watch
from gpt_kit_hf.pages.report import write_report
from gpt_kit_hf.pages.watch import watch_app
from gpt_kit_hf.storage.atomic_files import cut_jsonl

ATTACK = "</script><script>window.attacked=1</script><img src=x onerror=window.attacked=1>"


def hover(page: Page, chart: str, part: float) -> list[str]:
    """Point at a chart, at a part of its width; return the lines of its tip."""
    box = page.js(
        f"(e => {{ e.scrollIntoView(); const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }})"
        f"(document.querySelector('{chart} svg'))"
    )
    x, y, width, height = box
    place = x + 58 + part * (width - 58 - 14)
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=place, y=y + height / 2)
    page.wait(f"!document.querySelector('{chart} .chart-tip').hidden")
    return page.texts(f"{chart} .chart-tip > div")


def wait_for_steps(page: Page, shown: str) -> None:
    """Let the page ask for news now, as when it is looked at again, and wait until it shows these steps."""
    page.js("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait(f"document.querySelector('#run-rows td:nth-child(3)').textContent === '{shown}'", 30)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watch, "_LOOK_AGAIN", -1.0)
    write_run(tmp_path / "runs" / "first", 100, options={"optimizer.learning_rate": 0.5})
    other = write_run(tmp_path / "runs" / f"second{ATTACK.replace('/', '')}", 60, planned=200)
    write_lines(other, [{"kind": "sample", "step": 60, "prompt": ATTACK, "text": ATTACK + " after"}])
    return tmp_path / "runs"


def test_watch_shows_the_numbers_of_the_runs(runs: Path, chromium: Browser, served: Callable[[ASGIApp], str]) -> None:
    url = served(watch_app([runs]))
    with chromium.page() as page:
        page.open(url)
        page.wait("document.querySelectorAll('#run-rows tr').length === 2 && document.querySelector('.chart-line')")
        losses = {line["step"]: line["loss"] for line in metric_lines(100) if line["kind"] == "train"}
        scores = [line for line in metric_lines(100) if line["kind"] == "eval"]
        rows = page.texts("#run-rows tr:first-child td")
        assert rows[2:6] == ["100 / 100", "51.2k", f"{losses[100]:.4f}", f"{scores[-1]['loss']:.4f}"]
        page.choose("#smoothing", "0")
        tip = hover(page, "#loss", 1.0)
        assert tip[0].startswith(f"first{losses[100]:.4g}".rstrip("0"))
        # The drawn line: from pixels back to values, by the labels of the axis.
        drawn = page.js(
            "(() => { const at = [...document.querySelectorAll('#loss .chart-tick[dy]')];"
            " const line = document.querySelector('#loss .chart-line').getAttribute('d');"
            " return [at.map(t => [Number(t.getAttribute('y')), Number(t.textContent)]), line]; })()"
        )
        (y1, v1), (y2, v2) = drawn[0][0], drawn[0][-1]
        heights = [float(point.split(",")[1]) for point in drawn[1][1:].split("L")]
        values = [v1 + (height - y1) * (v2 - v1) / (y2 - y1) for height in heights]
        assert values == pytest.approx(list(losses.values()), abs=0.02)
        assert page.texts("#option-rows td:first-child") == ["optimizer.learning_rate"]
        assert page.texts("#samples .sample:last-child pre") == [ATTACK + " after"]
        assert page.js("window.attacked === undefined && document.querySelectorAll('img').length === 0")
        assert page.problems == []
        assert all(request.startswith(url) for request in page.requests)


def test_watch_follows_a_run_that_grows_and_is_resumed(
    runs: Path, chromium: Browser, served: Callable[[ASGIApp], str]
) -> None:
    later = runs.parent / "later"
    with chromium.page() as page:
        page.open(served(watch_app([later])))
        page.wait("document.querySelector('#waiting').textContent.includes('no run has begun there yet')")
        write_run(later, 10, planned=100, checkpoints=())
        wait_for_steps(page, "10 / 100")
        write_lines(later, metric_lines(50, first=11))
        wait_for_steps(page, "50 / 100")
        cut_jsonl(later / "metrics.jsonl", lambda line: line["step"] <= 30)
        wait_for_steps(page, "30 / 100")
        assert page.problems == []


def test_smoothing_in_the_page_is_that_of_the_picture(
    runs: Path, chromium: Browser, served: Callable[[ASGIApp], str]
) -> None:
    from gpt_kit_hf.training.log.curve import smoothed

    values = np.random.default_rng(0).normal(size=500) + 100
    with chromium.page() as page:
        page.open(served(watch_app([runs])))
        rows = json.dumps({"value": values.tolist(), "count": [1] * len(values)})
        assert page.js(f"Curves.smoothed({rows}, 1 / 50)") == pytest.approx(smoothed(values).tolist(), abs=1e-9)
        # Rows that stand for several values: a line stays a line.
        rows = json.dumps({"value": [0.5, 2, 3, 4.5, 6.5, 9.5], "count": [2, 1, 1, 2, 2, 4]})
        assert page.js(f"Curves.smoothed({rows}, 1)") == pytest.approx([0.5, 2, 3, 4.5, 6.5, 9.5], abs=1e-9)


def test_the_report_opens_from_the_disk(tmp_path: Path, chromium: Browser) -> None:
    folder = write_run(tmp_path / "mine", 40)
    write_tiny_model(folder)
    write_lines(folder, [{"kind": "sample", "step": 41, "prompt": "", "text": ATTACK}])
    text = f"A text with {ATTACK} in it.\n" * 2
    (tmp_path / "text.txt").write_text(text)
    named: dict[str, Any] = {"text_files": [str(tmp_path / "text.txt")], "tokens": 10**6, "device": "cpu"}
    write_report(folder, tmp_path / "report.html", **named, announce=lambda line: None)
    shutil.rmtree(folder / "checkpoints")
    with chromium.page() as page:
        page.open(f"file://{tmp_path / 'report.html'}")
        page.wait("document.querySelectorAll('.chart-line').length > 3")
        losses = [line["loss"] for line in metric_lines(40) if line["kind"] == "train"]
        page.choose("#smoothing", "0")
        assert hover(page, "#loss", 1.0)[1].startswith(f"mine{losses[-1]:.4g}".rstrip("0"))
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        shown = [float(value) for value in page.data(".tokens .passage:first-child span[data-logprob]", "logprob")]
        ids = [256, *text.encode()][: len(shown) + 1]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        expected = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
        assert shown == pytest.approx(expected, abs=1e-5)
        levels = page.js(
            "[...document.querySelectorAll('.passage:first-child span[data-logprob]')].map(e => e.className)"
        )
        assert levels == [f"s{min(8, math.floor(-value))}" for value in expected]
        assert page.js("window.attacked === undefined && document.querySelectorAll('img').length === 0")
        assert ATTACK in page.js("document.querySelector('#samples').textContent")
        assert page.requests == [f"file://{tmp_path / 'report.html'}"]
        assert page.problems == []
