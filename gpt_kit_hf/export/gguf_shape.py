"""A model as llama.cpp names it: its architecture, the metadata and the tensors of a GGUF file.

Tensor names are those of the package gguf. Shapes are those of torch; a GGUF file lists them the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.transformer_block import MultiHeadAttention, TransformerBlock

if TYPE_CHECKING:
    import gguf

# The fields that llama.cpp's architectures have in common with a model, and the values that they have there.
_GPT2 = {"norm": "layernorm", "mlp": "gelu", "qk_norm": False}
_MODERN = {"norm": "rmsnorm", "mlp": "swiglu"}
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: its name, and whether queries and keys are stored with neighbours as pairs."""

    name: str
    pairs_neighbours: bool = False


def choose_architecture(config: GPTKitConfig) -> Architecture:
    """Return the architecture that computes the same as a model.

    Raises UsageError with the field that stands in the way, if there is none.
    """
    if config.position_embedding == "rotary":
        _require(config, _MODERN, "with rotary positions")
        if config.qk_norm and config.use_bias:
            raise UsageError("use_bias=True: llama.cpp has no architecture with biases and qk_norm")
        _check_scaling(config)
        return Architecture("qwen3") if config.qk_norm else Architecture("llama", pairs_neighbours=True)
    _require(config, _GPT2, f"with {config.position_embedding} positions")
    if config.hidden_act == "gelu":
        raise UsageError("hidden_act='gelu': llama.cpp's gpt2 computes the tanh approximation, gelu_pytorch_tanh")
    if config.num_key_value_heads != config.n_head:
        raise UsageError(f"num_key_value_heads={config.num_key_value_heads}: llama.cpp's gpt2 has one per head")
    if config.head_dim != config.n_embd // config.n_head:
        raise UsageError(f"head_dim={config.head_dim}: llama.cpp's gpt2 has n_embd / n_head")
    return Architecture("gpt2")


def _require(config: GPTKitConfig, values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        if getattr(config, name) != value:
            given = getattr(config, name)
            raise UsageError(f"{name}={given!r}: llama.cpp has no such architecture {where}, it has {name}={value!r}")


def _check_scaling(config: GPTKitConfig) -> None:
    assert config.rope_parameters is not None  # rotary positions have them
    kind = config.rope_parameters["rope_type"]
    if kind == "llama3" and config.qk_norm:
        raise UsageError("rope_type='llama3': llama.cpp has it without qk_norm only; linear and yarn can be written")
    if kind == "yarn":
        known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", *_YARN_DEFAULTS}
        for name, value in config.rope_parameters.items():
            if name not in known or (name in _YARN_DEFAULTS and value != _YARN_DEFAULTS[name]):
                raise UsageError(f"rope_parameters: llama.cpp computes yarn without {name}={value!r}")


def add_metadata(writer: gguf.GGUFWriter, config: GPTKitConfig) -> None:
    """Add the sizes of a model."""
    assert config.n_inner is not None  # the configuration sets these three
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_vocab_size(config.vocab_size)
    if config.position_embedding != "rotary":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    _add_rotation(writer, config)


def _add_rotation(writer: gguf.GGUFWriter, config: GPTKitConfig) -> None:
    import gguf

    rotation = config.rope_parameters
    assert rotation is not None  # rotary positions have them
    writer.add_rope_freq_base(float(rotation["rope_theta"]))
    if rotation["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotation["factor"]))
    elif rotation["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rotation["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rotation["original_max_position_embeddings"])


def tensors_of(model: GPTKitForCausalLM, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model by their names in the file, in its own dtype; a tied head is left out."""
    base, config = model.model, model.config
    yield "token_embd.weight", base.embed_tokens.weight
    if base.embed_positions is not None:
        positions = base.embed_positions.weight
        assert isinstance(positions, Tensor)
        yield "position_embd.weight", positions
    yield from _with_bias("output_norm", base.norm, zeros=architecture.name == "gpt2")
    if not torch.equal(model.lm_head.weight, base.embed_tokens.weight):
        yield "output.weight", model.lm_head.weight
    if config.rope_parameters is not None and config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _rate_factors(config)
    for number, layer in enumerate(base.layers):
        assert isinstance(layer, TransformerBlock)
        for name, tensor in _of_block(layer, architecture):
            yield f"blk.{number}.{name}", tensor


def _of_block(layer: TransformerBlock, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    attention, mlp = layer.self_attn, layer.mlp
    classic = architecture.name == "gpt2"
    yield from _with_bias("attn_norm", layer.input_layernorm, zeros=classic)
    if classic:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        yield "attn_qkv.weight", torch.cat([each.weight for each in projections])  # 3 of (D, D) -> (3D, D)
        yield "attn_qkv.bias", torch.cat([_bias(each) for each in projections])
    else:
        for name, tensor in _with_bias("attn_q", attention.q_proj):
            yield name, _paired(tensor, attention) if architecture.pairs_neighbours else tensor
        for name, tensor in _with_bias("attn_k", attention.k_proj):
            yield name, _paired(tensor, attention) if architecture.pairs_neighbours else tensor
        yield from _with_bias("attn_v", attention.v_proj)
    if attention.q_norm is not None and attention.k_norm is not None:
        yield "attn_q_norm.weight", attention.q_norm.weight
        yield "attn_k_norm.weight", attention.k_norm.weight
    yield from _with_bias("attn_output", attention.o_proj, zeros=classic)
    yield from _with_bias("ffn_norm", layer.post_attention_layernorm, zeros=classic)
    if mlp.gate_proj is not None:
        yield from _with_bias("ffn_gate", mlp.gate_proj)
    yield from _with_bias("ffn_up", mlp.up_proj, zeros=classic)
    yield from _with_bias("ffn_down", mlp.down_proj, zeros=classic)


def _with_bias(name: str, module: nn.Module, *, zeros: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight and the bias of a module, zeros for an absent bias if asked for."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    yield f"{name}.weight", weight
    if zeros or getattr(module, "bias", None) is not None:
        yield f"{name}.bias", _bias(module)


def _bias(module: nn.Module) -> Tensor:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return bias if isinstance(bias, Tensor) else weight.new_zeros(weight.shape[0])


def _paired(tensor: Tensor, attention: MultiHeadAttention) -> Tensor:
    """Return the rows of a projection with the halves of each head interleaved: i and i + Dh/2 become neighbours."""
    half = attention.head_dim // 2
    by_half = tensor.reshape(-1, 2, half, *tensor.shape[1:])  # (H * Dh, ...) -> (H, 2, Dh/2, ...)
    return by_half.transpose(1, 2).reshape(tensor.shape)


def _rate_factors(config: GPTKitConfig) -> Tensor:
    """Return by how much each rotation rate of Llama 3's scaling is slower than without it, (Dh/2,)."""
    assert config.rope_parameters is not None
    assert config.head_dim is not None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    factors: Tensor = plain / scaled
    return factors
