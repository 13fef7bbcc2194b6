"""A model of any family that is trained further on text: the steps of a loop by hand, and what the run records."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import gpt_kit
from foreign_models import CONTEXT, TEXT, write_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_pretrain import assert_same_run, killed_copy, update_lines
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import (
    EncodingOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    UsageError,
    WindowOptions,
    get_encoding,
    save_tokenizer,
    train,
)
from gpt_kit_hf.data.order import ShuffledOrder
from gpt_kit_hf.hub.card.card import card_facts, render_card
from gpt_kit_hf.storage.atomic_files import read_jsonl
from gpt_kit_hf.training.replay import replay_steps
from gpt_kit_hf.training.verify import verify_run

KINDS = ["kit", "gpt2", "llama", "qwen"]
LENGTH, BATCH, RATE, WARMUP = 16, 4, 5e-3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, a text to train on, and one to evaluate on."""
    place = tmp_path_factory.mktemp("further")
    write_tiny_model(place / "kit", context=CONTEXT)
    for kind in KINDS[1:]:
        write_model(kind, place / kind)
    (place / "text.txt").write_text(TEXT)
    (place / "held.txt").write_text(TEXT[1000:1600])
    return place


def options(folder: Path, base: Path | str, run: Path, *, length: int | None = LENGTH, **changes: Any) -> RunOptions:
    """Options of a run of 6 tiny steps in two micro-batches."""
    training = {
        "output_dir": str(run), "batch_size": BATCH, "per_device_train_batch_size": 2, "max_steps": 6,
        "eval_steps": 3, "save_steps": 2, "save_total_limit": 9, "logging_steps": 2, "sample_steps": 3,
        "sample_prompt": "The", "sample_max_new_tokens": 8, "use_cpu": True, "mixed_precision": "fp32",
        "report_to": ["none"],
    }  # fmt: skip
    return RunOptions(
        training=TrainingOptions(**{**training, **{n: v for n, v in changes.items() if n in TRAINING}}),
        text=TextOptions(text_files=[str(folder / "text.txt")], eval_files=[str(folder / "held.txt")]),
        encoding=EncodingOptions(encoding=changes.get("encoding", "bpe")),
        windows=WindowOptions(max_length=length, packing=changes.get("packing", False)),
        model=ModelOptions(model_name_or_path=str(base), dropout=changes.get("dropout")),
        optimizer=OptimizerOptions(
            learning_rate=RATE, warmup_steps=WARMUP, optimizer=changes.get("optimizer", "adamw")
        ),
    )


TRAINING = {"resume", "max_steps", "mixed_precision", "gradient_checkpointing"}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, tuple[Path, str]]:
    """A run of each family, and what it output."""
    found = {}
    for kind in KINDS:
        output = io.StringIO()
        # The family's own dropout is 0, but GPT-2's.
        chosen = options(folder, folder / kind, folder / "runs" / kind, dropout=0.0 if kind == "gpt2" else None)
        train(chosen, stream=output)
        found[kind] = (folder / "runs" / kind, output.getvalue())
    return found


def by_hand(base: Path, text: str, steps: int) -> list[float]:
    """Losses of the steps: transformers' tokenizer, model and loss, and torch's optimizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.eval()  # no dropout
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), eps=1e-8)
    regular = (len(ids) - 1) // LENGTH
    order = ShuffledOrder(samples=regular + ((len(ids) - 1) % LENGTH > 0), seed=0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step + 1) / WARMUP
        total, count = torch.zeros(()), 0
        for number in order.ids(np.arange(step * BATCH, (step + 1) * BATCH)).tolist():
            # The last window ends with the text, and trains what no other one does.
            start = min(number * LENGTH, len(ids) - 1 - LENGTH)
            labels = ids[start : start + LENGTH + 1].clone()
            labels[: number * LENGTH - start + 1] = -100
            trained = int((labels[1:] != -100).sum())
            total = total + model(ids[None, start : start + LENGTH + 1], labels=labels[None]).loss * trained
            count += trained
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item() / count)
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_a_loop_by_hand(kind: str, folder: Path, runs: dict[str, tuple[Path, str]]) -> None:
    lines = update_lines(runs[kind][0])
    assert [line["loss"] for line in lines[:WARMUP]] == pytest.approx(by_hand(folder / kind, TEXT, WARMUP), rel=2e-5)
    assert len(lines) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_before_the_first_step_is_that_of_the_base(
    kind: str, folder: Path, runs: dict[str, tuple[Path, str]]
) -> None:
    run, output = runs[kind]
    asked = ["--max_length", LENGTH, "--output_json", folder / f"{kind}.json"]
    ended = gpt_kit("evaluate", folder / kind, folder / "held.txt", *asked)
    assert ended.exit_code == 0, ended.stderr
    scored = json.loads((folder / f"{kind}.json").read_text())
    first, *others = (line for line in read_jsonl(run / "metrics.jsonl") if line["kind"] == "eval")
    assert (first["step"], [line["step"] for line in others]) == (0, [3, 6])
    assert first["loss"] == pytest.approx(scored["loss"], rel=1e-6)
    assert first["bits_per_byte"] == pytest.approx(scored["bits_per_byte"], rel=1e-6)
    assert f"step 0  eval loss {first['loss']:.3f}" in output
    assert f"it was {first['loss']:.4f} before training" in output
    # The trained model loads and scores as the run says.
    ended = gpt_kit("evaluate", run, folder / "held.txt", *asked)
    assert json.loads((folder / f"{kind}.json").read_text())["loss"] == pytest.approx(others[-1]["loss"], rel=1e-6)
    assert others[-1]["loss"] < first["loss"]


def test_a_document_is_scored_after_the_token_that_its_tokenizer_begins_texts_with(folder: Path) -> None:
    text = TEXT[1000:1040]
    (folder / "short.txt").write_text(text)
    gpt_kit("evaluate", folder / "llama", folder / "short.txt", "--output_json", folder / "short.json")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids[0, 0] == tokenizer.bos_token_id
    loss = AutoModelForCausalLM.from_pretrained(folder / "llama")(ids, labels=ids).loss
    scored = json.loads((folder / "short.json").read_text())
    assert (scored["tokens"], scored["loss"]) == (ids.shape[1] - 1, pytest.approx(loss.item(), rel=1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_run_resumes_to_the_bit_without_its_base(
    kind: str, folder: Path, runs: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    run = killed_copy(runs[kind][0], tmp_path / "run", "step-00000006", "step-00000004")
    away = (folder / kind).rename(tmp_path / "base")
    try:
        chosen = options(folder, folder / kind, run, resume=True, dropout=0.0 if kind == "gpt2" else None)
        train(chosen, stream=None)
    finally:
        away.rename(folder / kind)
    assert_same_run(runs[kind][0], run)
    record, whole = (json.loads((each / "run.json").read_text()) for each in (run, runs[kind][0]))
    assert record["base_digest"] == whole["base_digest"] is not None


@pytest.mark.parametrize("kind", ["kit", "llama"])
def test_verify_and_replay(kind: str, runs: dict[str, tuple[Path, str]]) -> None:
    assert verify_run(runs[kind][0]).problems == []
    for steps in ((1, 2), (5, 6)):
        assert replay_steps(runs[kind][0], *steps, log=lambda line: None).text().endswith("identical")


def test_record_and_card_name_the_base(folder: Path, runs: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    run, output = runs["qwen"]
    size = AutoModelForCausalLM.from_pretrained(folder / "qwen").num_parameters()
    assert f"qwen: {size / 1000:.1f}k parameters, 2 layers, 2 heads, 32 wide, trained further" in output
    record = json.loads((run / "run.json").read_text())
    assert (record["base_model"], record["base_commit"], record["max_length"]) == (str(folder / "qwen"), None, LENGTH)
    card = render_card(card_facts(run))
    summary = f"`qwen` (weights `{record['base_digest']}`) trained further (continued pretraining) on `text.txt`"
    assert summary in card
    assert "Before the first step the held-out text scored" in card
    assert "--model_name_or_path qwen" in card
    data = ModelCard(card).data
    assert data.tags == ["gpt-kit-hf", "continued-pretraining"]
    assert data.base_model is None  # a folder is no model of the Hub
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    stored = json.loads((copy / "options.json").read_text())
    of_hub = {"model.model_name_or_path": "owner/base"}
    commit = {"base_model": "owner/base", "base_commit": "0123456789abcdef0123456789abcdef01234567"}
    (copy / "options.json").write_text(json.dumps({**stored, **of_hub}))
    (copy / "run.json").write_text(json.dumps({**record, **commit, "options": {**record["options"], **of_hub}}))
    card = render_card(card_facts(copy))
    assert ModelCard(card).data.base_model == "owner/base"
    assert f"[owner/base](https://huggingface.co/owner/base) at commit `{commit['base_commit']}`" in card


def test_max_length_is_by_default_what_the_model_allows(folder: Path, tmp_path: Path) -> None:
    base = folder / "gpt2"
    train(options(folder, base, tmp_path / "run", length=None, max_steps=1), stream=None)
    assert json.loads((tmp_path / "run/run.json").read_text())["max_length"] == CONTEXT
    with pytest.raises(UsageError, match="max_length=65 is above the model's context, max_position_embeddings=64"):
        train(options(folder, base, tmp_path / "other", length=65), stream=None)
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("gpt2_encoding")
def test_token_files_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    """Its ids may all be in the model's vocabulary."""
    np.arange(2, 202, dtype=np.uint16).tofile(tmp_path / "a.ds")
    np.array([200], np.uint64).tofile(tmp_path / "a.ds.index")
    (tmp_path / "a.ds.metadata").write_text("gpt2|2\n200")
    chosen = options(folder, folder / "gpt2", tmp_path / "run")
    chosen = dataclasses.replace(chosen, text=TextOptions(token_files=[str(tmp_path / "a.ds")]))
    with pytest.raises(UsageError, match=r"that of '.*gpt2' is not the tokenizer that token_files were made with"):
        train(chosen, stream=None)
    assert not (tmp_path / "run").exists()


def test_an_encoding_that_is_not_the_model_s_is_refused(folder: Path, tmp_path: Path) -> None:
    for kind in ("gpt2", "llama"):
        run = tmp_path / kind
        with pytest.raises(UsageError, match="encoding='bytes' is not the tokenizer of model_name_or_path="):
            train(options(folder, folder / kind, run, encoding="bytes"), stream=None)
        assert not run.exists()
        # The same one may be named.
        train(options(folder, folder / kind, run, encoding=str(folder / kind), max_steps=1), stream=None)
    broken = Path(shutil.copytree(folder / "kit", tmp_path / "broken"))
    save_tokenizer(get_encoding(str(folder / "gpt2")), broken)
    with pytest.raises(UsageError, match="has embeddings for 257 ids, and its tokenizer"):
        train(options(folder, broken, tmp_path / "run"), stream=None)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"packing": True, "optimizer": "muon"}),
        ("llama", {"packing": True, "gradient_checkpointing": True, "mixed_precision": "bf16"}),
        ("qwen", {"optimizer": "muon", "mixed_precision": "fp16"}),
    ],
)
def test_packing_muon_precision_and_checkpointing(
    kind: str, changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    train(options(folder, folder / kind, tmp_path / "run", max_steps=3, **changes), stream=None)
    before, after = (load_file(place / "model.safetensors") for place in (folder / kind, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if before[name].dim() > 1)


def test_a_run_is_trained_further_from_its_newest_model(folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train(options(folder, folder / "kit", first, max_steps=4), stream=None)
    shutil.rmtree(first / "checkpoints/step-00000004")
    for file in first.glob("*.json*"):  # as it was when step 2 was saved
        file.unlink()
    train(options(folder, first, tmp_path / "second", max_steps=1), stream=None)
    [score, _] = (line for line in read_jsonl(tmp_path / "second/metrics.jsonl") if line["kind"] == "eval")
    gpt_kit("evaluate", first / "checkpoints/step-00000002", folder / "held.txt", "--max_length", LENGTH,
            "--output_json", tmp_path / "score.json")  # fmt: skip
    assert score["loss"] == pytest.approx(json.loads((tmp_path / "score.json").read_text())["loss"], rel=1e-6)
    with pytest.raises(UsageError, match=r"output_dir=.* is the model to train further: name another folder"):
        options(folder, first, first)


def test_the_command_refuses_a_length_before_loading_and_resumes_without_the_base(
    folder: Path, runs: dict[str, tuple[Path, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(folder / "gpt2", tmp_path / "base"))
    given = ["--text_files", folder / "text.txt", "--model_name_or_path", base, "--output_dir", tmp_path / "run"]
    given += ["--max_steps", 1, "--batch_size", 2, "--sample_steps", 0, "--report_to", "none", "--use_cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("gpt_kit_hf.commands.train.train", lambda options: pytest.fail("torch would be imported"))
        ended = gpt_kit("train", *given, "--max_length", 65)
    assert ended.stderr.startswith("error: max_length=65 is above the context of ")
    assert gpt_kit("train", *given, "--max_length", 16).exit_code == 0
    shutil.rmtree(base)
    more = ["--max_length", 16, "--max_steps", 2, "--resume", "--allow_changes", "max_steps"]
    ended = gpt_kit("train", *given, *more)
    assert ended.exit_code == 0, ended.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["results"]["steps"] == 2
    # A new run needs it.
    ended = gpt_kit("train", *given[:4], "--output_dir", tmp_path / "other")
    assert (ended.exit_code, "no such folder" in ended.stderr) == (2, True)


def test_dropout_of_a_model_with_other_names_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^dropout=0\.1: '.*llama' is a llama of transformers, which has no dropout of"
    ):
        train(options(folder, folder / "llama", tmp_path / "run", dropout=0.1), stream=None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--model nano-s", "model=nano-s is for a new model, and model_name_or_path='owner/base' has a shape of its"),
        ("--n_layer 4", "n_layer=4 is for a new model"),
        ("--max_position_embeddings 64", "max_position_embeddings=64 is for a new model"),
        ("--encoding bpe", "encoding=bpe is for a new vocabulary"),
        ("--vocab_size 4096", "vocab_size=4096 is for a new vocabulary, and model_name_or_path='owner/base' has a"),
        ("--vocab_size 300", "leave vocab_size out"),
    ],
)
def test_options_of_a_new_model_are_refused_beside_a_model(asked: str, message: str, folder: Path) -> None:
    text = folder / "text.txt"
    given = ["--output_dir", folder / "no", "--text_files", text, "--model_name_or_path", "owner/base"]
    ended = gpt_kit("train", *given, *asked.split())
    assert (ended.exit_code, message in ended.stderr) == (2, True), ended.stderr
    assert ended.stderr.count("\n") == 1
