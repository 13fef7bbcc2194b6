"""The examples' configurations reach the numbers that they are there for."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from gpt_kit_hf import (
    GPTKitConfig,
    GPTKitForCausalLM,
    format_alpaca,
    generate_text_autoregressive,
    get_encoding,
    parse_finetune_options,
    parse_run_options,
    save_tokenizer,
)
from gpt_kit_hf.storage.atomic_files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def run_example(config: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Train by a configuration of the examples and return what the run recorded."""
    command = [sys.executable, "examples/pretrain.py", "--config", f"examples/configs/{config}", "--output_dir"]
    ended = subprocess.run([*command, str(folder), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_every_configuration_parses(config: Path) -> None:
    asked = ["--config", str(config)]
    tunes = "instructions" in config.stem
    options: Any = (
        parse_finetune_options([*asked, "--rows", "any.json"])
        if tunes
        else parse_run_options([*asked, "--text_files", "any.txt"])
    )
    assert options.training.output_dir.startswith("runs/")


@pytest.mark.slow
def test_the_smallest_anchor_of_the_field(shared_data: Path, tmp_path: Path) -> None:
    """nanoGPT reports 1.88 nats a character for this shape, text and number of steps."""
    text = shared_data / "tinyshakespeare.txt"
    record = run_example("tinyshakespeare_bytes.yaml", tmp_path / "run", "--text_files", str(text))
    results = record["results"]
    assert results["tokens"] == record["eval_tokens"] - 1
    assert results["loss"] <= 1.88


@pytest.mark.slow
def test_the_loop_that_is_written_out_learns(shared_data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((shared_data / "tinyshakespeare.txt").read_text()[:200_000])
    command = [sys.executable, "examples/train_gpt.py", str(text), str(tmp_path / "model"), "--max_steps", "150"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = re.search(r"eval loss (\d\.\d+) nats per token", ended.stdout)
    assert found is not None
    # 3.3 is the entropy of single bytes of this text; 500 steps on all of it reach 2.10.
    assert float(found[1]) < 2.6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer) == 257


@pytest.mark.slow
def test_the_classifier_tells_spam_from_other_messages(tmp_path: Path) -> None:
    """Messages of words that both kinds have and words that one has; always the same answer would be right in half."""
    rng, shared = random.Random(0), ["call", "now", "text", "you"]
    words = {"spam": ["free", "prize", "cash", "urgent", *shared], "ham": ["lunch", "home", "mum", "later", *shared]}
    rows = [f"{kind}\t{' '.join(rng.choices(words[kind], k=rng.randint(4, 8)))}" for kind in words for _ in range(250)]
    (tmp_path / "messages.tsv").write_text("\n".join([*rows, *rows[250:300]]) + "\n")  # more of one kind
    base = tmp_path / "base"
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "max_position_embeddings": 64, "eos_token_id": 256}
    GPTKitForCausalLM(GPTKitConfig(vocab_size=257, **shape)).save_pretrained(base)
    save_tokenizer(get_encoding("bytes"), base, model_max_length=64)
    command = [sys.executable, "examples/classify_spam.py", str(base), str(tmp_path / "messages.tsv")]
    command += [str(tmp_path / "spam"), "--learning_rate", "5e-3", "--num_train_epochs", "3"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    accuracies = dict(re.findall(r"(train|validation|test): ([\d.]+)% of \d+ messages", ended.stdout))
    assert float(accuracies["test"]) >= 90, ended.stdout
    assert "test: " + accuracies["test"] + "% of 100 messages" in ended.stdout  # 2 x 250, a fifth of them
    classify = pipeline("text-classification", model=str(tmp_path / "spam"), device="cpu")
    answers = classify(["free cash prize urgent", "mum home later lunch"], batch_size=2)
    assert [answer["label"] for answer in answers] == ["spam", "ham"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    run_example("quickstart.yaml", folder)
    return folder


@pytest.mark.slow
def test_the_quickstart_predicts_python_better_than_gzip(quickstart: Path) -> None:
    results = json.loads((quickstart / "run.json").read_text())["results"]
    assert results["bits_per_byte"] < results["beside_bits_per_byte"]["gzip -9"]


@pytest.mark.slow
def test_tuning_halves_the_loss_of_answers_and_ends_them(shared_data: Path, tmp_path: Path) -> None:
    """1,100 rows, split 85/10/5; the answers to the prompts of both held-out parts end within the limit.

    The base is the quickstart's model, trained for 6,000 steps: after its 1,500 there is less to build on.
    """
    base = tmp_path / "base"
    run_example("quickstart.yaml", base, "--max_steps", "6000", "--sample_steps", "0")
    rows = json.loads((shared_data / "instruction-data.json").read_text())
    order = np.random.default_rng(0).permutation(len(rows))
    files = {}
    for name, part in zip(("train", "eval", "test"), np.split(order, [935, 1045]), strict=True):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps([rows[index] for index in part], indent=0))
    command = [sys.executable, "examples/finetune_instructions.py"]
    command += ["--config", "examples/configs/instructions_small.yaml", "--model_name_or_path", str(base)]
    command += [
        "--rows",
        str(files["train"]),
        "--eval_rows",
        str(files["eval"]),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    scores = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert scores[0]["tokens"] == scores[-1]["tokens"]
    assert scores[-1]["loss"] <= 0.5 * scores[0]["loss"]
    held_out = [row for name in ("eval", "test") for row in json.loads(files[name].read_text())]
    assert share_of_ended_answers(tmp_path / "run", held_out, limit=128) > 0.9


def share_of_ended_answers(run: Path, rows: list[dict[str, str]], limit: int) -> float:
    """Answer each row's prompt greedily; return how many answers end by themselves."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    ended = 0
    for row in rows:
        ids = torch.tensor([tokenizer.encode(format_alpaca(row))[-limit:]])
        answer = generate_text_autoregressive(model, ids, limit, eos_token_id=tokenizer.eos_token_id)
        ended += int(answer[0, -1] == tokenizer.eos_token_id)
    return ended / len(rows)
