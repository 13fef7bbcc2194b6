"""The study of the ingredients: its ladder of models, its file of results, and what it prints of them."""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch

from gpt_kit_hf.model.presets import build_config, create_model_config

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("vocabulary", [258, 4096])
@pytest.mark.parametrize("width", [64, 128])
def test_all_rungs_have_the_same_number_of_parameters(width: int, vocabulary: int) -> None:
    import ingredients
    import studies

    sizes = [
        studies.parameters(ingredients.rung_of(rung, width, vocabulary), vocabulary) for rung in ingredients.CHANGES
    ]
    assert max(sizes) < 1.01 * sizes[0]
    assert min(sizes) > 0.99 * sizes[0]


def test_the_ladder_leads_from_a_classic_preset_to_a_modern_one() -> None:
    import ingredients

    first, *_, last = (
        build_config(ingredients.rung_of(rung, 128, 50257), vocab_size=50257).to_dict() for rung in ingredients.CHANGES
    )
    free = {"max_position_embeddings", "n_inner", "bos_token_id", "eos_token_id"}
    for found, preset in ((first, "nano-xs"), (last, "modern-xs")):
        expected = create_model_config(preset).to_dict()
        assert {name: it for name, it in found.items() if name not in free} == {
            name: it for name, it in expected.items() if name not in free
        }


@pytest.mark.slow
def test_a_study_is_continued_and_its_table_is_that_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ingredients

    letters = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("".join(letters.choices("abcd \n", k=8000)))
    results, picture = tmp_path / "runs.jsonl", tmp_path / "picture.png"
    command = ["ingredients.py", str(text), "--corpora", "tinyshakespeare", "--widths", "16", "--steps", "2"]
    command += ["--rounds", "0", "--results", str(results), "--threads", str(torch.get_num_threads())]
    rungs = list(ingredients.CHANGES)[:2]
    for more in (["--seeds", "0"], ["--seeds", "0", "1", "--picture", str(picture)]):
        monkeypatch.setattr(sys, "argv", [*command, "--rungs", *rungs, *more])
        ingredients.main()
    runs = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(run["rung"], run["seed"]) for run in runs] == [(rung, seed) for seed in (0, 1) for rung in rungs]
    assert picture.stat().st_size > 0

    printed = capsys.readouterr().out
    losses = {rung: [run["loss"] for run in runs if run["rung"] == rung] for rung in rungs}
    for rung, both in losses.items():
        row = next(line for line in reversed(printed.splitlines()) if line.startswith(rung))
        assert f"  {statistics.mean(both):.4f}  {statistics.stdev(both):.4f}" in row
    plain, rotary = losses["GPT-2"], losses["+ rotary positions"]
    assert f"{statistics.mean(rotary) - statistics.mean(plain):+.4f}" in printed
