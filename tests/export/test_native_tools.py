"""Every command and kit function takes a native folder as it is, and a run on one stays native."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import gpt_kit
from safetensors.torch import load_file
from test_native import MODERN, ours
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from gpt_kit_hf import (
    compute_batch_loss,
    convert_checkpoint,
    generate_text_autoregressive,
    get_chat_template,
    get_encoding,
    save_as_native,
    text_to_token_ids,
)
from gpt_kit_hf.hub.model_folder import write_model_folder

TEXT = "Now is the winter of our discontent made glorious summer.\n" * 60
# A low rate: AdamW's first steps make of rounding differences in small gradients differences as large as the rate.
RUN = (
    *("--max_length", 64, "--batch_size", 2, "--max_steps", 2, "--report_to", "none", "--use_cpu"),
    *("--learning_rate", "1e-5"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the modern shape, `kit`, and its native form, `native`, each with a chat template; a text; rows."""
    folder = tmp_path_factory.mktemp("tools")
    torch.manual_seed(0)
    write_model_folder(folder / "kit", ours("qwen3"), get_encoding("bytes"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "kit")
    tokenizer.chat_template = get_chat_template("default")
    tokenizer.save_pretrained(folder / "kit")
    save_as_native(
        AutoModelForCausalLM.from_pretrained(folder / "kit"), folder / "native", tokenizer_folder=folder / "kit"
    )
    (folder / "text.txt").write_text(TEXT)
    rows = [{"instruction": f"Say {number}", "output": f"It is {number}."} for number in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def both(place: Path, *arguments: object) -> list[str]:
    """Return what a command prints for the model, and for its native form."""
    command, *options = arguments
    printed = []
    for name in ("kit", "native"):
        done = gpt_kit(command, place / name, *options)
        assert done.exit_code == 0, done.stderr
        printed.append(done.stdout.replace(str(place / name), "MODEL"))
    return printed


def test_it_generates_the_same_text(place: Path) -> None:
    options = ("--prompt", "Now", "--max_new_tokens", 12, "--temperature", 0, "--device", "cpu")
    first, second = both(place, "generate", *options)
    assert first == second


def test_it_has_the_same_score(place: Path) -> None:
    first, second = both(place, "evaluate", "--data", place / "text.txt", "--max_length", 32, "--device", "cpu")
    assert "bits/byte" in first
    assert first == second


def test_the_kit_functions_take_it(place: Path) -> None:
    ids = text_to_token_ids("Now is the winter", get_encoding("bytes"))
    found = []
    for name in ("kit", "native"):
        model = AutoModelForCausalLM.from_pretrained(place / name).eval()
        written = generate_text_autoregressive(model=model, token_ids=ids, max_new_tokens=8, temperature=0.0)
        found.append((written.tolist(), compute_batch_loss(ids[:, :-1], ids[:, 1:], model).item()))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_run_on_it_is_the_run_on_the_model_and_stays_native(command: str, place: Path) -> None:
    texts, rows = place / "text.txt", place / "rows.jsonl"
    data = ("--text_files", texts, "--sample_steps", 0) if command == "train" else ("--rows", rows)
    for name in ("kit", "native"):
        run = place / f"{command}-{name}"
        done = gpt_kit(command, "--model_name_or_path", place / name, "--output_dir", run, *data, *RUN)
        assert done.exit_code == 0, done.stderr
    run = place / f"{command}-native"
    assert json.loads((run / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert not list(run.glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(run)) is Qwen3ForCausalLM
    trained, expected = (load_file(place / f"{command}-{name}" / "model.safetensors") for name in ("native", "kit"))
    assert trained.keys() == expected.keys()
    for name in trained:
        torch.testing.assert_close(trained[name], expected[name], rtol=0, atol=1e-4)
    # Its native form is what it is; convert makes a model of this package of it.
    done = gpt_kit("export", run, place / f"{command}-again", "--format", "transformers")
    assert done.exit_code == 0, done.stderr
    convert_checkpoint(run, place / f"{command}-back")
    back = json.loads((place / f"{command}-back" / "config.json").read_text())
    assert {name: back[name] for name in MODERN} == MODERN


def test_check_runs_it(place: Path) -> None:
    """It tells what holds of transformers' own class: rows are the same without a cache, packed ones not with one."""
    done = gpt_kit("check", place / "native", "--device", "cpu", "--attention", "eager")
    assert done.stdout.startswith("Qwen3ForCausalLM on cpu"), done.stderr
    assert "packed/dynamic/eager/fp32: " in done.stdout + done.stderr
    assert "/none/eager/fp32: " not in done.stdout + done.stderr
