"""`gpt-kit evaluate`: one number wherever it is computed, on text and on rows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import (
    BaseOptions,
    DataError,
    EncodingOptions,
    FinetuneOptions,
    ModelOptions,
    RowOptions,
    RunOptions,
    RunResult,
    ScoreOptions,
    SupervisionOptions,
    TextOptions,
    TrainingOptions,
    UsageError,
    WindowOptions,
    card_facts,
    finetune,
    render_card,
    score_model,
    train,
)
from gpt_kit_hf.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = "\n".join(["Was ever woman in this humour wooed? Was ever woman in this humour won? Größe, ein Wort."] * 7)
ROWS = [{"prompt": f"Say {n} ", "completion": "yes " * (1 + n)} for n in range(8)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("scoring")
    (folder / "text.txt").write_text("Now is the winter of our discontent made glorious summer.\n" * 60)
    (folder / "held.txt").write_text(HELD_OUT)
    return train(
        RunOptions(
            training=TrainingOptions(
                output_dir=str(folder / "run"), max_steps=4, batch_size=2, report_to=["none"], use_cpu=True
            ),
            text=TextOptions(text_files=[str(folder / "text.txt")], eval_files=[str(folder / "held.txt")]),
            encoding=EncodingOptions(encoding="bpe", vocab_size=280),
            windows=WindowOptions(max_length=48),
            model=ModelOptions(n_layer=1, n_head=2, n_embd=16, max_position_embeddings=48, initializer_range=0.3),
        ),
        stream=None,
    )


@pytest.fixture(scope="module")
def held_out(trained: RunResult) -> str:
    return str(trained.folder.parent / "held.txt")


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_score_of_the_run_is_the_score_of_the_command(
    trained: RunResult, held_out: str, batch_size: int, padding_side: Any
) -> None:
    options = ScoreOptions(data=[held_out], batch_size=batch_size, padding_side=padding_side)
    scored = score_model(str(trained.folder), options).evaluation
    assert scored.tokens == trained.evaluation.tokens
    assert scored.text_bytes == trained.evaluation.text_bytes == len(HELD_OUT.encode())
    assert scored.loss == pytest.approx(trained.evaluation.loss, abs=1e-4)
    assert scored.bits_per_byte == pytest.approx(trained.evaluation.bits_per_byte, abs=1e-4)


_HARNESS = """
import json, sys
from gpt_kit_hf.evaluation.lm_eval import run_harness
reports = [run_harness(sys.argv[1], ["held_out"], include_path=sys.argv[2], batch_size=size) for size in (1, 4, 16)]
print(reports[0].text())
json.dump([r.results["results"]["held_out"]["bits_per_byte,none"] for r in reports], open(sys.argv[3], "w"))
"""


@pytest.mark.slow
def test_lm_evaluation_harness_gives_the_same_number(trained: RunResult, held_out: str, tmp_path: Path) -> None:
    """By its own classes and windows, in a process of its own, without a network, for each batch size."""
    pytest.importorskip("lm_eval.api.model", reason="lm-eval is not installed: pip install 'gpt-kit-hf[eval]'")
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": Path(held_out).read_text()}) + "\n")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = {
        "task": "held_out",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "held.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        "metadata": {"version": 1},
    }
    (tasks / "held_out.yaml").write_text(json.dumps(task))  # JSON is YAML
    ended = subprocess.run(
        [sys.executable, "-c", _HARNESS, str(trained.folder), str(tasks), str(tmp_path / "out.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "bits_per_byte" in ended.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == 3
    assert found == pytest.approx([trained.evaluation.bits_per_byte] * 3, abs=1e-4)


def test_a_smaller_stride_gives_more_context_and_the_score_by_hand(trained: RunResult, held_out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(HELD_OUT)["input_ids"]])
    total = 0.0
    with torch.no_grad():
        for target in range(1, len(ids)):  # stride 1: each token after as many as fit
            seen = ids[max(0, target - 48) : target]
            total -= model(seen[None]).logits[0, -1].log_softmax(-1)[ids[target]].item()
    report = score_model(str(trained.folder), ScoreOptions(data=[held_out], stride=1))
    assert report.evaluation.loss == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert report.stride == 1


def test_several_documents_are_read_alone(trained: RunResult, tmp_path: Path) -> None:
    texts = ["Was ever woman", "in this humour wooed?", "x"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    whole = score_model(
        str(trained.folder), ScoreOptions(data=[str(tmp_path / "lines.jsonl")], kind="text", text_column="body")
    )
    total, tokens = 0.0, 0
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
        one = score_model(str(trained.folder), ScoreOptions(data=[str(tmp_path / f"{number}.txt")])).evaluation
        total, tokens = total + one.loss * one.tokens, tokens + one.tokens
    assert whole.units == 3
    assert whole.evaluation.tokens == tokens
    assert whole.evaluation.loss == pytest.approx(total / tokens, abs=1e-5)


@pytest.fixture(scope="module")
def tuned(trained: RunResult) -> tuple[RunResult, Path]:
    folder = trained.folder.parent
    for name, rows in (("train", ROWS), ("held", ROWS[::-1])):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    result = finetune(
        FinetuneOptions(
            training=TrainingOptions(
                output_dir=str(folder / "tuned"), max_steps=2, batch_size=2, report_to=["none"], use_cpu=True
            ),
            base=BaseOptions(model_name_or_path=str(trained.folder), eval_rows=[str(folder / "held.json")]),
            rows=RowOptions(rows=[str(folder / "train.json")]),
            supervision=SupervisionOptions(max_length=48),
        ),
        stream=None,
    )
    return result, folder / "held.json"


def test_answers_score_as_at_the_end_of_the_run(tuned: tuple[RunResult, Path]) -> None:
    result, rows = tuned
    scored = score_model(str(result.folder), ScoreOptions(data=[str(rows)])).evaluation
    assert scored.tokens == result.evaluation.tokens > 0
    assert scored.loss == pytest.approx(result.evaluation.loss, abs=1e-5)


def test_answers_in_other_columns_and_tables_score_alike(tuned: tuple[RunResult, Path], tmp_path: Path) -> None:
    result, _ = tuned
    one = {"prompt": "Say yes.", "completion": "yes"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(one))
    (tmp_path / "ROWS.CSV").write_text("prompt,completion\nSay yes.,yes\n")
    (tmp_path / "named.jsonl").write_text(json.dumps({"q": "Say yes.", "a": "yes", "text": "other"}))
    asked = [("rows.jsonl", None), ("ROWS.CSV", None), ("named.jsonl", ["prompt=q,completion=a"])]
    scores = [
        score_model(str(result.folder), ScoreOptions(data=[str(tmp_path / name)], columns=columns))
        for name, columns in asked
    ]
    assert [score.kind for score in scores] == ["rows"] * 3
    assert [score.notes for score in scores] == [(), (), ("keys not read: text (1)",)]
    assert len({score.evaluation.loss for score in scores}) == len({score.data_fingerprint for score in scores}) == 1


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_score_as_by_hand(trained: RunResult, tmp_path: Path, batch_size: int, padding_side: Any) -> None:
    short = [{"prompt": f"{n} ", "completion": "yes " * (1 + n)} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    options = ScoreOptions(data=[str(tmp_path / "rows.jsonl")], batch_size=batch_size, padding_side=padding_side)
    report = score_model(str(trained.folder), options)
    assert (report.kind, report.units) == ("rows", 6)
    model = AutoModelForCausalLM.from_pretrained(trained.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    total, tokens = 0.0, 0
    for row in short:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        log_probs = model(ids).logits[0].log_softmax(-1)
        for place in range(len(prompt), ids.shape[1]):
            total -= log_probs[place - 1, ids[0, place]].item()
            tokens += 1
    assert report.evaluation.tokens == tokens
    assert report.evaluation.loss == pytest.approx(total / tokens, abs=1e-4)


def test_a_bad_first_row_does_not_make_rows_text(trained: RunResult, tmp_path: Path) -> None:
    for name in ("rows.csv", "rows.tsv"):
        cells = "café,x\nq,y\n" if name.endswith("csv") else "café\tx\nq\ty\n"
        header = "prompt,completion\n" if name.endswith("csv") else "prompt\tcompletion\n"
        (tmp_path / name).write_bytes((header + cells).encode("cp1252"))
        with pytest.raises(DataError, match=rf"{name}:2: not UTF-8 text .*--encoding_of_files cp1252"):
            score_model(str(trained.folder), ScoreOptions(data=[str(tmp_path / name)]))
        named = ScoreOptions(data=[str(tmp_path / name)], encoding_of_files="cp1252")
        assert score_model(str(trained.folder), named).units == 2


def test_the_score_is_kept_for_the_card_once(trained: RunResult, held_out: str) -> None:
    for _ in range(2):
        report = score_model(str(trained.folder), ScoreOptions(data=[held_out], samples=1, stride=24))
    kept = json.loads((trained.folder / "evaluations.json").read_text())["evaluations"]
    (entry,) = [each for each in kept if each["stride"] == 24]
    assert entry["name"] == "held.txt"  # no folder of this machine
    assert entry["loss"] == report.evaluation.loss
    assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
    assert len(report.samples) == 1
    assert "bits/byte" in report.text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": []}, UsageError, "data: name at least one file"),
        ({"kind": "txt"}, UsageError, "unknown kind 'txt'; did you mean 'text'"),
        ({"stride": 49}, UsageError, "stride must lie between 1 and max_length=48, got 49"),
        ({"max_length": 49}, UsageError, "max_length=49 is above the model's context length, 48: lower it"),
        ({"batch_size": 0}, UsageError, "batch_size must be at least 1, got 0"),
        ({"samples": -1}, UsageError, "samples must be at least 0, got -1"),
        ({"data": ["absent.txt"]}, DataError, "'absent.txt': no such file"),
        ({"device": "tpu9"}, UsageError, "unknown device 'tpu9'"),
    ],
)
def test_mistakes_are_named(trained: RunResult, held_out: str, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        score_model(str(trained.folder), ScoreOptions(**({"data": [held_out]} | options)))


def test_what_check_found_of_a_run_is_kept_for_its_card_too(trained: RunResult) -> None:
    assert main(["check", str(trained.folder), "--attention", "eager"]) == 0
    assert "## Invariance" in render_card(card_facts(trained.folder))


def test_rows_that_cannot_be_scored_are_left_out_on_request(trained: RunResult, tmp_path: Path) -> None:
    good = [{"prompt": f"{n} ", "completion": "yes"} for n in range(4)]
    bad = [{"prompt": "x" * n, "completion": answer} for n, answer in ((1, None), (200, "y"), (1, ""))]
    for name, rows in (("good", good), ("mixed", [bad[0], *good, *bad[1:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: [str(tmp_path / f"{name}.jsonl")] for name in ("good", "mixed")}
    with pytest.raises(DataError, match=r"mixed\.jsonl:1: 'completion' is null"):
        score_model(str(trained.folder), ScoreOptions(data=files["mixed"]))
    skipping = score_model(str(trained.folder), ScoreOptions(data=files["mixed"], on_bad_row="skip"))
    alone = score_model(str(trained.folder), ScoreOptions(data=files["good"]))
    assert (skipping.evaluation, skipping.data_fingerprint) == (alone.evaluation, alone.data_fingerprint)
    left_out = {"null": 1, "blank": 1, "longer than max_length": 1}
    assert skipping.to_dict()["reading"] == {"rows_read": 7, "rows_used": 4, "left_out": left_out}
    assert alone.to_dict()["reading"] == {"rows_read": 4, "rows_used": 4, "left_out": {}}
    reasons = "1 skipped: null; 1 skipped: blank; 1 dropped: longer than max_length"
    assert f"note        7 read, 4 used, 2 skipped, 1 dropped ({reasons})\n" in skipping.text()
    assert alone.notes == ()
