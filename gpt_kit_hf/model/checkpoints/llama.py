"""Llama and Qwen3 of transformers: a folder of theirs as a model of this package, and back.

Their tensors have the names that this package's have, so that only the configuration changes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.checkpoints.folders import checked
from gpt_kit_hf.model.checkpoints.layouts import HEAD, stored_tensors
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM

# Fields that their configurations and GPTKitConfig share, the latter partly as aliases.
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "id2label", "label2id", "problem_type"),
)
_SHAPE = MappingProxyType(
    {"position_embedding": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "hidden_act": "silu"},
)


def config_of_llama(path: Path | str, stored: Mapping[str, Any]) -> GPTKitConfig:
    """Return the configuration for the content of a Llama's or Qwen3's config.json; `path` names it in messages.

    Raises UsageError with the field that this model cannot represent.
    """
    is_qwen = stored["model_type"] == Qwen3Config.model_type
    native = checked(lambda: (Qwen3Config if is_qwen else LlamaConfig).from_dict(dict(stored)), path)
    _check_represented(path, native.to_dict())
    fields = {name: getattr(native, name) for name in _FIELDS}
    fields |= {"qk_norm": is_qwen, "use_bias": native.attention_bias, "attn_pdrop": native.attention_dropout or 0.0}
    return checked(lambda: GPTKitConfig(**_SHAPE, **fields, rope_parameters=dict(native.rope_parameters)), path)


def _check_represented(path: Path | str, found: Mapping[str, Any]) -> None:
    """Raise UsageError with the first field whose value this model has no switch for."""
    # Qwen3's feed-forward layers never have biases.
    needed = {"hidden_act": "silu", "attention_bias": found.get("mlp_bias", False), "partial_rotary_factor": 1.0}
    values = {**found, "partial_rotary_factor": found["rope_parameters"].get("partial_rotary_factor", 1.0)}
    for name, value in needed.items():
        if values[name] != value:
            rule = ", as that of the feed-forward layers" if name == "attention_bias" else ""
            raise UsageError(f"{path}: {name}={values[name]!r} is not supported; it must be {value!r}{rule}")
    if other := set(found.get("layer_types") or ()) - {"full_attention"}:
        raise UsageError(
            f"{path}: layers of {min(other)!r} (sliding_window={found.get('sliding_window')}) are not supported; all "
            "layers must see the whole context"
        )


def as_llama(model: GPTKitForCausalLM) -> PreTrainedModel:
    """Return a Qwen3ForCausalLM, or a LlamaForCausalLM if the model has no qk_norm, that computes the same.

    The configuration must have the shape of one of them.
    """
    config, tensors = model.config, stored_tensors(model)
    fields = {name: getattr(config, name) for name in _FIELDS}
    fields |= {
        "tie_word_embeddings": HEAD not in tensors,
        "rope_parameters": copy.deepcopy(config.rope_parameters),
        "attention_bias": config.use_bias,
        "attention_dropout": config.attn_pdrop,
    }
    kind = Qwen3ForCausalLM if config.qk_norm else LlamaForCausalLM
    native = kind.config_class(**fields, **({} if config.qk_norm else {"mlp_bias": config.use_bias}))
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    stored = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
    made: PreTrainedModel = kind.from_pretrained(None, config=native, state_dict=stored, dtype=dtype)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made
