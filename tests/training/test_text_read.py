"""Runs on text of which some is bad: what was left out is on the console, in run.json and on the card."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_pretrain import options

from gpt_kit_hf import RunOptions, ScoreOptions, TextOptions, card_facts, render_card, score_model, train
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN

ROWS = [
    *({"text": f"row {number} of text that is good enough"} for number in range(30)),
    *({"text": None} for _ in range(7)),
    {"text": f"first half<end>\nsecond half with {EOS_TOKEN} in a line".replace("<end>", EOS_TOKEN)},
]


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path) -> None:
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "set" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:33]))


def run_options(folder: Path, name: str, *, dataset: bool, streaming: bool, **changes: Any) -> RunOptions:
    source: dict[str, Any] = {"dataset_name": str(folder / "set"), "dataset_test_split": "test"}
    if not dataset:
        source = {name: [str(folder / "set" / f"{split}.jsonl")] for name, split in FILES}
    text = TextOptions(**source, streaming=streaming, shuffle_windows=4, on_bad_text="skip", num_proc=2)
    return replace(options(folder / name, "unused", **{"max_steps": 2, "save_steps": 2, **changes}), text=text)


FILES = (("text_files", "train"), ("eval_files", "test"))


@pytest.mark.parametrize("dataset", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_was_left_out_is_on_the_console_in_the_record_and_on_the_card(
    tmp_path: Path, dataset: bool, streaming: bool
) -> None:
    write(tmp_path)
    output = io.StringIO()
    train(run_options(tmp_path, "run", dataset=dataset, streaming=streaming), stream=output)
    record = load_json(tmp_path / "run" / "run.json")
    assert record["eval_text_read"] == {
        "documents_read": 33,
        "documents_used": 30,
        "left_out": {"null": 3},
        "replaced_characters": {},
        "eos_in_text": {"ended_documents": 0, "read_as_text": 0},
    }
    read = record["text_read"]
    assert read["documents_read"] == read["documents_used"] + sum(read["left_out"].values())
    shown, card = output.getvalue(), render_card(card_facts(tmp_path / "run"))
    assert "left out 3 of 33 documents of the eval text: 3 null" in shown
    assert "| documents left out, of the eval text: `null` | 3 |" in card
    if not streaming:
        assert (read["documents_read"], read["left_out"]) == (39, {"null": 7})
        assert read["eos_in_text"] == {"ended_documents": 1, "read_as_text": 1}
        assert "left out 7 of 39 documents of the text: 7 null" in shown
        assert f"eos      {EOS_TOKEN} in the text: 1 at line ends" in shown
        assert "| documents left out: `null` | 7 |" in card
        assert "lengths  tokens per document: min" in shown
    else:
        # A stream is endless: 7 of 39 documents of each pass are left out, of the last one perhaps fewer.
        passes, rest = divmod(read["documents_read"], 39)
        expected = 7 * passes + max(0, min(7, rest - 30))
        assert read["left_out"] == ({"null": expected} if expected else {})
        assert "lengths  tokens per document, of" in shown
    assert "shown    " in shown


def test_the_counts_of_a_stream_are_the_same_after_a_resumption(tmp_path: Path) -> None:
    write(tmp_path)
    train(run_options(tmp_path, "whole", dataset=False, streaming=True, max_steps=6, save_steps=3), stream=None)
    train(run_options(tmp_path, "parts", dataset=False, streaming=True, max_steps=3, save_steps=3), stream=None)
    more = {"max_steps": 6, "save_steps": 3, "resume": True, "allow_changes": ["max_steps"]}
    train(run_options(tmp_path, "parts", dataset=False, streaming=True, **more), stream=None)
    whole, parts = (load_json(tmp_path / name / "run.json")["text_read"] for name in ("whole", "parts"))
    assert whole == parts
    assert whole["left_out"]["null"] >= 7


def test_a_score_counts_the_documents_that_training_would_read(tmp_path: Path) -> None:
    write(tmp_path)
    train(run_options(tmp_path, "run", dataset=False, streaming=False), stream=None)
    data = [str(tmp_path / "set" / "train.jsonl")]
    report = score_model(str(tmp_path / "run"), ScoreOptions(data=data, on_bad_text="skip"))
    assert report.units == 32
    assert report.to_dict()["reading"]["left_out"] == {"null": 7}
    assert "note        left out 7 of 39 documents of the text: 7 null" in report.text()
    kept = score_model(str(tmp_path / "run"), ScoreOptions(data=data, on_bad_text="skip", eos_in_text="keep"))
    assert kept.units == 31
    assert kept.evaluation.text_bytes == report.evaluation.text_bytes + len(f"{EOS_TOKEN}\n")
