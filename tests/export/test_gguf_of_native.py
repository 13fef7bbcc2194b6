"""GGUF files of transformers' own classes: those of the model that the class was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from children import KILLED, die, in_child
from command_line import gpt_kit
from test_gguf_file import LLAMA3, random_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from gpt_kit_hf import UsageError, get_encoding, save_as_native
from gpt_kit_hf.export.gguf_file import save_as_gguf
from gpt_kit_hf.hub.model_folder import write_model_folder

pytest.importorskip("gguf", reason="needs the extra gguf")

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("nano-xs", {"tie_word_embeddings": False}),
    "LlamaForCausalLM": ("modern-xs", {"qk_norm": False, "use_bias": True, "rope_parameters": LLAMA3}),
    "Qwen3ForCausalLM": ("modern-xs", {"num_key_value_heads": 2, "head_dim": 32}),
}


@pytest.fixture(params=SHAPES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a model, `kit/model`, and its native form, `native/model`."""
    preset, fields = SHAPES[request.param]
    write_model_folder(tmp_path / "kit" / "model", random_model(preset, **fields), get_encoding("bytes"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "kit" / "model")
    done = save_as_native(model, tmp_path / "native" / "model", tokenizer_folder=tmp_path / "kit" / "model")
    assert done.class_name == request.param
    return tmp_path


@pytest.mark.parametrize("quantization", ["f32", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_the_file_is_that_of_the_model(quantization: str, place: Path) -> None:
    files = []
    for name in ("kit", "native"):
        file = place / name / "model.gguf"
        done = gpt_kit("export", place / name / "model", file, "--format", "gguf", "--quantization", quantization)
        assert done.exit_code == 0, done.stderr
        files.append(file.read_bytes())
    assert files[0] == files[1]


def test_llama_cpp_runs_the_folder(place: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs the extra llama")
    line = ("generate", place / "native" / "model", "--prompt", "To be", "--max_new_tokens", 24, "--temperature", 0)
    expected, found = gpt_kit(*line), gpt_kit(*line, "--engine", "llama.cpp")
    assert len(set(expected.stdout)) > 5
    assert (found.exit_code, found.stdout) == (0, expected.stdout), found.stderr


def test_bf16_stays_bf16_and_the_model_is_left_alone(tmp_path: Path) -> None:
    native = save_and_load(random_model("modern-xs").to(torch.bfloat16), tmp_path)
    before = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    done = save_as_gguf(native, get_encoding("bytes"), tmp_path / "model.gguf", quantization="bf16")
    assert done.types == {"BF16": 15, "F32": 9}
    assert native.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in native.state_dict().items())


def save_and_load(model: Any, folder: Path) -> Any:
    save_as_native(model, folder / "native")
    return AutoModelForCausalLM.from_pretrained(folder / "native")


def test_another_class_and_what_the_model_has_no_switch_for_are_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 257, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=8, num_key_value_heads=1))
    with pytest.raises(UsageError, match="Qwen2ForCausalLM; it must be a GPTKitForCausalLM, GPT2LMHeadModel, Llama"):
        save_as_gguf(qwen2, get_encoding("bytes"), tmp_path / "model.gguf")
    llama = save_and_load(random_model("modern-xs", qk_norm=False), tmp_path)
    llama.config.hidden_act = "relu"
    with pytest.raises(UsageError, match=r"^LlamaForCausalLM: hidden_act='relu' is not supported; it must be 'silu'"):
        save_as_gguf(llama, get_encoding("bytes"), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("is_native", [False, True])
def test_quantised_weights_are_refused(is_native: bool, tmp_path: Path) -> None:
    model = random_model("modern-xs")
    quantised = save_and_load(model, tmp_path) if is_native else model
    quantize_(quantised, Int8WeightOnlyConfig())
    message = r"model\.layers\.0\.self_attn\.q_proj\.weight is a Int8Tensor .* must be a plain floating-point tensor"
    with pytest.raises(UsageError, match=message):
        save_as_gguf(quantised, get_encoding("bytes"), tmp_path / "model.gguf")
    with pytest.raises(UsageError, match=message):
        save_as_native(quantised, tmp_path / "again")
    assert {each.name for each in tmp_path.iterdir()} <= {"native"}


@pytest.mark.parametrize(("form", "written"), [("gguf_file", "model.gguf"), ("native", "again")])
def test_a_kill_leaves_nothing_under_the_final_name(
    form: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, final = random_model("modern-xs"), tmp_path / written

    def export() -> None:
        if form == "native":
            save_as_native(model, final)
        else:
            save_as_gguf(model, get_encoding("bytes"), final)

    with monkeypatch.context() as patch:
        patch.setattr(f"gpt_kit_hf.export.{form}._compare", lambda *_: die())  # all is written, nothing compared
        assert in_child(export) == KILLED
    assert not final.exists()
    export()
    assert final.exists()
