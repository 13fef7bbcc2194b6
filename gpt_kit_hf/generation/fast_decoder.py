"""Token-by-token decoding with packed weights and a key-value cache of fixed size.

Shapes: B batch size, T input tokens, S cache size in tokens, D model width, H heads, Hk heads of keys and values,
Dh head width, V vocabulary size.
"""

from __future__ import annotations

import threading
from typing import get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.generation.decoding_blocks import (
    Block,
    Matrices,
    norm_of,
    packed_matrices,
    rotated,
    rotation_table,
    unpacked_matrices,
)
from gpt_kit_hf.generation.layouts import Layout, Linear, has_packed_products, layout_of
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.own_class import is_gpt_kit, own_model
from gpt_kit_hf.options.generation import DecodingDtype

# Packing pays off from this number of new tokens on.
_MIN_TOKENS_TO_PACK = 32
# Packed weights of dtype "auto" are cached up to this model size.
_MAX_CACHED_BYTES = 1 << 30

# Packed weights by model and dtype, with the address and version of each parameter at the time of packing.
_kept: WeakKeyDictionary[nn.Module, dict[str, tuple[list[tuple[int, int]], Matrices]]] = WeakKeyDictionary()
_packing = threading.Lock()


class Decoder:
    """Predict next tokens of rows without padding, with a model of this package on one CPU or CUDA GPU.

    A CPU computes in float32, a GPU in the model's dtype. `dtype` is that of the matrices: "auto" keeps the model's;
    on a CPU, "float16" rounds them, and "int8" quantizes them to 8 bits with a scale per row, and the inputs of each
    product to 8 bits. The model's weights must not change while the decoder is in use. Raises UsageError for a model
    that the decoder does not support, and for a dtype without products on this machine.
    """

    def __init__(self, model: GPTKitForCausalLM, dtype: DecodingDtype = "auto", *, keep_packed: bool = False) -> None:
        if dtype not in get_args(DecodingDtype):
            raise UsageError(unknown_name("dtype", str(dtype), get_args(DecodingDtype)))
        if (reason := why_not(model)) is not None:
            raise UsageError(f"dtype={dtype}: {reason}")
        model = own_model(model) or model  # `why_not` has checked that there is one
        self._device: torch.device = model.device
        if dtype != "auto" and self._device.type != "cpu":
            raise UsageError(f"dtype={dtype}: only on a CPU, and the model is on {self._device}; use auto")
        if dtype != "auto" and not has_packed_products(dtype):
            raise UsageError(f"dtype={dtype}: this CPU's torch has no such products; use auto")
        self._model, self._dtype, self._keep_packed = model, dtype, keep_packed
        self._compute_dtype = torch.float32 if self._device.type == "cpu" else model.dtype
        self._unpacked = unpacked_matrices(model, self._compute_dtype)
        self._packed: Matrices | None = None
        self._norm = norm_of(model.model.norm, self._compute_dtype)
        self._positions: Tensor | None = None  # (S, D): added to the embeddings of the tokens
        self._rotation: Tensor | None = None  # (2, S, Dh): see `rotation_table`
        self._caches: list[Tensor] = []  # (B, 2 Hk, S, Dh) each: keys, then values
        self._length = 0  # tokens in the cache

    def pack(self) -> None:
        """Copy the weights into a layout that is fast for single tokens.

        The copy is cached for later decoders as long as the model lives and its weights do not change; not for a model
        in training mode, whose weights will change, and with "auto" not for a large model, unless `keep_packed` asks
        for it. Threads share one copy.
        """
        layout = layout_of(self._dtype, self._model.dtype, self._device)
        if self._packed is None and layout is not None:
            with _packing:
                self._pack(layout)

    def _pack(self, layout: Layout) -> None:
        state = [(p.data_ptr(), p._version) for p in self._model.parameters()]
        kept = _kept.setdefault(self._model, {})
        if self._dtype in kept and kept[self._dtype][0] == state:
            self._packed = kept[self._dtype][1]
            return
        kept.pop(self._dtype, None)
        self._packed = packed_matrices(self._model, layout, self._compute_dtype)
        is_small = sum(p.nbytes for p in self._model.parameters()) <= _MAX_CACHED_BYTES
        if not self._model.training and (is_small or self._dtype != "auto" or self._keep_packed):
            kept[self._dtype] = state, self._packed

    def start(self, prompt: Tensor, length: int) -> Tensor:
        """Read a prompt (B, T) into a new cache of `length` tokens; return the next token's logits (B, V).

        The prompt is read with the model's own weights: packing is of no use for many tokens at once.
        """
        return self._unpacked.head(self._read(prompt, length).select(1, -1)).float()

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each row, (B,); return the next token's logits (B, V)."""
        matrices = self._packed or self._unpacked
        return matrices.head(self._forward(tokens.unsqueeze(1), matrices).squeeze(1)).float()

    @torch.no_grad()
    def divergence(self, ids: Tensor) -> tuple[float, float]:
        """Return how far the packed weights' predictions after each token of (B, T) are from the model's own.

        The mean of KL(model, packed) in nats per token, and the share of positions with the same most likely token.
        The tokens are read one at a time, as in generation, so it takes as long.
        """
        self.pack()
        logits = self._unpacked.head(self._read(ids, ids.shape[1]))  # (B, T) -> (B, T, V)
        own = logits.float().log_softmax(dim=-1)
        self._length = 0
        packed = torch.stack([self.step(token).log_softmax(dim=-1) for token in ids.unbind(dim=1)], dim=1)
        kl = F.kl_div(packed, own, reduction="none", log_target=True).sum(dim=-1)  # (B, T, V) -> (B, T)
        same = own.argmax(dim=-1) == packed.argmax(dim=-1)
        return float(kl.mean()), float(same.float().mean())

    def _read(self, ids: Tensor, length: int) -> Tensor:
        """(B, T) -> (B, T, D), into a new cache of `length` tokens, with the model's own weights."""
        config, base = self._model.config, self._model.model
        assert config.num_key_value_heads is not None  # the configuration sets both
        assert config.head_dim is not None
        shape = (len(ids), 2 * config.num_key_value_heads, length, config.head_dim)  # (B, 2 Hk, S, Dh)
        blocks = self._unpacked.blocks
        self._caches = [torch.empty(shape, device=self._device, dtype=self._compute_dtype) for _ in blocks]
        self._length = 0
        positions = torch.arange(length, device=self._device)
        if base.embed_positions is not None:
            self._positions = base.embed_positions(positions).to(self._compute_dtype)
        if base.rotary_emb is not None:
            self._rotation = rotation_table(*base.rotary_emb(positions, self._compute_dtype))
        return self._forward(ids, self._unpacked)

    def _forward(self, ids: Tensor, matrices: Matrices) -> Tensor:
        """(B, T) -> (B, T, D): hidden states of the tokens after those in the cache; adds them to the cache."""
        start, self._length = self._length, self._length + ids.shape[1]
        hidden = F.embedding(ids, self._model.model.embed_tokens.weight).to(self._compute_dtype)
        if self._positions is not None:
            hidden = hidden + self._positions.narrow(0, start, ids.shape[1])
        rotation = None if self._rotation is None else self._rotation.narrow(1, start, ids.shape[1])
        for block, cache in zip(matrices.blocks, self._caches, strict=True):
            hidden = hidden + self._attend(block, hidden, cache, rotation)
            hidden = hidden + block.mlp(block.mlp_norm(hidden))
        return self._norm(hidden)

    def _attend(self, block: Block, hidden: Tensor, cache: Tensor, rotation: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D): adds the tokens to the cache (B, 2 Hk, S, Dh), and attends to all in it."""
        rows, count, _ = hidden.shape
        n_queries, n_cached = self._model.config.n_head, cache.shape[1]  # H, 2 Hk
        heads = block.query_key_value(block.attention_norm(hidden)).view(rows, count, -1, cache.shape[3])
        heads = heads.transpose(1, 2)  # (B, T, H + 2 Hk, Dh) -> (B, H + 2 Hk, T, Dh)
        if block.query_key_norm is not None or rotation is not None:
            heads = _turned(heads, n_queries + n_cached // 2, block.query_key_norm, rotation)
        cache.narrow(2, self._length - count, count).copy_(heads.narrow(1, n_queries, n_cached))
        keys, values = cache.narrow(2, 0, self._length).chunk(2, dim=1)  # (B, Hk, S, Dh) each
        attended = F.scaled_dot_product_attention(
            heads.narrow(1, 0, n_queries), keys, values, is_causal=count > 1, enable_gqa=n_queries != n_cached // 2
        )
        return block.attention_output(attended.transpose(1, 2).flatten(2))  # (B, H, T, Dh) -> (B, T, D)


def _turned(heads: Tensor, count: int, norm: Linear | None, rotation: Tensor | None) -> Tensor:
    """Normalise and rotate the first `count` heads, those of queries and keys, of (B, H + 2 Hk, T, Dh)."""
    turned = heads.narrow(1, 0, count)
    if norm is not None:
        turned = norm(turned)
    if rotation is not None:
        turned = rotated(turned, rotation)
    return torch.cat((turned, heads.narrow(1, count, heads.shape[1] - count)), dim=1)


def why_not(model: nn.Module) -> str | None:
    """Return why a `Decoder` does not support a model, or None if it does."""
    own = own_model(model)
    if own is None or type(own) is not GPTKitForCausalLM:
        computes = ", as its code computes something else" if own is None and is_gpt_kit(model) else ""
        return f"{type(model).__name__} is no plain GPTKitForCausalLM{computes}"
    device = own.device
    if device.type not in ("cpu", "cuda"):
        return f"the model is on {device}, and only a CPU or a CUDA GPU is supported"
    for name, parameter in model.named_parameters():
        if parameter.device != device:
            return f"{name} is on {parameter.device}, the other parameters are on {device}"
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16) or type(parameter.data) is not Tensor:
            return (
                f"{name} is a {parameter.dtype} {type(parameter.data).__name__}, not a plain 32-bit or 16-bit tensor"
            )
    for name, module in model.named_modules():
        is_matrix = name.endswith("_proj") or name == "lm_head"
        if is_matrix and type(module) is not nn.Linear:
            return f"{name} is {type(module).__name__}, not a plain linear layer"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks"
    return None


def pays(new_tokens: int) -> bool:
    """Return whether packing the weights saves time for this number of new tokens."""
    return new_tokens >= _MIN_TOKENS_TO_PACK
