"""Folders of transformers' Llama and Qwen3 whose configuration this package's model cannot compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import gpt_kit
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES: dict[str, Any] = {
    **{"vocab_size": 31, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32},
}


def rotation(kind: str, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it must be 'silu'"),
    ("qwen3", {"hidden_act": "relu"}, "hidden_act='relu' is not supported; it must be 'silu'"),
    ("llama", {"attention_bias": True}, "attention_bias=True is not supported; it must be False, as that of the feed"),
    (
        "llama",
        {"mlp_bias": True},
        "attention_bias=False is not supported; it must be True, as that of the feed-forwar",
    ),
    ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported; it must be False, as that of the feed"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; it must be 1.0"),
    ("llama", rotation("default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    (
        "llama",
        rotation("dynamic", factor=2.0),
        "rope_type must be one of default, linear, yarn, llama3, got 'dynamic'",
    ),
    ("llama", rotation("llama3", factor=2.0), "Missing required keys in `rope_parameters` for 'rope_type'='llama3'"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
        "layers of 'sliding_attention' (sliding_window=8) are not supported",
    ),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layers of 'sliding_attention' (sliding_wind"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "the weights are quantized"),
    ("llama", {"model_type": "mistral"}, "model_type is 'mistral'; it must be 'gpt2' or 'llama' or 'qwen3'"),
    ("llama", {"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    ("llama", {"num_key_value_heads": 3}, "n_head must be divisible by num_key_value_heads, got 2 and 3"),
    ("llama", {"attention_dropout": 1.5}, "attn_pdrop must be at least 0 and below 1, got 1.5"),
    ("llama", {"rms_norm_eps": 0.0}, "layer_norm_epsilon must be positive and finite, got 0.0"),
    ("llama", {"num_hidden_layers": 3}, "lacks tensors of the model: model.layers.2."),
    (
        "qwen3",
        {"num_hidden_layers": 1, "layer_types": None},
        "holds tensors that the model does not have: model.layers.1",
    ),
    ("qwen3", {"head_dim": 6}, "has shape"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_a_configuration_that_the_model_cannot_compute(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source, made = tmp_path / "theirs", tmp_path / "ours"
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**SIZES))
    model.save_pretrained(source)
    config = source / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    ended = gpt_kit("convert", source, made)
    assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert str(source) in ended.stderr
    assert message in ended.stderr
    assert not made.exists()
