"""The transformer block and its parts. This file is copied into saved model folders as remote code.

Shapes: B batch size, T input tokens, S tokens that attention sees (input and cache), D model width (`n_embd`),
H heads (Hk of keys and values), Dh head width, F feed-forward width (`n_inner`).
"""

# No `from __future__ import annotations` here: transformers reads the annotation of `**kwargs` at run time.

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import GELU, LayerNorm, SiLU
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_gpt_kit import GPTKitConfig
from .packed_documents import varlen_attention_forward
from .positions import rotate


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """Return the attention output (B, T, H, Dh) and the attention weights (B, H, T, S), in plain tensor operations.

    `query` is (B, H, T, Dh), `key` and `value` are (B, Hk, S, Dh), `attention_mask` is added to the scores.
    Scaled dot-product attention: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-2, -1) * scaling  # (B, H, T, Dh) @ (B, H, Dh, S) -> (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    # In float32: a softmax over a long row is too inexact in half precision.
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = (weights @ value).transpose(1, 2).contiguous()  # (B, H, T, S) @ (B, H, S, Dh) -> (B, T, H, Dh)
    return output, weights


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square of the last dimension, times a weight (Zhang and Sennrich 2019, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each vector; the weight takes the type of the input, which autocast may have lowered."""
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def create_norm(config: GPTKitConfig) -> LayerNorm | RMSNorm:
    """Return the norm of a block or of the model: (B, T, D) -> (B, T, D)."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
    return LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.use_bias)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with `n_head` heads: (B, T, D) -> (B, T, D), and the weights if the backend has them."""

    def __init__(self, config: GPTKitConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None  # the configuration sets both
        assert config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attn_pdrop
        self.is_causal = True
        self.num_key_value_groups = config.n_head // config.num_key_value_heads  # the backends repeat keys by it
        queries, keys = config.n_head * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, queries, bias=config.use_bias)
        self.k_proj = nn.Linear(config.n_embd, keys, bias=config.use_bias)
        self.v_proj = nn.Linear(config.n_embd, keys, bias=config.use_bias)
        self.o_proj = nn.Linear(queries, config.n_embd, bias=config.use_bias)
        # QK-norm: Henry et al. 2020, with a weight in place of the fixed scale. It bounds the scores.
        self.q_norm = RMSNorm(self.head_dim, eps=config.layer_norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.layer_norm_epsilon) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Let each token attend to itself and to the earlier tokens that `attention_mask` allows."""
        input_shape = hidden_states.shape[:-1]  # (B, T)
        head_shape = (*input_shape, -1, self.head_dim)  # (B, T, H, Dh)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, T, D) -> (B, H, T, Dh)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, T, D) -> (B, Hk, T, Dh)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, T, D) -> (B, Hk, T, Dh)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, Hk, T, Dh) -> (B, Hk, S, Dh)
        attention_interface: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # Continuous batching passes a `cache`, and lengths that are for it.
        if self.config._attn_implementation == "sdpa" and "cu_seq_lens_q" in kwargs and "cache" not in kwargs:
            attention_interface = varlen_attention_forward
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*input_shape, -1).contiguous()  # (B, T, H, Dh) -> (B, T, H * Dh)
        return self.o_proj(output), weights  # -> (B, T, D)


class FeedForward(nn.Module):
    """The layer that works on each token alone: (B, T, D) -> (B, T, D).

    `gelu`: two linear layers with a GELU between them. `swiglu`: SiLU(gate) * up in the middle, with a third linear
    layer as the gate (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6).
    """

    def __init__(self, config: GPTKitConfig) -> None:
        super().__init__()
        assert config.n_inner is not None  # the configuration sets it
        self.gate_proj = None
        if config.mlp == "swiglu":
            self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.use_bias)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.use_bias)
        # GPT-2's "gelu_new" is the tanh approximation under another name (Hendrycks and Gimpel 2016, section 2).
        gelu = GELU(approximate="none" if config.hidden_act == "gelu" else "tanh")
        self.act_fn = SiLU() if config.hidden_act == "silu" else gelu
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.use_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform each token independently of the others."""
        if self.gate_proj is None:
            inner: Tensor = self.act_fn(self.up_proj(hidden_states))  # (B, T, D) -> (B, T, F)
        else:
            inner = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        output: Tensor = self.down_proj(inner)  # (B, T, F) -> (B, T, D)
        return output


class TransformerBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a normalised input and a residual connection (pre-norm)."""

    def __init__(self, config: GPTKitConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = create_norm(config)
        self.self_attn = MultiHeadAttention(config, layer_idx)
        self.post_attention_layernorm = create_norm(config)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); some attention backends detect packed documents from `position_ids`."""
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attention_output)
        mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = hidden_states + self.dropout(mlp_output)
        return hidden_states
