"""Models from a file with a state dict of another program. The file's tensors tell most of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.checkpoints.layouts import (
    GPT2_NAMES,
    HEAD,
    KIT_NAMES,
    NANOGPT_NAMES,
    OWN_NAMES,
    POSITIONS,
    TOKENS,
    add_zero_biases,
    build_model,
    choose_class,
    equal_tensors,
    name_of_positions,
    refuse_names,
    rename_tensors,
)
from gpt_kit_hf.model.checkpoints.weight_files import merge_lora, read_state_dict, strip_prefix
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitPreTrainedModel
from gpt_kit_hf.model.presets import config_error_message

# Names of tensors, and the activation function that such a model has if nothing says otherwise.
_LAYOUTS: Mapping[str, tuple[Mapping[str, str], str]] = MappingProxyType(
    {
        "nanogpt": (NANOGPT_NAMES, "gelu"),
        "gpt2": (GPT2_NAMES, "gelu_new"),
        "kit": (KIT_NAMES, "gelu_pytorch_tanh"),
        "gpt-kit": (OWN_NAMES, "gelu_pytorch_tanh"),
    }
)
# The `model_args` that nanoGPT stores beside the weights, and the fields of GPTKitConfig.
_NANOGPT_ARGS = MappingProxyType(
    {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    | {"block_size": "max_position_embeddings", "bias": "use_bias", "dropout": "resid_pdrop"}
)


def load_state_dict(
    path: Path, layout: str, chosen: Mapping[str, Any], lora_scaling: float | None, drop_classifier: bool
) -> GPTKitPreTrainedModel:
    """Return the model in a file of weights whose tensors have the names of a layout; see `convert_checkpoint`."""
    (names, default_act), source = _LAYOUTS[layout], str(path)
    stored, checkpoint = read_state_dict(path)
    stored = merge_lora(stored, lora_scaling, source, transposed=layout == "gpt2")
    if wrong := _other_layout(stored, layout):
        raise UsageError(f"{path} holds tensors that the layout does not have: they are those of the layout {wrong}")
    stored = strip_prefix(stored, name_of_positions(names), source)
    fused = stored.get("transformer.h.0.attn.c_attn.weight")
    if fused is not None and fused.dim() == 2 and (fused.shape[0] > fused.shape[1]) is (layout == "gpt2"):
        other = "nanogpt" if layout == "gpt2" else "gpt2"
        raise UsageError(f"{path}: c_attn.weight has shape {tuple(fused.shape)}, which is that of the layout {other}")
    tensors = rename_tensors(stored, names, source)
    del stored  # otherwise it would keep the memory that `build_model` releases
    arguments = checkpoint.get("model_args", {})
    if not isinstance(arguments, Mapping):
        raise UsageError(f"{path}: model_args is a {type(arguments).__name__}; it must be a mapping")
    chosen = {**chosen, "hidden_act": chosen["hidden_act"] or default_act}
    config = _infer_config(tensors, arguments, chosen, source)
    kind = choose_class(tensors, config, source, drop=drop_classifier)
    add_zero_biases(tensors, config)
    return build_model(config, tensors, torch.float32, source, kind)


def _other_layout(stored: Mapping[str, Tensor], layout: str) -> str | None:
    """Return the layout that calls the position embedding as the file does, if the given one does not."""
    ends = {name: name_of_positions(names).split(".")[-2] for name, (names, _) in _LAYOUTS.items()}
    found = {name.split(".")[-2] for name in stored if name.endswith(".weight") and name.count(".") >= 1}
    return None if ends[layout] in found else next((name for name, end in ends.items() if end in found), None)


def _infer_config(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], chosen: Mapping[str, Any], source: str
) -> GPTKitConfig:
    """Return the configuration inferred from shapes, nanoGPT's `arguments` and `chosen` fields, which must agree."""
    up = "model.layers.0.mlp.up_proj.weight"
    tokens = tensors.get(TOKENS, tensors.get(HEAD, torch.empty(0)))
    matrices = {TOKENS: tokens, **{name: tensors.get(name, torch.empty(0)) for name in (POSITIONS, up)}}
    refuse_names(f"{source} lacks matrices of the layout", [n for n, matrix in matrices.items() if matrix.dim() != 2])
    n_head = arguments.get("n_head") if chosen["n_head"] is None else chosen["n_head"]
    if n_head is None:
        raise UsageError(f"{source}: n_head must be given; it cannot be inferred from shapes")
    inferred = {
        "vocab_size": tokens.shape[0],
        "n_embd": tokens.shape[1],
        "n_inner": matrices[up].shape[0],
        "max_position_embeddings": matrices[POSITIONS].shape[0],
        "n_layer": len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
        "use_bias": any(name.startswith("model.") and name.endswith(".bias") for name in tensors),
        "tie_word_embeddings": equal_tensors(tokens, tensors.get(HEAD, tokens)),
    }
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), arguments.get("dropout", 0.0))
    try:
        config = GPTKitConfig(**{**chosen, **inferred, **dropout, "n_head": n_head})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UsageError(f"{source}: {config_error_message(error)}") from None
    for name, value in arguments.items():
        if name not in _NANOGPT_ARGS:
            raise UsageError(
                f"{source}: model_args holds {name!r}, which nanoGPT does not have: its effect is unknown"
            )
        found = getattr(config, _NANOGPT_ARGS[name])
        if found != value:
            raise UsageError(f"{source}: model_args says {name}={value!r}, the tensors or arguments say {found!r}")
    return config
