from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from gpt_kit_hf import PRESETS, GPTKitForCausalLM, ModelOptions, UsageError, create_model_config
from gpt_kit_hf.model.presets import build_config

# Full name, layers, width, heads, context, vocabulary: GPT-2 after Radford et al. 2019, GPT-3 after Brown et al. 2020,
# table 2.1, GPT-1 after Radford et al. 2018.
SIZES = {
    "gpt2-small (124M)": (12, 768, 12, 1024, 50257),
    "gpt2-medium (355M)": (24, 1024, 16, 1024, 50257),
    "gpt2-large (774M)": (36, 1280, 20, 1024, 50257),
    "gpt2-xl (1558M)": (48, 1600, 25, 1024, 50257),
    "gpt3-small (125M)": (12, 768, 12, 2048, 50257),
    "gpt3-medium (350M)": (24, 1024, 16, 2048, 50257),
    "gpt3-large (760M)": (24, 1536, 16, 2048, 50257),
    "gpt3-xl (1.3B)": (24, 2048, 16, 2048, 50257),
    "gpt3-2.7b (2.7B)": (32, 2560, 32, 2048, 50257),
    "gpt3-6.7b (6.7B)": (32, 4096, 32, 2048, 50257),
    "gpt3-13b (13B)": (40, 5120, 40, 2048, 50257),
    "gpt1 (117M)": (12, 768, 12, 512, 40478),
    "nano-xs (4x128)": (4, 128, 4, 256, 50257),
    "nano-s (4x256)": (4, 256, 4, 256, 50257),
    "nano-m (6x384)": (6, 384, 6, 512, 50257),
    "nano-l (8x512)": (8, 512, 8, 1024, 50257),
}
# The modern shapes, and the classic ones of their sizes.
MODERN = {
    "modern-xs (4x128)": "nano-xs (4x128)",
    "modern-s (4x256)": "nano-s (4x256)",
    "modern-m (6x384)": "nano-m (6x384)",
    "modern-l (8x512)": "nano-l (8x512)",
    "modern-124m (124M)": "gpt2-small (124M)",
    "modern-350m (355M)": "gpt2-medium (355M)",
    "modern-1.5b (1558M)": "gpt2-xl (1558M)",
}

# What OpenAI released, counted from the files.
PUBLISHED = {
    "gpt2-small (124M)": 124_439_808,
    "gpt2-medium (355M)": 354_823_168,
    "gpt2-large (774M)": 774_030_080,
    "gpt2-xl (1558M)": 1_557_611_200,
}


def parameters_by_hand(layers: int, width: int, context: int, vocabulary: int) -> int:
    attention = 4 * (width * width + width)  # q, k, v and o, each with its bias
    feed_forward = (width * 4 * width + 4 * width) + (4 * width * width + width)
    norm = 2 * width
    return vocabulary * width + context * width + layers * (attention + feed_forward + 2 * norm) + norm


def count(name: str, **overrides: Any) -> int:
    with torch.device("meta"):
        model = GPTKitForCausalLM(create_model_config(name, **overrides))
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_preset_is_covered_here() -> None:
    assert set(PRESETS) == set(SIZES) | set(MODERN)


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_published_shape(name: str) -> None:
    layers, width, heads, context, vocabulary = SIZES[name]
    config = create_model_config(name)
    assert (config.n_layer, config.n_embd, config.n_head) == (layers, width, heads)
    assert (config.max_position_embeddings, config.vocab_size) == (context, vocabulary)
    assert config.n_inner == 4 * width
    assert config.tie_word_embeddings


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_parameters_of_the_formula(name: str) -> None:
    layers, width, _, context, vocabulary = SIZES[name]
    parameters = count(name)
    assert parameters == parameters_by_hand(layers, width, context, vocabulary)
    assert parameters == PUBLISHED.get(name, parameters)


@pytest.mark.parametrize("vocabulary", [257, 4096, 50257])
@pytest.mark.parametrize("name", MODERN)
def test_a_modern_preset_has_the_parameters_of_the_classic_one(name: str, vocabulary: int) -> None:
    classic = create_model_config(MODERN[name])
    config = create_model_config(name)
    for field in ("n_layer", "n_embd", "n_head", "max_position_embeddings", "vocab_size"):
        assert getattr(config, field) == getattr(classic, field)
    theirs = count(MODERN[name], vocab_size=vocabulary)
    assert count(name, vocab_size=vocabulary) == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("name", MODERN)
def test_a_modern_preset_is_qwen3(name: str) -> None:
    config = create_model_config(name)
    with torch.device("meta"):
        ours = GPTKitForCausalLM(config).state_dict()
        theirs = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=config.vocab_size,
                hidden_size=config.n_embd,
                num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                intermediate_size=config.n_inner,
            )
        ).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_a_field_of_a_modern_preset_can_go_back() -> None:
    config = create_model_config("modern-s", mlp="gelu", position_embedding="learned", norm="layernorm")
    assert (config.n_inner, config.hidden_act, config.rope_parameters) == (1024, "gelu_pytorch_tanh", None)
    assert config.qk_norm


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("gpt")])
def test_the_size_in_a_name_is_the_size(name: str) -> None:
    size = name.split("(")[1].rstrip(")")
    nominal = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert count(name) == pytest.approx(nominal, rel=0.025)


def test_transformers_counts_the_same() -> None:
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=384, n_head=6, n_positions=512))
    assert count("nano-m") == theirs.num_parameters()


@pytest.mark.parametrize("name", ["gpt2-small (124M)", "gpt2-small", "GPT2-Small (124m)", " GPT2-SMALL "])
def test_full_name_and_key_are_one_preset(name: str) -> None:
    assert create_model_config(name) == create_model_config("gpt2-small (124M)")


def test_overrides_replace_the_preset() -> None:
    config = create_model_config("gpt2-small", n_layer=3, hidden_act="gelu", vocab_size=61, use_bias=False)
    assert (config.n_layer, config.hidden_act, config.vocab_size, config.use_bias) == (3, "gelu", 61, False)
    assert config.n_embd == 768


def test_overrides_go_by_either_name() -> None:
    config = create_model_config("gpt2-small", hidden_size=512, num_attention_heads=8, n_ctx=64)
    assert (config.n_embd, config.n_head, config.max_position_embeddings) == (512, 8, 64)
    assert config.n_inner == 4 * 512
    # The same value as the preset's is an override as any other.
    with pytest.raises(UsageError, match="name the same field"):
        create_model_config("gpt2-small", hidden_size=512, n_embd=768)


def test_dropout_sets_all_three() -> None:
    config = create_model_config("nano-s", dropout=0.1)
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.1, 0.1, 0.1)
    config = create_model_config("nano-s", dropout=0.1, attn_pdrop=0.0)
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.1, 0.0, 0.1)
    config = create_model_config("nano-s")
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.0, 0.0, 0.0)


def test_eos_is_set_only_for_the_vocabulary_that_has_it() -> None:
    config = create_model_config("gpt2-small")
    assert (config.bos_token_id, config.eos_token_id) == (50256, 50256)
    config = create_model_config("gpt2-small", vocab_size=257)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    config = create_model_config("gpt2-small", eos_token_id=7)
    assert (config.bos_token_id, config.eos_token_id) == (50256, 7)
    assert create_model_config("gpt1").eos_token_id is None


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("gpt2-smal", {}, "unknown model preset 'gpt2-smal'; did you mean 'gpt2-small'"),
        ("llama", {}, "unknown model preset 'llama'; known: gpt2-small, .*nano-l"),
        ("gpt2-small (125M)", {}, "unknown model preset .* did you mean 'gpt2-small'"),
        ("nano-s", {"n_layers": 3}, "unknown config field 'n_layers'; did you mean 'n_layer'"),
        ("nano-s", {"n_head": 7}, "^n_embd must be divisible by n_head, got 256 and 7$"),
        ("nano-s", {"dropout": 1.5}, "^embd_pdrop must be at least 0 and below 1, got 1.5$"),
        ("nano-s", {"n_embd": "wide"}, r"^Field 'n_embd' expected int, got str \(value: 'wide'\)$"),
    ],
)
def test_a_mistake_is_a_usage_error_with_a_hint(name: str, overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        create_model_config(name, **overrides)


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["gpt2-small (124M)"] = {}  # type: ignore[index]
    create_model_config("gpt2-small", n_layer=1)
    assert create_model_config("gpt2-small").n_layer == 12


def test_model_options_change_only_what_is_given() -> None:
    options = ModelOptions(model="nano-m", n_layer=2, dropout=0.2, use_bias=False)
    config = build_config(options, vocab_size=257, eos_token_id=256, max_position_embeddings=99)
    assert (config.n_layer, config.attn_pdrop, config.use_bias) == (2, 0.2, False)
    assert (config.vocab_size, config.eos_token_id, config.max_position_embeddings) == (257, 256, 99)
    assert (config.n_embd, config.n_head) == (384, 6)
    assert build_config(ModelOptions(model="nano-m")) == create_model_config("nano-m")


def test_an_option_overrides_the_value_from_the_data() -> None:
    options = ModelOptions(max_position_embeddings=64)
    assert build_config(options, max_position_embeddings=99).max_position_embeddings == 64
