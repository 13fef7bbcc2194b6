"""The operations of a model's blocks in decoding, with all matrices in one layout.

Shapes: B batch size, T input tokens, S cache size in tokens, D model width, H heads, Hk heads of keys and values,
Dh head width, F feed-forward width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_kit_hf.generation.layouts import Layout, Linear, row_by_row
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.transformer_block import FeedForward, MultiHeadAttention, TransformerBlock


class Block(NamedTuple):
    """The operations of a transformer block."""

    attention_norm: Linear
    query_key_value: Linear  # (B, T, D) -> (B, T, (H + 2 Hk) Dh)
    query_key_norm: Linear | None  # (B, H + Hk, T, Dh) -> the same shape
    attention_output: Linear
    mlp_norm: Linear
    mlp: Linear


class Matrices(NamedTuple):
    """All matrices of a model in one layout, with what is computed between them."""

    blocks: list[Block]
    head: Linear


def unpacked_matrices(model: GPTKitForCausalLM, dtype: torch.dtype) -> Matrices:
    """Return the matrices on the model's own weights; nothing is copied here."""

    def linear(module: nn.Linear) -> Linear:
        # 16-bit weights on a CPU are converted at each use: most CPUs compute slower in 16 bits than in float32.
        return lambda inputs: F.linear(
            inputs, module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)
        )

    def joined(*modules: nn.Linear) -> Linear:
        layers = [linear(module) for module in modules]
        return layers[0] if len(layers) == 1 else lambda inputs: torch.cat([it(inputs) for it in layers], dim=-1)

    return _matrices(model, joined, dtype, map)


def packed_matrices(model: GPTKitForCausalLM, layout: Layout, dtype: torch.dtype) -> Matrices:
    """Return copies of the matrices in the given layout."""

    @torch.no_grad()  # the grad mode is set per thread
    def joined(*modules: nn.Linear) -> Linear:
        weights = [module.weight.to(dtype) for module in modules]
        biases = [module.bias.to(dtype) for module in modules if module.bias is not None]
        if len(modules) == 1:
            return layout(weights[0], biases[0] if biases else None)
        return layout(torch.cat(weights), torch.cat(biases) if biases else None)

    if layout is row_by_row:
        return _matrices(model, joined, dtype, map)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, warnings.catch_warnings():  # packing is single-threaded
        # torch announces the removal of quantized tensors; `has_packed_products` checks that they are still there.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        return _matrices(model, joined, dtype, pool.map)


def _matrices(
    model: GPTKitForCausalLM, joined: Callable[..., Linear], dtype: torch.dtype, apply: Callable[..., Iterator[Any]]
) -> Matrices:
    """Return the matrices that `joined` makes of one or several linear modules, computed by `map` or a pool's map."""

    def block(layer: TransformerBlock) -> Block:
        attention = layer.self_attn
        return Block(
            attention_norm=norm_of(layer.input_layernorm, dtype),
            query_key_value=joined(attention.q_proj, attention.k_proj, attention.v_proj),
            query_key_norm=_query_key_norm(attention, dtype),
            attention_output=joined(attention.o_proj),
            mlp_norm=norm_of(layer.post_attention_layernorm, dtype),
            mlp=_mlp(layer.mlp, joined),
        )

    head = apply(joined, [model.lm_head])  # first: it is the largest matrix
    blocks = list(apply(block, model.model.layers[: model.config.n_layer]))
    return Matrices(blocks, next(iter(head)))


def norm_of(norm: nn.LayerNorm | nn.RMSNorm, dtype: torch.dtype) -> Linear:
    """Return the norm (B, T, D) -> (B, T, D), with its weight in the given dtype."""
    weight = norm.weight.to(dtype)
    if isinstance(norm, nn.RMSNorm):
        return _rms_norm(weight, norm.eps)
    bias = None if norm.bias is None else norm.bias.to(dtype)
    return lambda inputs: F.layer_norm(inputs, norm.normalized_shape, weight, bias, norm.eps)


def _rms_norm(weight: Tensor, eps: float | None) -> Linear:
    """Return x / sqrt(mean(x^2) + eps) * weight, over the last dimension of width n."""
    assert eps is not None  # the configuration sets it
    width = weight.shape[-1]
    if weight.device.type != "cpu":
        return lambda inputs: F.rms_norm(inputs, (width,), None, eps) * weight
    # On a CPU torch takes six operations. Here it is x / hypot(|x|, sqrt(n eps)) * (sqrt(n) weight).
    scaled, least = weight * math.sqrt(width), torch.tensor(math.sqrt(width * eps))
    return lambda inputs: inputs / torch.linalg.vector_norm(inputs, dim=-1, keepdim=True).hypot(least) * scaled


def _query_key_norm(attention: MultiHeadAttention, dtype: torch.dtype) -> Linear | None:
    """Return the norm of all heads of queries and keys together, (B, H + Hk, T, Dh) -> the same shape."""
    query, key = attention.q_norm, attention.k_norm
    if query is None or key is None:
        return None
    heads = attention.config.n_head, attention.config.n_head // attention.num_key_value_groups
    each = [norm.weight.to(dtype).expand(count, -1) for norm, count in zip((query, key), heads, strict=True)]
    weight = torch.cat(each).unsqueeze(1)  # (H + Hk, 1, Dh)
    return _rms_norm(weight, query.eps)


def _mlp(mlp: FeedForward, joined: Callable[..., Linear]) -> Linear:
    activation, down = mlp.act_fn, joined(mlp.down_proj)
    if mlp.gate_proj is None:
        up = joined(mlp.up_proj)
        return lambda inputs: down(activation(up(inputs)))
    gate_up = joined(mlp.gate_proj, mlp.up_proj)

    def gated(inputs: Tensor) -> Tensor:
        gate, up = gate_up(inputs).chunk(2, dim=-1)  # (B, T, 2 F) -> (B, T, F) each
        return down(activation(gate) * up)

    return gated


def rotation_table(cosine: Tensor, sine: Tensor) -> Tensor:
    """(S, Dh) each -> (2, S, Dh): the factors of a head, and of the head with its halves exchanged."""
    first, second = sine.chunk(2, dim=-1)
    return torch.stack((cosine, torch.cat((-first, second), dim=-1)))


def rotated(heads: Tensor, table: Tensor) -> Tensor:
    """Turn queries and keys (B, H, T, Dh) by rows of a `rotation_table` (2, T, Dh): `positions.rotate`."""
    cosine, sine = table.unbind()
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), sine)
