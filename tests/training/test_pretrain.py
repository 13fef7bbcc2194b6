"""Runs from text to a loadable folder: what they write, and that they continue to the bit."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from gpt_kit_hf import (
    EncodingOptions,
    HubError,
    ModelOptions,
    NonFiniteError,
    OptimizerOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    UsageError,
    WindowOptions,
    train,
)
from gpt_kit_hf.generation.generate import TransformersText
from gpt_kit_hf.hub.model_folder import find_model_folder
from gpt_kit_hf.storage.atomic_files import read_jsonl
from gpt_kit_hf.storage.checkpoints import list_checkpoints, verify_checkpoint
from gpt_kit_hf.storage.run_history import read_run
from gpt_kit_hf.training import text_task
from gpt_kit_hf.training.task import Sample, generate_sample

LINES = [
    f"The {age} {who} {does} the {what}.\n"
    for age, who, does, what in itertools.product(
        ("old", "new"), ("king", "fool", "ship"), ("sees", "loves"), ("sea", "crown", "storm")
    )
]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text("".join(LINES) * 8)
    return str(file)


def options(folder: Path, text_file: str, **changes: Any) -> RunOptions:
    """Options of a run of 12 tiny steps, with dropout and two micro-batches."""
    training = TrainingOptions(
        output_dir=str(folder),
        **{
            "batch_size": 6, "per_device_train_batch_size": 4, "max_steps": 12, "eval_steps": 5, "save_steps": 4,
            "save_total_limit": 9, "logging_steps": 4, "sample_steps": 6, "sample_max_new_tokens": 8, "use_cpu": True,
            "mixed_precision": "fp32", **changes,
        },
    )  # fmt: skip
    return RunOptions(
        training=training,
        text=TextOptions(text_files=[text_file]),
        encoding=EncodingOptions(vocab_size=280),
        windows=WindowOptions(max_length=16, stride=12),
        model=ModelOptions(n_layer=2, n_head=2, n_embd=32, max_position_embeddings=32, dropout=0.1),
        optimizer=OptimizerOptions(learning_rate=5e-3, warmup_steps=3),
    )


def update_lines(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(folder / "metrics.jsonl") if record["kind"] == "train"]


def assert_same_run(one: Path, other: Path) -> None:
    """Losses, weights and optimizer are equal to the bit."""
    assert update_lines(one) == update_lines(other)
    lines = [read_jsonl(folder / "metrics.jsonl") for folder in (one, other)]
    # A speed is measured: every other line is equal, and none is there twice.
    assert [line for line in lines[0] if line["kind"] != "speed"] == [
        line for line in lines[1] if line["kind"] != "speed"
    ]
    assert [(line["kind"], line["step"]) for line in lines[0]] == [(line["kind"], line["step"]) for line in lines[1]]
    last = [list_checkpoints(folder)[-1] for folder in (one, other)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(folder / name) for folder in last)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    states = [json.loads((folder / "training_state.json").read_text()) for folder in last]
    assert states[0] == states[1]


def killed_copy(run: Path, folder: Path, *lost: str) -> Path:
    """Copy a run as a kill before its end would have left it: without results and the checkpoints `lost`."""
    shutil.copytree(run, folder)
    for file in [path for path in folder.iterdir() if path.is_file()]:
        if file.name not in ("options.json", "metrics.jsonl", "run.json"):
            file.unlink()
    record = json.loads((folder / "run.json").read_text())
    del record["results"]
    (folder / "run.json").write_text(json.dumps(record))
    for name in lost:
        shutil.rmtree(folder / "checkpoints" / name)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> tuple[Path, str]:
    """A run that was not interrupted, and what it output."""
    folder, output = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    result = train(options(folder, text_file), stream=output)
    assert result.steps == 12
    return folder, output.getvalue()


def test_run_learns_and_logs(finished: tuple[Path, str]) -> None:
    folder, output = finished
    losses = [record["loss"] for record in update_lines(folder)]
    assert [record["step"] for record in update_lines(folder)] == list(range(1, 13))
    assert losses[-1] < 0.9 * losses[0]
    corpus_and_model = ["1 document,", "training tokens", "2 layers", "fp32 on the CPU, 1 process"]
    progress = ["step 4/12", "eval loss", "bits per byte", "gzip -9", "unigram", "  | "]
    for part in [*corpus_and_model, *progress, "from_pretrained", "metrics.jsonl", "gpt-kit generate"]:
        assert part in output, part


def test_run_records_speeds_and_samples(finished: tuple[Path, str]) -> None:
    folder, output = finished
    lines = read_jsonl(folder / "metrics.jsonl")
    speeds = [line for line in lines if line["kind"] == "speed"]
    assert [line["step"] for line in speeds] == [4, 8, 12]
    assert all(line["tokens_per_second"] > 0 and line["memory_bytes"] > 1e6 for line in speeds)
    assert 0 < speeds[0]["seconds"] < speeds[1]["seconds"] < speeds[2]["seconds"]
    samples = [line for line in lines if line["kind"] == "sample"]
    assert [line["step"] for line in samples] == [6, 12]
    for line in samples:
        assert line["text"].startswith(line["prompt"])
        assert all(f"  | {each}\n" in output for each in line["text"].splitlines())


@pytest.mark.parametrize(("documents", "before"), [(1, "\n"), (2, "<|endoftext|>")])
def test_texts_begin_after_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: int, before: str
) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(documents)]
    for file in files:
        file.write_text("".join(LINES) * 8)
    prompts = list[list[int]]()

    def noting(model: Any, prompt: torch.Tensor, *rest: Any, **sampling: Any) -> Sample:
        prompts.append(prompt[0].tolist())
        return generate_sample(model, prompt, *rest, **sampling)

    monkeypatch.setattr(text_task, "generate_sample", noting)
    run = options(tmp_path / "run", str(files[0]), max_steps=2, sample_prompt="The")
    train(replace(run, text=replace(run.text, text_files=[str(file) for file in files])))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert [tokenizer.decode(prompt) for prompt in prompts] == [f"{before}The"]
    (sample,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "sample"]
    assert sample["prompt"] == "The"
    assert sample["text"].startswith("The")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert TransformersText(model, tokenizer, temperature=1.0, top_k=None).start == before


def test_run_folder_loads_by_auto_classes_and_pipeline(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert AutoConfig.from_pretrained(folder).model_type == "gpt_kit"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The old king", return_tensors="pt").input_ids
    base = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(model.lm_head(base(ids).last_hidden_state), model(ids).logits)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    generate = pipeline("text-generation", model=str(folder))
    text = generate("The old", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("The old")


def test_run_folder_holds_record_curve_checkpoints_and_no_pickle(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    record = json.loads((folder / "run.json").read_text())
    assert record["results"]["steps"] == 12
    assert record["results"]["bits_per_byte"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert (folder / "loss.png").stat().st_size > 5000
    assert list((folder / "tensorboard").iterdir())
    for file in folder.rglob("*"):
        assert file.suffix not in {".bin", ".pt", ".pth", ".pkl"}, file
    assert [checkpoint.name for checkpoint in list_checkpoints(folder)] == [f"step-{i:08d}" for i in (4, 8, 12)]
    assert not any(verify_checkpoint(checkpoint) for checkpoint in list_checkpoints(folder))


def test_trackers_get_run_name_options_and_losses(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    [events] = (folder / "tensorboard" / folder.name).glob("events.*")
    read = event_accumulator.EventAccumulator(str(events)).Reload()
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/bits_per_byte"} <= set(read.Tags()["scalars"])
    scored = {r["step"]: r["loss"] for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "eval"}
    assert {event.step: event.value for event in read.Scalars("eval/loss")} == pytest.approx(scored)
    [config] = (folder / "tensorboard" / folder.name).glob("*/hparams.yml")
    stored = yaml.safe_load(config.read_text())
    assert stored.keys() == json.loads((folder / "options.json").read_text()).keys()
    assert (stored["training.batch_size"], stored["windows.packing"], stored["text.text_files"][:2]) == (
        6,
        False,
        '["',
    )


@pytest.mark.parametrize("lost", [["step-00000012"], ["step-00000012", "step-00000008"]])
def test_run_resumes_to_the_bit(finished: tuple[Path, str], tmp_path: Path, text_file: str, lost: list[str]) -> None:
    """As if killed after a checkpoint, later metrics lines already written."""
    folder = killed_copy(finished[0], tmp_path / "run", *lost)
    output = io.StringIO()
    train(options(folder, text_file, resume=True), stream=output)
    assert "resumed  after step" in output.getvalue()
    assert_same_run(finished[0], folder)


def test_resume_with_workers_keeps_the_batches(finished: tuple[Path, str], tmp_path: Path, text_file: str) -> None:
    folder = killed_copy(finished[0], tmp_path / "run", "step-00000012")
    train(options(folder, text_file, resume=True, dataloader_num_workers=2), stream=None)
    assert_same_run(finished[0], folder)


def test_resume_begins_continues_and_finishes_a_run(
    finished: tuple[Path, str], tmp_path: Path, text_file: str
) -> None:
    folder = tmp_path / "run"
    train(options(folder, text_file, resume=True), stream=None)
    assert_same_run(finished[0], folder)
    output = io.StringIO()
    complete = train(options(folder, text_file, resume=True), stream=output)
    assert output.getvalue().startswith(f"{folder} is complete: 12 steps")
    # Killed between the last checkpoint and the end: only the end is done again.
    folder = killed_copy(finished[0], tmp_path / "killed")
    assert train(options(folder, text_file, resume=True), stream=None).evaluation == complete.evaluation
    assert_same_run(finished[0], folder)
    assert (folder / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "eval"] == [5, 10, 12]


def test_resume_skips_a_damaged_checkpoint(finished: tuple[Path, str], tmp_path: Path, text_file: str) -> None:
    folder = killed_copy(finished[0], tmp_path / "run")
    weights = folder / "checkpoints" / "step-00000012" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    output = io.StringIO()
    train(options(folder, text_file, resume=True), stream=output)
    assert "step-00000012 is damaged and not used" in output.getvalue()
    assert_same_run(finished[0], folder)


def test_existing_run_is_never_overwritten(finished: tuple[Path, str], tmp_path: Path, text_file: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = sorted((f, f.stat().st_mtime_ns) for f in folder.rglob("*"))
    with pytest.raises(UsageError, match="already holds a run: use resume, overwrite or another folder"):
        train(options(folder, text_file), stream=None)
    changed = replace(options(folder, text_file, resume=True), optimizer=OptimizerOptions(learning_rate=0.1))
    with pytest.raises(UsageError, match=r"cannot resume .*learning_rate was 0.005, is 0.1"):
        train(changed, stream=None)
    # Options that do not fit leave the old run where it is, even with overwrite.
    with pytest.raises(UsageError, match="max_length=64 is above max_position_embeddings="):
        train(replace(options(folder, text_file, overwrite=True), windows=WindowOptions(max_length=64)), stream=None)
    assert sorted((f, f.stat().st_mtime_ns) for f in folder.rglob("*")) == before
    output = io.StringIO()
    train(options(folder, text_file, overwrite=True, max_steps=2), stream=output)
    assert "moved the previous run from" in output.getvalue()
    assert (tmp_path / "run.replaced-1" / "model.safetensors").is_file()
    assert len(update_lines(folder)) == 2


def test_resume_refuses_a_changed_text(finished: tuple[Path, str], tmp_path: Path, text_file: str) -> None:
    folder, file = tmp_path / "run", tmp_path / "lines.txt"
    file.write_text(Path(text_file).read_text())
    train(options(tmp_path / "whole", str(file), max_steps=4, save_steps=2), stream=None)
    killed_copy(tmp_path / "whole", folder, "step-00000004")
    file.write_text(Path(text_file).read_text() + "One more line.\n")
    with pytest.raises(
        UsageError, match=r"other data \(train_tokens was 3457, is \d+; eval_tokens .* its fingerprint was"
    ):
        train(options(folder, str(file), max_steps=4, save_steps=2, resume=True), stream=None)


def test_folder_with_other_files_is_refused(tmp_path: Path, text_file: str) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match=r"holds other files \(thesis.tex\): name a new or empty folder"):
        train(options(tmp_path, text_file), stream=None)
    file = tmp_path / "thesis.tex"
    with pytest.raises(UsageError, match="is a file"):
        train(options(file / "run", text_file), stream=None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_many_skipped_updates_stop_the_run(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gpt_kit_hf.model.chunked_loss.summed_cross_entropy", lambda hidden, *_: hidden.sum() * math.nan
    )
    with pytest.raises(NonFiniteError, match="3 updates in a row were skipped, the last at step 3: loss is nan"):
        train(options(tmp_path / "run", text_file, max_skipped_updates=3), stream=None)
    lines = update_lines(tmp_path / "run")
    assert [line["loss"] for line in lines] == [None] * 3
    assert all(line["skipped"] == "loss is nan" for line in lines)
    history = read_run(tmp_path / "run")
    assert (history.state, history.skipped, history.trained_tokens) == ("failed", 3, 0)
    assert (history.error or "").startswith("NonFiniteError: 3 updates in a row were skipped, the last at step 3")


def test_unfinished_run_loads_from_its_newest_checkpoint(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "run" / "checkpoints")
    assert find_model_folder(str(tmp_path / "run")).endswith("step-00000012")
    assert find_model_folder(str(finished[0])) == str(finished[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError, match=r"'someone/model': no such folder, and .* not fetched: .* HF_HUB_OFFLINE is set"
    ):
        find_model_folder("someone/model")
    with pytest.raises(UsageError, match="holds no model"):
        find_model_folder(str(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        find_model_folder(str(tmp_path / "nothing"))
