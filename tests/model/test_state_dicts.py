"""Files of weights as other programs store them: wrapped, adapted, fused, with a classification head."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_written_models import (
    END,
    HEADS,
    IDS,
    LAYERS,
    VOCAB,
    WIDTH,
    KitModel,
    NanoModel,
    difference,
    is_tied,
    randomize,
    tiny_gpt2,
    tiny_gpt_kit,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)

from gpt_kit_hf import GPTKitForCausalLM, GPTKitForSequenceClassification
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.checkpoints.conversion import convert_checkpoint, load_gpt2_checkpoint
from gpt_kit_hf.options.model import Layout

pytestmark = [
    pytest.mark.usefixtures("logged"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT calls it
]

State = dict[str, Tensor]


def converted(stored: object, layout: Layout, tmp_path: Path, **options: Any) -> Any:
    torch.save(stored, tmp_path / "weights.ckpt")
    convert_checkpoint(tmp_path / "weights.ckpt", tmp_path / "ours", layout, **{"n_head": HEADS, **options})
    return AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


def model_of(layout: Layout) -> Any:
    models: dict[str, Callable[[], Any]] = {
        "gpt2": tiny_gpt2,
        "nanogpt": lambda: randomize(NanoModel()),
        "kit": lambda: randomize(KitModel()),
        "gpt-kit": tiny_gpt_kit,
    }
    return models[layout]()


# --- what training tools put around a state dict


def prefixed(prefix: str) -> Callable[[State], object]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


def lightning(state: State) -> object:
    beside = {"epoch": 3, "pytorch-lightning_version": "2.5.0", "callbacks": {"best": {"score": torch.tensor(1.0)}}}
    return {**beside, "state_dict": prefixed("model.")(state), "hyper_parameters": {"lr": 0.1}, "lr_schedulers": []}


def compiled_blocks(state: State) -> object:
    return {name.replace(".0.", ".0._orig_mod.", 1): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("layout", ["gpt2", "nanogpt", "kit", "gpt-kit"])
@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("model."),
        prefixed("net.gpt."),
        lightning,
        compiled_blocks,
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"lr": 1}},
    ],
)
def test_wrapped_state_dicts_convert(wrap: Callable[[State], object], layout: Layout, tmp_path: Path) -> None:
    theirs = model_of(layout)
    assert difference(theirs, converted(wrap(theirs.state_dict()), layout, tmp_path)) <= 1e-5


@pytest.mark.parametrize("layout", ["gpt2", "nanogpt", "gpt-kit"])
def test_state_dicts_of_base_models_convert(layout: Layout, tmp_path: Path) -> None:
    theirs = model_of(layout)
    base = theirs.model if layout == "gpt-kit" else theirs.transformer
    ours = converted(prefixed("net.")(base.state_dict()), layout, tmp_path)
    assert difference(theirs, ours) <= 1e-5
    assert is_tied(ours)


def test_a_state_dict_of_this_package_keeps_its_kind(tmp_path: Path) -> None:
    theirs = tiny_gpt_kit(tie_word_embeddings=False, use_bias=False, hidden_act="gelu", n_inner=20)
    ours = converted(theirs.state_dict(), "gpt-kit", tmp_path, hidden_act="gelu")
    assert difference(theirs, ours) == 0
    assert not is_tied(ours)
    assert (ours.config.use_bias, ours.config.n_inner) == (False, 20)


def test_two_state_dicts_in_a_file_are_refused(tmp_path: Path) -> None:
    state = randomize(KitModel()).state_dict()
    with pytest.raises(UsageError, match=r"holds weights under 'model' and 'state_dict'; store one of them alone"):
        converted({"model": state, "state_dict": state}, "kit", tmp_path)


def test_two_models_in_a_file_are_refused(tmp_path: Path) -> None:
    state = randomize(KitModel()).state_dict()
    both = {**{f"student.{n}": t for n, t in state.items()}, **{f"teacher.{n}": t for n, t in state.items()}}
    with pytest.raises(UsageError, match=r"several models: student\.pos_emb\.weight, teacher\.pos_emb\.weight"):
        converted(both, "kit", tmp_path)
    with pytest.raises(UsageError, match=r"layout does not have: metric\.total"):
        converted({**{f"model.{n}": t for n, t in state.items()}, "metric.total": torch.ones(1)}, "kit", tmp_path)


# --- fused projections


@pytest.mark.parametrize("name", ["qkv", "Wqkv", "c_attn"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_fused_projections_of_a_hand_written_model(name: str, qkv_bias: bool, tmp_path: Path) -> None:
    kit = randomize(KitModel(qkv_bias))
    state = dict(kit.state_dict())
    for layer in range(LAYERS):
        at = f"trf_blocks.{layer}.att"
        for part in ("weight", "bias") if qkv_bias else ("weight",):
            parts = [state.pop(f"{at}.W_{which}.{part}") for which in ("query", "key", "value")]
            state[f"{at}.{name}.{part}"] = torch.cat(parts)
        for part in ("weight", "bias"):
            state[f"{at}.proj.{part}"] = state.pop(f"{at}.out_proj.{part}")
    assert difference(kit, converted(state, "kit", tmp_path)) <= 1e-5


@pytest.mark.parametrize("names", [("qkv", "proj"), ("Wqkv", "out_proj")])
def test_other_names_of_nanogpts_projections(names: tuple[str, str], tmp_path: Path) -> None:
    nano = randomize(NanoModel())
    fused, output = names
    state = {
        name.replace("c_attn", fused).replace("attn.c_proj", f"attn.{output}"): tensor
        for name, tensor in nano.state_dict().items()
    }
    assert difference(nano, converted(state, "nanogpt", tmp_path)) <= 1e-5


def test_nanogpt_without_biases_in_attention_only(tmp_path: Path) -> None:
    nano = randomize(NanoModel())
    for block in nano.transformer["h"]:  # type: ignore[union-attr]
        block.attn.c_attn.bias.data.zero_()  # type: ignore[union-attr]
    state = {name: tensor for name, tensor in nano.state_dict().items() if not name.endswith("c_attn.bias")}
    assert difference(nano, converted(state, "nanogpt", tmp_path)) <= 1e-5


# --- LoRA


@pytest.mark.parametrize("alpha", [4, 32])
@pytest.mark.parametrize("wrap", [dict, prefixed("model.")])
def test_peft_adapters_are_merged(alpha: int, wrap: Callable[[State], object], tmp_path: Path) -> None:
    settings = LoraConfig(r=2, lora_alpha=alpha, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    adapted: Any = randomize(get_peft_model(tiny_gpt2(), settings))
    ours = converted(wrap(adapted.state_dict()), "gpt2", tmp_path, lora_scaling=alpha / 2)
    assert difference(adapted, ours) <= 1e-4
    assert difference(tiny_gpt2(), ours) > 1e-2


class LoraLinear(nn.Module):
    """A linear layer with an update of low rank, x W + alpha x A B, by hand."""

    def __init__(self, linear: nn.Module, alpha: float) -> None:
        super().__init__()
        self.linear, self.alpha = linear, alpha
        self.lora = nn.Module()
        assert isinstance(linear, nn.Linear)
        self.lora.A = nn.Parameter(torch.randn(linear.in_features, 3))
        self.lora.B = nn.Parameter(torch.randn(3, linear.out_features) / 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) + self.alpha * (x @ self.lora.A @ self.lora.B)  # type: ignore[operator]
        return result


def adapted_kit() -> KitModel:
    kit: KitModel = randomize(KitModel())
    for name, module in list(kit.named_modules()):
        if isinstance(module, nn.Linear):
            parent = kit.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], LoraLinear(module, 0.5))
    return kit


def test_hand_written_adapters_are_merged(tmp_path: Path) -> None:
    kit = adapted_kit()
    assert "trf_blocks.0.att.W_query.lora.A" in kit.state_dict()
    assert difference(kit, converted(kit.state_dict(), "kit", tmp_path, lora_scaling=0.5)) <= 1e-4


def test_adapters_beside_the_weight_are_merged(tmp_path: Path) -> None:
    nano = randomize(NanoModel())
    state = {name: tensor.clone() for name, tensor in nano.state_dict().items()}
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}.mlp.c_fc"
        first, second = torch.randn(2, WIDTH), torch.randn(4 * WIDTH, 2)
        state |= {f"{name}.lora_A": first, f"{name}.lora_B": second}
        with torch.no_grad():
            nano.get_submodule(name).weight.add_(3 * second @ first)  # type: ignore[operator, arg-type]
    assert difference(nano, converted(state, "nanogpt", tmp_path, lora_scaling=3.0)) <= 1e-4


def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    state = adapted_kit().state_dict()
    with pytest.raises(
        UsageError, match="LoRA matrices of rank 3, but not the factor of their product: give lora_scal"
    ):
        converted(state, "kit", tmp_path)
    name = "trf_blocks.1.att.W_key"
    without = {n: t for n, t in state.items() if n != f"{name}.lora.B"}
    with pytest.raises(UsageError, match=rf"{name} has LoRA matrices, but not its weight and one pair A and B"):
        converted(without, "kit", tmp_path, lora_scaling=1.0)
    without = {n: t for n, t in state.items() if n != f"{name}.linear.weight"}
    with pytest.raises(UsageError, match=rf"{name} has LoRA matrices, but not its weight"):
        converted(without, "kit", tmp_path, lora_scaling=1.0)
    with pytest.raises(UsageError, match=rf"{name} has shape \(12, 12\), its LoRA update \(11, 12\)"):
        converted({**state, f"{name}.lora.B": torch.ones(3, 11)}, "kit", tmp_path, lora_scaling=1.0)
    adapted: Any = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(UsageError, match="has LoRA matrices, but several adapters for it"):
        converted(adapted.state_dict(), "gpt2", tmp_path, lora_scaling=1.0)
    with pytest.raises(UsageError, match=r"lora_scaling is given, and .* holds no LoRA matrices"):
        converted(randomize(KitModel()).state_dict(), "kit", tmp_path, lora_scaling=1.0)


# --- classifiers


class KitClassifier(KitModel):
    """A hand-written model whose output projection was replaced by a linear layer for labels, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.out_head = nn.Linear(WIDTH, 2)


def test_a_hand_written_classifier_becomes_a_classifier(tmp_path: Path) -> None:
    theirs = randomize(KitClassifier())
    torch.save(theirs.state_dict(), tmp_path / "spam.pth")
    convert_checkpoint(tmp_path / "spam.pth", tmp_path / "ours", "kit", n_head=HEADS)
    ours: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert type(ours) is GPTKitForSequenceClassification
    # It reads the last position, whatever token is there.
    logits = ours(IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(logits, theirs(IDS)[:, -1], rtol=1e-5, atol=1e-5)
    with pytest.raises(
        UsageError, match="lacks an output projection: its head is a classifier; leave drop_classifier"
    ):
        convert_checkpoint(tmp_path / "spam.pth", tmp_path / "lm", "kit", n_head=HEADS, drop_classifier=True)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (GPT2ForSequenceClassification, AutoModelForSequenceClassification),
        (GPT2ForTokenClassification, AutoModelForTokenClassification),
        (GPT2ForQuestionAnswering, AutoModelForQuestionAnswering),
    ],
)
def test_a_classifier_of_transformers_becomes_one(kind: Any, auto: Any, tmp_path: Path) -> None:
    labels = {0: "no", 1: "perhaps", 2: "yes"}
    options = {} if kind is GPT2ForQuestionAnswering else {"id2label": labels, "label2id": {"no": 0}}
    theirs = tiny_gpt2(kind, pad_token_id=0, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", "gpt2")
    ours = auto.from_pretrained(tmp_path / "ours")
    assert type(ours).__name__ == kind.__name__.replace("GPT2", "GPTKit")
    found, expected = ours(IDS), theirs(IDS)
    for name in ("start_logits", "end_logits") if kind is GPT2ForQuestionAnswering else ("logits",):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert ours.config.id2label == theirs.config.id2label
    with pytest.raises(
        UsageError, match=r"holds a classifier: convert_checkpoint makes a GPTKitFor.* of it, drop_clas"
    ):
        load_gpt2_checkpoint(tmp_path / "theirs")
    # Without its head it is a language model, whose output projection is the token embedding.
    language_model = load_gpt2_checkpoint(tmp_path / "theirs", drop_classifier=True)
    reference = GPT2LMHeadModel(theirs.config).eval()
    reference.transformer.load_state_dict(theirs.transformer.state_dict())
    assert difference(reference, language_model) <= 1e-5
    with pytest.raises(UsageError, match=rf"holds a {type(ours).__name__}; only language models"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "back", "to-gpt2")


def test_a_bias_of_the_output_projection(tmp_path: Path) -> None:
    kit = randomize(KitModel())
    zero = converted({**kit.state_dict(), "out_head.bias": torch.zeros(VOCAB)}, "kit", tmp_path)
    assert difference(kit, zero) <= 1e-5
    shutil.rmtree(tmp_path / "ours")
    with pytest.raises(UsageError, match="the output projection has a bias, which this model lacks"):
        converted({**kit.state_dict(), "out_head.bias": torch.ones(VOCAB)}, "kit", tmp_path)


# --- files


@pytest.mark.parametrize("value", [np.float64(1.5), np.float32(1.5), np.int64(7), np.bool_(True)])
@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numpys_numbers_beside_the_weights(value: Any, module: str, tmp_path: Path) -> None:
    nano, file = randomize(NanoModel()), tmp_path / "ckpt.pt"
    beside = {"best_val_loss": value, "config": {"learning_rate": value}}
    torch.save({"model": nano.state_dict(), "model_args": {"n_head": HEADS, "dropout": 0.0}, **beside}, file)
    content = file.read_bytes()
    assert b"numpy._core.multiarray" in content
    if module == "numpy.core.multiarray":  # as older numpys write it; the archive's checksum is not read
        torch.save(
            {"model": nano.state_dict(), **beside}, file, pickle_module=OldNames, _use_new_zipfile_serialization=False
        )
        assert b"numpy.core.multiarray" in file.read_bytes()
    convert_checkpoint(file, tmp_path / "ours", "nanogpt", n_head=HEADS)
    assert difference(nano, AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) <= 1e-5


class _OldPickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    def save_global(self, obj: Any, name: str | None = None) -> None:
        if getattr(obj, "__name__", "") == "scalar":
            self.write(b"cnumpy.core.multiarray\nscalar\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


class OldNames:
    """A pickle module that writes numpy's function under the name that it had before numpy 2."""

    Pickler = _OldPickler
    dump = staticmethod(lambda obj, file, protocol: _OldPickler(file, protocol).dump(obj))


def test_arrays_and_objects_beside_the_weights_are_refused(tmp_path: Path) -> None:
    nano = randomize(NanoModel())
    for value in (np.ones(2), np.array([object()], dtype=object), np.dtype("O").type, LoraConfig()):
        torch.save({"model": nano.state_dict(), "config": value}, tmp_path / "ckpt.pt")
        with pytest.raises(UsageError, match=r"is refused|is no readable torch file"):
            convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "ours", "nanogpt", n_head=HEADS)


def test_tensorflows_files_are_refused_with_a_hint(tmp_path: Path) -> None:
    folder = tmp_path / "124M"
    folder.mkdir()
    names = ("model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.ckpt.meta", "checkpoint", "hparams.json")
    for name in names:
        (folder / name).write_bytes(b"")
    for place in (folder, folder / names[0], folder / "model.ckpt"):
        with pytest.raises(UsageError, match=r"TensorFlow's files are not read: .* openai-community/gpt2 FOLDER"):
            convert_checkpoint(place, tmp_path / "ours", "gpt2")
    tiny_gpt2().config.save_pretrained(tmp_path / "h5")
    (tmp_path / "h5" / "tf_model.h5").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds no weights: .*; TensorFlow's files are not read"):
        convert_checkpoint(tmp_path / "h5", tmp_path / "ours", "gpt2")
    torch.save(randomize(KitModel()).state_dict(), tmp_path / "kit.pth")
    with pytest.raises(UsageError, match=r"'.*none\.pth' does not exist$"):
        convert_checkpoint(tmp_path / "none.pth", tmp_path / "ours", "kit")


def test_the_layout_of_the_other_linear_layer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"c_attn\.weight has shape \(36, 12\), which is that of the layout nanogpt"):
        converted(randomize(NanoModel()).state_dict(), "gpt2", tmp_path)
    with pytest.raises(UsageError, match=r"c_attn\.weight has shape \(12, 36\), which is that of the layout gpt2"):
        converted(tiny_gpt2().state_dict(), "nanogpt", tmp_path)


def test_what_is_written_is_a_folder_of_this_package(tmp_path: Path) -> None:
    ours = converted(tiny_gpt2().state_dict(), "gpt2", tmp_path, eos_token_id=END)
    assert type(ours) is GPTKitForCausalLM
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["hidden_act"] == "gelu_new"
