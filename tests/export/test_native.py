"""Native models: written as a class of transformers, used there where this package is absent, and read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import gpt_kit
from hand_written_models import tiny_gpt_kit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM

from gpt_kit_hf import (
    CheckpointError,
    GPTKitForCausalLM,
    UsageError,
    convert_checkpoint,
    get_chat_template,
    get_encoding,
    save_as_gpt2,
    save_as_native,
    write_card,
)
from gpt_kit_hf.hub.model_folder import write_model_folder

MODERN: dict[str, Any] = {
    **{"position_embedding": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "use_bias": False},
    **{"layer_norm_epsilon": 1e-6, "n_embd": 24, "n_head": 4, "max_position_embeddings": 64, "vocab_size": 257},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# By name: the class of transformers, and the shape that it has.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 257, "max_position_embeddings": 64}),
    "gpt2-exact": (
        "GPT2LMHeadModel",
        {"vocab_size": 257, "tie_word_embeddings": False, "hidden_act": "gelu", "n_inner": 40},
    ),
    "llama": ("LlamaForCausalLM", {**MODERN, "qk_norm": False, "tie_word_embeddings": False}),
    "llama-biases": ("LlamaForCausalLM", {**MODERN, "qk_norm": False, "use_bias": True}),
    "llama-3": (
        "LlamaForCausalLM",
        {**MODERN, "qk_norm": False, "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": LLAMA3},
    ),
    "qwen3": ("Qwen3ForCausalLM", MODERN),
    "qwen3-groups": (
        "Qwen3ForCausalLM",
        {**MODERN, "n_embd": 26, "num_key_value_heads": 2, "head_dim": 10, "rope_parameters": YARN},
    ),
    "qwen3-linear": (
        "Qwen3ForCausalLM",
        {**MODERN, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    ),
}
IDS = torch.arange(20).view(2, 10) * 7919 % 257

# A program that knows transformers alone: it loads each folder, computes logits, and trains some of them further.
_ELSEWHERE = """
import json, sys, warnings
warnings.simplefilter("ignore")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gpt_kit_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
place, ids = Path(sys.argv[1]), load_file(sys.argv[1] + "/ids.safetensors")["ids"]
logits, found = {}, {}
for folder in sorted(place.glob("native-*")):
    name = folder.name.removeprefix("native-")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    logits[name] = model(ids).logits.detach()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    row = tokenizer("ab", return_tensors="pt")
    found[name] = {
        "class": type(model).__name__,
        "ids": row["input_ids"].tolist(),
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
        "eos": model.generation_config.eos_token_id,
        "tied": model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr(),
    }
    if name in ("gpt2", "llama", "qwen3"):
        rows = [{"input_ids": each, "labels": each} for each in ids] * 8
        arguments = TrainingArguments(output_dir=f"{place}/out", max_steps=12, per_device_train_batch_size=2,
            learning_rate=2e-2, lr_scheduler_type="constant", logging_steps=1, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        found[name]["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert "gpt_kit_hf" not in sys.modules
save_file(logits, place / "logits.safetensors")
(place / "found.json").write_text(json.dumps(found))
"""


def ours(shape: str) -> GPTKitForCausalLM:
    """Return a random model of a shape, always the same."""
    torch.manual_seed(0)
    return tiny_gpt_kit(bos_token_id=256, eos_token_id=256, **SHAPES[shape][1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of each shape, and what a program without this package found in them."""
    folder = tmp_path_factory.mktemp("native")
    write_model_folder(folder / "tokens", ours("gpt2"), get_encoding("bytes"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokens")
    tokenizer.chat_template = get_chat_template("default")
    tokenizer.save_pretrained(folder / "tokens")
    for shape in SHAPES:
        model = ours(shape)
        model.generation_config.eos_token_id = 256
        save_as_native(model, folder / f"native-{shape}", tokenizer_folder=folder / "tokens")
    save_file({"ids": IDS}, folder / "ids.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", _ELSEWHERE, str(folder)]
    ended = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_the_same_where_this_package_is_absent(shape: str, place: Path) -> None:
    model, found = ours(shape), json.loads((place / "found.json").read_text())[shape]
    logits = load_file(place / "logits.safetensors")[shape]
    torch.testing.assert_close(logits, model(IDS).logits.detach(), rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert found["class"] == SHAPES[shape][0]
    assert found["ids"] == [[97, 98]]
    assert "hi" in found["chat"]
    assert found["eos"] == 256
    assert found["tied"] is model.config.tie_word_embeddings


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen3"])
def test_the_trainer_of_transformers_trains_it_further(shape: str, place: Path) -> None:
    losses = json.loads((place / "found.json").read_text())[shape]["losses"]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_holds_no_code(shape: str, place: Path) -> None:
    config = json.loads((place / f"native-{shape}" / "config.json").read_text())
    assert config["architectures"] == [SHAPES[shape][0]]
    assert "auto_map" not in config
    assert not list((place / f"native-{shape}").glob("*.py"))
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (256, 256, "float32")
    if "rope_parameters" in config:  # under the names of older readers, too
        rotation = {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {"rope_type": "default"})}
        assert rotation == config["rope_parameters"]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_comes_back_to_the_bit(shape: str, place: Path, tmp_path: Path) -> None:
    model = ours(shape)
    convert_checkpoint(place / f"native-{shape}", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is GPTKitForCausalLM
    equal_to_the_bit(model, back)
    other = {"architectures", "dtype", "_name_or_path", "transformers_version"}
    before, now = ({k: v for k, v in each.config.to_dict().items() if k not in other} for each in (model, back))
    if now["hidden_act"] == "gelu_new":  # GPT-2's name of the same function
        now["hidden_act"] = "gelu_pytorch_tanh"
    assert now == before
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == get_chat_template("default")


@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
def test_bf16_stays_bf16(shape: str, tmp_path: Path) -> None:
    model = ours(shape).to(torch.bfloat16)
    done = save_as_native(model, tmp_path / "native")
    assert done.difference <= 1e-5  # computed in fp32
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert {parameter.dtype for parameter in native.parameters()} == {torch.bfloat16}
    convert_checkpoint(tmp_path / "native", tmp_path / "back")
    equal_to_the_bit(model, AutoModelForCausalLM.from_pretrained(tmp_path / "back"))


def equal_to_the_bit(first: Any, second: Any) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "ours", ours("qwen3"), get_encoding("bytes"))
    card = write_card(tmp_path / "ours").path
    card.write_text(f"{card.read_text()}\nWritten by hand.\n")
    done = gpt_kit("export", tmp_path / "ours", tmp_path / "native", "--format", "transformers")
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"the model was written to {tmp_path / 'native'} as Qwen3ForCausalLM"
    assert second.startswith("read again  25 tensors equal to the bit, logits within ")
    adapted = (tmp_path / "native" / "README.md").read_text()
    assert "It is a `Qwen3ForCausalLM` of transformers" in adapted
    assert "Written by hand." in adapted
    assert "trust_remote_code" not in adapted
    again = gpt_kit("export", tmp_path / "ours", tmp_path / "native", "--format", "transformers")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "is not an empty folder; nothing is overwritten" in again.stderr


def test_a_model_of_transformers_is_exported_as_it_is(place: Path, tmp_path: Path) -> None:
    done = gpt_kit("export", place / "native-llama", tmp_path / "again", "--format", "transformers")
    assert done.exit_code == 0, done.stderr
    first, second = (
        AutoModelForCausalLM.from_pretrained(each) for each in (place / "native-llama", tmp_path / "again")
    )
    assert type(second) is LlamaForCausalLM
    equal_to_the_bit(first, second)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"position_embedding": "sinusoidal"}, "position_embedding='sinusoidal'"),
    ({"use_bias": False}, "use_bias=False"),
    ({"norm": "rmsnorm"}, "norm='rmsnorm'"),
    ({"mlp": "swiglu"}, "mlp='swiglu'"),
    ({"qk_norm": True}, "qk_norm=True"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1"),
    ({"head_dim": 6}, "head_dim=6"),
    ({**MODERN, "use_bias": True}, "use_bias=True"),
    ({**MODERN, "norm": "layernorm"}, "norm='layernorm'"),
    ({**MODERN, "mlp": "gelu"}, "mlp='gelu'"),
    ({**MODERN, "qk_norm": False, "n_embd": 26, "head_dim": 8}, "n_embd=26"),
]


@pytest.mark.parametrize(("shape", "field"), REFUSED, ids=[field for _, field in REFUSED])
def test_what_no_class_has_is_refused_by_field(shape: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{field}: "):
        save_as_native(tiny_gpt_kit(**shape), tmp_path / "native")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [{"num_key_value_heads": 1}, {"head_dim": 6}, MODERN])
def test_gpt2_is_not_written_of_a_shape_that_it_lacks(shape: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^GPT-2 has "):
        save_as_gpt2(tiny_gpt_kit(**shape), tmp_path / "gpt2")


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").touch()
    with pytest.raises(UsageError, match="text' is a file, not a folder"):
        save_as_native(ours("qwen3"), tmp_path / "text" / "below" / "native")


def test_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    model = ours("qwen3")
    model.config.tokenizer_fingerprint = "0" * 16
    with pytest.raises(UsageError, match="fingerprint"):
        save_as_native(model, tmp_path / "native", tokenizer_folder=place / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that loses a bit: the folder does not stay."""
    written = GPT2LMHeadModel.save_pretrained

    def spoiled(self: Any, folder: Path, **options: Any) -> None:
        written(self, folder, **options)
        tensors = load_file(folder / "model.safetensors")
        tensors["transformer.ln_f.weight"][0] += 1e-6
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", spoiled)
    with pytest.raises(CheckpointError, match=r"other tensors: transformer\.ln_f\.weight"):
        save_as_native(ours("gpt2"), tmp_path / "native")
    assert list(tmp_path.iterdir()) == []
