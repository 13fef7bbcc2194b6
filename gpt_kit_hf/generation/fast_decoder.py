"""Token-by-token decoding with packed weights and a key-value cache of fixed size.

Shapes: B batch size, T input tokens, S cache size in tokens, D model width, H heads, Dh head width, V vocabulary size.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM, TransformerBlock
from gpt_kit_hf.model.own_class import is_gpt_kit, own_model
from gpt_kit_hf.options.generation import DecodingDtype

Linear: TypeAlias = Callable[[Tensor], Tensor]
# (weight, bias) -> the linear layer, with its weight in some memory layout.
_Layout: TypeAlias = Callable[[Tensor, "Tensor | None"], Linear]

# Packing pays off from this number of new tokens on.
_MIN_TOKENS_TO_PACK = 32
# Packed weights of dtype "auto" are cached up to this model size.
_MAX_CACHED_BYTES = 1 << 30


class _Block(NamedTuple):
    """The operations of a transformer block, with its matrices in one layout."""

    attention_norm: Linear
    query_key_value: Linear
    attention_output: Linear
    mlp_norm: Linear
    up: Linear
    activation: Linear
    down: Linear


class _Matrices(NamedTuple):
    """All matrices of a model in one layout."""

    blocks: list[_Block]
    head: Linear


# Packed weights by model and dtype, with the address and version of each parameter at the time of packing.
_kept: WeakKeyDictionary[nn.Module, dict[str, tuple[list[tuple[int, int]], _Matrices]]] = WeakKeyDictionary()
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
        if dtype != "auto" and not _has_packed_products(dtype):
            raise UsageError(f"dtype={dtype}: this CPU's torch has no such products; use auto")
        self._model, self._dtype, self._keep_packed = model, dtype, keep_packed
        self._compute_dtype = torch.float32 if self._device.type == "cpu" else model.dtype
        self._unpacked = _unpacked_matrices(model, self._compute_dtype)
        self._packed: _Matrices | None = None
        self._norm = _norm(model.model.norm, self._compute_dtype)
        self._keys: list[Tensor] = []  # (B, H, S, Dh) each
        self._values: list[Tensor] = []
        self._length = 0  # tokens in the cache

    def pack(self) -> None:
        """Copy the weights into a layout that is fast for single tokens.

        The copy is cached for later decoders as long as the model lives and its weights do not change; not for a model
        in training mode, whose weights will change, and with "auto" not for a large model, unless `keep_packed` asks
        for it. Threads share one copy.
        """
        layout = _layout(self._dtype, self._model.dtype, self._device)
        if self._packed is None and layout is not None:
            with _packing:
                self._pack(layout)

    def _pack(self, layout: _Layout) -> None:
        state = [(p.data_ptr(), p._version) for p in self._model.parameters()]
        kept = _kept.setdefault(self._model, {})
        if self._dtype in kept and kept[self._dtype][0] == state:
            self._packed = kept[self._dtype][1]
            return
        kept.pop(self._dtype, None)
        self._packed = _packed_matrices(self._model, layout, self._compute_dtype)
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
        config = self._model.config
        shape = (len(ids), config.n_head, length, config.n_embd // config.n_head)  # (B, H, S, Dh)
        blocks = self._unpacked.blocks
        self._keys = [torch.empty(shape, device=self._device, dtype=self._compute_dtype) for _ in blocks]
        self._values = [torch.empty(shape, device=self._device, dtype=self._compute_dtype) for _ in blocks]
        self._length = 0
        return self._forward(ids, self._unpacked)

    def _forward(self, ids: Tensor, matrices: _Matrices) -> Tensor:
        """(B, T) -> (B, T, D): hidden states of the tokens after those in the cache; adds them to the cache."""
        base, count, heads = self._model.model, ids.shape[1], self._model.config.n_head
        start, self._length = self._length, self._length + count
        assert base.embed_positions is not None  # `why_not` has checked it
        positions = base.embed_positions(torch.arange(start, self._length, device=self._device))
        hidden = F.embedding(ids, base.embed_tokens.weight).to(self._compute_dtype) + positions.to(self._compute_dtype)
        for block, keys, values in zip(matrices.blocks, self._keys, self._values, strict=True):
            projected = block.query_key_value(block.attention_norm(hidden))  # (B, T, 3 D)
            by_head = projected.view(*ids.shape, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, Dh)
            query, key, value = by_head.unbind()
            keys.narrow(2, start, count).copy_(key)
            values.narrow(2, start, count).copy_(value)
            seen = keys.narrow(2, 0, self._length), values.narrow(2, 0, self._length)
            attended = F.scaled_dot_product_attention(query, *seen, is_causal=count > 1)
            hidden = hidden + block.attention_output(attended.transpose(1, 2).flatten(2))  # (B, H, T, Dh) -> (B, T, D)
            hidden = hidden + block.down(block.activation(block.up(block.mlp_norm(hidden))))
        return self._norm(hidden)


def why_not(model: nn.Module) -> str | None:
    """Return why a `Decoder` does not support a model, or None if it does."""
    own = own_model(model)
    if own is None or type(own) is not GPTKitForCausalLM:
        computes = ", as its code computes something else" if own is None and is_gpt_kit(model) else ""
        return f"{type(model).__name__} is no plain GPTKitForCausalLM{computes}"
    if own.model.embed_positions is None or own.config.norm != "layernorm" or own.config.mlp != "gelu":
        return "it has no layer norms, GELU or table of positions"
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


# --- layouts of a matrix


def _row_by_row(weight: Tensor, bias: Tensor | None) -> Linear:
    return lambda inputs: F.linear(inputs, weight, bias)


def _packed_float32(weight: Tensor, bias: Tensor | None) -> Linear:
    """The blocked layout of oneDNN: twice as fast as row by row for a few tokens."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda inputs: product(inputs, packed, bias, "none", [], "")


def _packed_float16(weight: Tensor, bias: Tensor | None) -> Linear:
    """Float16 weights, products and sums in float32 (FBGEMM)."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    product = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda inputs: product(inputs, packed)


def _packed_int8(weight: Tensor, bias: Tensor | None) -> Linear:
    """8-bit weights with a scale per row, inputs quantized to 8 bits at run time (FBGEMM)."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).double()
    zeros = torch.zeros(len(weight), dtype=torch.long)
    packed = torch.ops.quantized.linear_prepack(
        torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8), bias
    )
    product = torch.ops.quantized.linear_dynamic.default
    # True: inputs use 7 bits only on CPUs whose 16-bit sums would overflow.
    return lambda inputs: product(inputs, packed, True)


def _has_packed_products(dtype: Literal["float16", "int8"]) -> bool:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    if dtype == "float16":
        return hasattr(torch.ops.quantized, "linear_prepack_fp16")
    return hasattr(torch.ops.quantized, "linear_prepack") and hasattr(torch, "quantize_per_channel")


def _layout(dtype: DecodingDtype, model_dtype: torch.dtype, device: torch.device) -> _Layout | None:
    """Return the layout for single tokens, or None if this machine has none faster than the model's own."""
    if device.type != "cpu":
        return _row_by_row  # the gain is one product for query, key and value together
    if dtype == "int8":
        return _packed_int8
    if dtype == "float16" or model_dtype in (torch.float16, torch.bfloat16):
        return _packed_float16 if _has_packed_products("float16") else None
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )
    return _packed_float32 if is_x86 and has_product and torch.backends.mkldnn.enabled else None


# --- all matrices of a model


def _unpacked_matrices(model: GPTKitForCausalLM, dtype: torch.dtype) -> _Matrices:
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


def _packed_matrices(model: GPTKitForCausalLM, layout: _Layout, dtype: torch.dtype) -> _Matrices:
    """Return copies of the matrices in the given layout."""

    @torch.no_grad()  # the grad mode is set per thread
    def joined(*modules: nn.Linear) -> Linear:
        weights = [module.weight.to(dtype) for module in modules]
        biases = [module.bias.to(dtype) for module in modules if module.bias is not None]
        if len(modules) == 1:
            return layout(weights[0], biases[0] if biases else None)
        return layout(torch.cat(weights), torch.cat(biases) if biases else None)

    if layout is _row_by_row:
        return _matrices(model, joined, dtype, map)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, warnings.catch_warnings():  # packing is single-threaded
        # torch announces the removal of quantized tensors; `_has_packed_products` checks that they are still there.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        return _matrices(model, joined, dtype, pool.map)


def _matrices(
    model: GPTKitForCausalLM, joined: Callable[..., Linear], dtype: torch.dtype, apply: Callable[..., Iterator[Any]]
) -> _Matrices:
    """Return the matrices that `joined` makes of one or several linear modules, computed by `map` or a pool's map."""

    def block(layer: TransformerBlock) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        return _Block(
            attention_norm=_norm(layer.input_layernorm, dtype),
            query_key_value=joined(attention.q_proj, attention.k_proj, attention.v_proj),
            attention_output=joined(attention.o_proj),
            mlp_norm=_norm(layer.post_attention_layernorm, dtype),
            up=joined(mlp.up_proj),
            activation=mlp.act_fn,
            down=joined(mlp.down_proj),
        )

    head = apply(joined, [model.lm_head])  # first: it is the largest matrix
    blocks = list(apply(block, model.model.layers[: model.config.n_layer]))
    return _Matrices(blocks, next(iter(head)))


def _norm(norm: nn.Module, dtype: torch.dtype) -> Linear:
    assert isinstance(norm, nn.LayerNorm)  # `why_not` has checked it
    weight, bias = norm.weight.to(dtype), None if norm.bias is None else norm.bias.to(dtype)
    return lambda inputs: F.layer_norm(inputs, norm.normalized_shape, weight, bias, norm.eps)
