"""GPT-2 of transformers: a folder of it as a model of this package, and a model of this package as GPT-2."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.checkpoints.folders import checked
from gpt_kit_hf.model.checkpoints.layouts import (
    GPT2_NAMES,
    HEAD,
    POSITIONS,
    TOKENS,
    expand_braces,
    stored_shapes,
    stored_tensors,
)
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.options.model import Activation

# Fields that GPT2Config and GPTKitConfig share, the latter partly as aliases.
_GPT2_FIELDS = (
    *("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "activation_function"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "id2label", "label2id", "problem_type"),
)
# Switches of transformers' GPT-2 that this model lacks, with the values that it computes.
_GPT2_SWITCHES = MappingProxyType(
    {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
)


def config_of_gpt2(path: Path | str, stored: Mapping[str, Any]) -> GPTKitConfig:
    """Return the configuration for the content of a GPT-2's config.json; `path` names it in error messages."""
    gpt2 = checked(lambda: GPT2Config.from_dict(dict(stored)), path)
    for name, value in _GPT2_SWITCHES.items():
        if getattr(gpt2, name) != value:
            raise UsageError(f"{path}: {name}={getattr(gpt2, name)} is not supported; it must be {value}")
    if gpt2.activation_function not in get_args(Activation):
        raise UsageError(
            f"{path}: activation_function={gpt2.activation_function!r} is not supported; "
            f"it must be one of {', '.join(get_args(Activation))}"
        )
    return checked(lambda: GPTKitConfig(**{name: getattr(gpt2, name) for name in _GPT2_FIELDS}), path)


def as_gpt2(model: GPTKitForCausalLM) -> GPT2LMHeadModel:
    """Return a GPT2LMHeadModel that computes the same."""
    config = model.config
    ours = _tensors_for_gpt2(model)
    stored: dict[str, Tensor] = {}
    for theirs, target in GPT2_NAMES.items():
        if target == "" or (not target.startswith("model.") and target not in ours):
            continue
        for layer in range(config.n_layer if "{layer}" in target else 1):
            parts = expand_braces(target.removesuffix(".T").replace("{layer}", str(layer)))
            tensor = torch.cat([ours[part].detach().to("cpu") for part in parts])  # 3 of (D, D) -> (3D, D)
            tensor = tensor.T if target.endswith(".T") else tensor
            stored[theirs.replace("{layer}", str(layer))] = tensor.contiguous()
    fields = {name: getattr(config, name) for name in _GPT2_FIELDS}
    fields["activation_function"] = "gelu" if config.hidden_act == "gelu" else "gelu_new"
    fields["tie_word_embeddings"] = HEAD not in ours
    if config.n_inner == 4 * config.n_embd:
        fields["n_inner"] = None  # as in the published GPT-2: some readers do not know the field
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in stored.values()))
    gpt2 = GPT2LMHeadModel.from_pretrained(None, config=GPT2Config(**fields), state_dict=stored, dtype=dtype)
    gpt2.generation_config = copy.deepcopy(model.generation_config)
    return gpt2


def _tensors_for_gpt2(model: GPTKitForCausalLM) -> dict[str, Tensor]:
    """Return the model's tensors and those that only GPT-2 stores; the output projection only if it is not tied."""
    config = model.config
    for name, value in _shape_of_gpt2(config).items():
        if getattr(config, name) != value:
            raise UsageError(f"GPT-2 has {name}={value!r}, the model {getattr(config, name)!r}")
    if model.model.embed_positions is None:
        raise UsageError(f"GPT-2 has a table of positions, the model position_embedding={config.position_embedding!r}")
    ours = stored_tensors(model)
    if not config.use_bias:
        for name in stored_shapes(config).keys() - {TOKENS, POSITIONS, HEAD}:
            ours[f"{name.removesuffix('weight')}bias"] = ours[name].new_zeros(ours[name].shape[0])
    # Sinusoidal positions are a buffer that is not in the state dict.
    positions = model.model.embed_positions.weight
    assert isinstance(positions, Tensor)
    ours.setdefault(POSITIONS, positions.to(ours[TOKENS].dtype))
    return ours


def _shape_of_gpt2(config: GPTKitConfig) -> dict[str, object]:
    """Return the values of the fields that GPT-2 has none for."""
    heads = {"num_key_value_heads": config.n_head, "head_dim": config.n_embd // config.n_head}
    return {"norm": "layernorm", "mlp": "gelu", "qk_norm": False, **heads}
