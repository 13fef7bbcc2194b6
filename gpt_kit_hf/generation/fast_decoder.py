"""Token-by-token decoding with packed weights and a key-value cache of fixed size.

Shapes: B batch size, T input tokens, S cache size in tokens, D model width, H heads, Hk heads of keys and values,
Dh head width, V vocabulary size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias, get_args
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

# Adds queries, keys and values (B, H + 2 Hk, T, Dh) to a cache (B, 2 Hk, S, Dh); returns the result (B, H, T, Dh).
Attend: TypeAlias = Callable[[Tensor, Tensor], Tensor]

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
        self.on_gpu = _is_gpu(self._device)
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
        self._place: Tensor | None = None  # (1,): the same number on a GPU, where `step` reads and increases it
        self._slots: Tensor | None = None  # (S,): 0, 1, ...

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
        """Add a token to each row, (B,); return the next token's logits (B, V).

        On a GPU all shapes and addresses are the same in each step, and nothing is read back, so that a CUDA graph can
        capture it.
        """
        matrices = self._packed or self._unpacked
        forward = self._forward_one if self.on_gpu else self._forward
        return matrices.head(forward(tokens.unsqueeze(1), matrices).squeeze(1)).float()

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
        if self._place is not None:
            self._place.zero_()
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
        # On a GPU, attention reads the empty places too, and masks them: a NaN that memory held there would stay one.
        created = torch.zeros if self.on_gpu else torch.empty
        self._caches = [created(shape, device=self._device, dtype=self._compute_dtype) for _ in blocks]
        self._length = 0
        self._slots = positions = torch.arange(length, device=self._device)
        if base.embed_positions is not None:
            self._positions = base.embed_positions(positions).to(self._compute_dtype)
        if base.rotary_emb is not None:
            self._rotation = rotation_table(*base.rotary_emb(positions, self._compute_dtype))
        if self.on_gpu:
            self._place = torch.full((1,), ids.shape[1], device=self._device)
        return self._forward(ids, self._unpacked)

    def _forward(self, ids: Tensor, matrices: Matrices) -> Tensor:
        """(B, T) -> (B, T, D): hidden states of the tokens after those in the cache; adds them to the cache."""
        start, self._length = self._length, self._length + ids.shape[1]
        positions = None if self._positions is None else self._positions.narrow(0, start, ids.shape[1])
        rotation = None if self._rotation is None else self._rotation.narrow(1, start, ids.shape[1])
        n_queries = self._model.config.n_head

        def attend(heads: Tensor, cache: Tensor) -> Tensor:
            n_cached = cache.shape[1]  # 2 Hk
            cache.narrow(2, start, ids.shape[1]).copy_(heads.narrow(1, n_queries, n_cached))
            keys, values = cache.narrow(2, 0, self._length).chunk(2, dim=1)  # (B, Hk, S, Dh) each
            is_grouped = n_queries != n_cached // 2
            return F.scaled_dot_product_attention(
                heads.narrow(1, 0, n_queries), keys, values, is_causal=ids.shape[1] > 1, enable_gqa=is_grouped
            )

        return self._through_blocks(ids, matrices, positions, rotation, attend)

    def _forward_one(self, ids: Tensor, matrices: Matrices) -> Tensor:
        """(B, 1) -> (B, 1, D): the same for a token, with the number of cached tokens in a tensor."""
        place, slots, n_queries = self._place, self._slots, self._model.config.n_head
        assert place is not None
        assert slots is not None
        positions = None if self._positions is None else self._positions.index_select(0, place)
        rotation = None if self._rotation is None else self._rotation.index_select(1, place)
        is_filled = (slots <= place).view(1, 1, 1, -1)  # (S,) -> (1, 1, 1, S)

        def attend(heads: Tensor, cache: Tensor) -> Tensor:
            rows, n_cached, _, width = cache.shape
            cache.index_copy_(2, place, heads.narrow(1, n_queries, n_cached))
            keys, values = cache.chunk(2, dim=1)  # (B, Hk, S, Dh) each
            # The queries of a group read the same keys, so they may stand where those of several tokens would.
            queries = heads.narrow(1, 0, n_queries).reshape(rows, n_cached // 2, -1, width)  # (B, Hk, H / Hk, Dh)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=is_filled)
            return attended.reshape(rows, n_queries, 1, width)

        hidden = self._through_blocks(ids, matrices, positions, rotation, attend)
        place.add_(1)
        return hidden

    def _through_blocks(
        self, ids: Tensor, matrices: Matrices, positions: Tensor | None, rotation: Tensor | None, attend: Attend
    ) -> Tensor:
        """(B, T) -> (B, T, D)"""
        hidden = F.embedding(ids, self._model.model.embed_tokens.weight).to(self._compute_dtype)
        if positions is not None:
            hidden = hidden + positions
        for block, cache in zip(matrices.blocks, self._caches, strict=True):
            heads = self._heads(block, hidden, cache, rotation)
            attended = attend(heads, cache).transpose(1, 2).flatten(2)  # (B, H, T, Dh) -> (B, T, H Dh)
            hidden = hidden + block.attention_output(attended)
            hidden = hidden + block.mlp(block.mlp_norm(hidden))
        return self._norm(hidden)

    def _heads(self, block: Block, hidden: Tensor, cache: Tensor, rotation: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, H + 2 Hk, T, Dh): queries, keys and values."""
        heads = block.query_key_value(block.attention_norm(hidden))
        heads = heads.view(*hidden.shape[:2], -1, cache.shape[3]).transpose(1, 2)  # -> (B, H + 2 Hk, T, Dh)
        if block.query_key_norm is None and rotation is None:
            return heads
        return _turned(heads, self._model.config.n_head + cache.shape[1] // 2, block.query_key_norm, rotation)


def _is_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


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
