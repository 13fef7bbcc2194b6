"""`gpt-kit convert`: each layout to a folder that computes the same, and one line for what cannot be converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Ended, gpt_kit
from hand_written_models import CONTEXT, END, HEADS, SHAPE, KitModel, NanoModel, difference, randomize, tiny_gpt_kit
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from gpt_kit_hf import get_encoding
from gpt_kit_hf.hub.model_folder import write_model_folder
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM

pytestmark = pytest.mark.usefixtures("logged")


def convert(*arguments: object) -> Ended:
    return gpt_kit("convert", *arguments)


def test_a_model_folder_becomes_gpt2_and_comes_back(tmp_path: Path) -> None:
    ours = tiny_gpt_kit(vocab_size=257)
    write_model_folder(tmp_path / "ours", ours, get_encoding("bytes"))
    done = convert(tmp_path / "ours", tmp_path / "gpt2", "--layout", "to-gpt2")
    assert (done.exit_code, done.stdout) == (0, f"the model was written to {tmp_path / 'gpt2'}\n")
    assert convert(tmp_path / "gpt2", tmp_path / "back", "--layout=gpt2").exit_code == 0
    for name, kind in (("gpt2", GPT2LMHeadModel), ("back", GPTKitForCausalLM)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert isinstance(model, kind)
        assert difference(ours, model) <= 1e-5
        assert AutoTokenizer.from_pretrained(tmp_path / name)("ab")["input_ids"] == [97, 98]
        assert model.generation_config.eos_token_id == 256


def test_every_option_of_a_nanogpt_file_arrives(tmp_path: Path) -> None:
    nano = randomize(NanoModel())
    torch.save(nano.state_dict(), tmp_path / "nano.pt")
    write_model_folder(tmp_path / "other", tiny_gpt_kit(vocab_size=257), get_encoding("bytes"))
    source = tmp_path / "nano.pt"
    options = ("--layout=nanogpt", f"--n_head={HEADS}", f"--eos_token_id={END}")
    assert convert(source, tmp_path / "exact", *options).exit_code == 0
    assert convert(source, tmp_path / "tanh", *options, "--hidden-act=gelu_new").exit_code == 0
    exact, tanh = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("exact", "tanh"))
    assert difference(nano, exact) <= 1e-5
    assert difference(nano, tanh) > 1e-5
    assert exact.generation_config.eos_token_id == END
    refused = convert(source, tmp_path / "third", *options, f"--tokenizer_folder={tmp_path / 'other'}")
    assert refused.exit_code == 2
    assert f"has the id 256, the model vocab_size={SHAPE['vocab_size']}" in refused.stderr


def test_kit_files_without_biases(tmp_path: Path) -> None:
    kit = randomize(KitModel(qkv_bias=False))
    torch.save(kit.state_dict(), tmp_path / "kit.pth")
    options = (tmp_path / "kit.pth", tmp_path / "ours", "--layout=kit", "--n-head", HEADS)
    done = convert(*options)
    assert done.exit_code == 0
    assert "no tokenizer, which generate and chat need; give one by --tokenizer_folder" in done.stdout
    assert "holds no tokenizer: copy the files" in gpt_kit("generate", tmp_path / "ours", "--prompt=x").stderr
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert difference(kit, ours) <= 1e-5
    assert ours.config.max_position_embeddings == CONTEXT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout=nanogtp"], "unknown layout 'nanogtp'; did you mean 'nanogpt'"),
        (["--layout=nanogpt"], "n_head must be given"),
        (["--layout=nanogpt", "--n_head=5"], "n_embd must be divisible by n_head, got 12 and 5"),
        (["--layout=nanogpt", f"--n_head={HEADS}", "--hidden_act=relu"], "hidden_act"),
        (["--layout=kit", f"--n_head={HEADS}"], "layout does not have: they are those of the layout nanogpt"),
        (["--layout=gpt2"], "has shape (36, 12), which is that of the layout nanogpt"),
        (["--layout=nanogpt", "--lora_scaling=2"], "lora_scaling is given, and"),
        (["--layout=nanogpt", f"--n_head={HEADS}", "--drop_classifier"], "lacks a classification head that could be"),
        (["--layout=to-gpt2"], "is no folder"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    torch.save(randomize(NanoModel()).state_dict(), tmp_path / "nano.pt")
    refused = convert(tmp_path / "nano.pt", tmp_path / "ours", *arguments)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert message in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["nano.pt"]


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    tiny_gpt_kit().save_pretrained(tmp_path / "ours")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("")
    refused = convert(tmp_path / "ours", tmp_path / "there", "--layout=to-gpt2")
    assert refused.exit_code == 2
    assert "nothing is overwritten" in refused.stderr
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["precious"]
