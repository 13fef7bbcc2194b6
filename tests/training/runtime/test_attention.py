"""The option attn_implementation: what a run uses and records, and what it refuses before it reads any data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM

from gpt_kit_hf import RunOptions, TextOptions, TrainingOptions, UsageError, train
from gpt_kit_hf.options.data import EncodingOptions, WindowOptions
from gpt_kit_hf.options.model import ModelOptions
from gpt_kit_hf.training.runtime.attention import check_attention, set_attention


def options(run: Path, text: Path, attention: str) -> RunOptions:
    return RunOptions(
        training=TrainingOptions(
            output_dir=str(run), attn_implementation=attention, max_steps=3, batch_size=2, sample_steps=0,
            sample_max_new_tokens=1, use_cpu=True, mixed_precision="fp32", report_to=["none"],
        ),
        text=TextOptions(text_files=[str(text)], eval_fraction=0.2),
        encoding=EncodingOptions(encoding="bytes"),
        windows=WindowOptions(max_length=32),
        model=ModelOptions(model="nano-xs", n_layer=1, n_head=2, n_embd=16, max_position_embeddings=32),
    )  # fmt: skip


def test_a_run_uses_and_records_the_attention_that_it_was_given(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 50)
    losses = {}
    for asked, used in (("auto", "sdpa"), ("eager", "eager")):
        losses[asked] = train(options(tmp_path / asked, text, asked), stream=None).evaluation.loss
        assert json.loads((tmp_path / asked / "run.json").read_text())["attn_implementation"] == used
    assert losses["eager"] == pytest.approx(losses["auto"], rel=1e-5)


def test_names_are_known_and_suggested() -> None:
    with pytest.raises(UsageError, match=r"attn_implementation.*'flash_atention_2'.*did you mean 'flash_attention_2'"):
        TrainingOptions(output_dir="run", attn_implementation="flash_atention_2")


@pytest.mark.parametrize(
    ("name", "device", "precision", "message"),
    [
        ("flex_attention", "cpu", "fp32", "no gradients for it on a CPU"),
        ("flash_attention_2", "cpu", "bf16", "needs a GPU, and mixed_precision bf16 or fp16"),
        ("flash_attention_3", "cuda", "fp32", "needs a GPU, and mixed_precision bf16 or fp16"),
    ],
)
def test_what_cannot_train_is_refused(name: str, device: str, precision: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_attention(name, torch.device(device), precision)
    check_attention(name, torch.device("cuda"), "bf16")


def test_a_model_that_lacks_it_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    type(model)._supports_flex_attn, before = False, type(model)._supports_flex_attn
    try:
        with pytest.raises(UsageError, match="attn_implementation=flex_attention: GPTKitForCausalLM does not support"):
            set_attention(model, "flex_attention")
    finally:
        type(model)._supports_flex_attn = before
