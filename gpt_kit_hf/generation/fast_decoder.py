"""One token at a time: the weights laid out for it, a cache of fixed size, and no work that repeats itself.

Shapes: B rows, T tokens of a call, S tokens that the cache has room for, D model width, H heads, Dh width of a head,
V vocabulary size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM, TransformerBlock
from gpt_kit_hf.options.generation import DecodingDtype

Linear: TypeAlias = Callable[[Tensor], Tensor]
# (weight, bias) -> the linear layer, in one layout or another.
_Layout: TypeAlias = Callable[[Tensor, "Tensor | None"], Linear]

# Fewer new tokens than these do not pay for another layout of the weights, if nobody asked for it.
_TOKENS_THAT_PAY = 32
# The largest model of which a copy in another layout is kept, if nobody asked for it.
_KEPT_BYTES = 1 << 30


class _Block(NamedTuple):
    """A block of the model, its matrices in one layout."""

    norm_before_attention: Linear
    query_key_value: Linear
    attention_output: Linear
    norm_before_feed_forward: Linear
    up: Linear
    activation: Linear
    down: Linear


class _Matrices(NamedTuple):
    """All matrices of a model in one layout."""

    blocks: list[_Block]
    head: Linear


# Packed weights of a model by kind, and where its parameters were, and how often changed, when they were packed.
_kept: WeakKeyDictionary[nn.Module, dict[str, tuple[list[tuple[int, int]], _Matrices]]] = WeakKeyDictionary()


class Decoder:
    """Predicts the next tokens of rows without padding, from a model of this package on one CPU or GPU.

    On a CPU it computes in float32, on a GPU in the model's own precision. `dtype` "auto" keeps the matrices'
    precision; on a CPU "float16" rounds them to float16, "int8" to 8 bits with a scale for each row, and the inputs of
    each product to 8 bits too. The model's weights must not change while the decoder is in use. Raises UsageError for
    a model that it cannot compute, and for weights that this machine has no products for.
    """

    def __init__(self, model: GPTKitForCausalLM, dtype: DecodingDtype = "auto") -> None:
        if dtype not in get_args(DecodingDtype):
            raise UsageError(unknown_name("dtype", str(dtype), get_args(DecodingDtype)))
        if (reason := why_not(model)) is not None:
            raise UsageError(f"dtype={dtype}: {reason}")
        self._device: torch.device = model.device
        if dtype != "auto" and self._device.type != "cpu":
            raise UsageError(f"dtype={dtype}: only on a CPU, and the model is on {self._device}; use auto")
        if dtype != "auto" and not _has_packed_products(dtype):
            raise UsageError(f"dtype={dtype}: this CPU's torch has no such products; use auto")
        self._model, self._chosen = model, dtype
        self._dtype = torch.float32 if self._device.type == "cpu" else model.dtype
        self._layers = model.model.layers[: model.config.n_layer]
        self._heads = model.config.n_head
        self._plain = _as_they_are(model, self._layers, self._dtype)
        self._packed: _Matrices | None = None
        self._norm = _norm(model.model.norm, self._dtype)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._filled = 0

    def pack(self) -> None:
        """Lay the weights out for single tokens: work that pays after some tokens, and a copy of the weights.

        It is kept for the next decoder while the model lives and its weights stay as they are; not if the model is in
        training mode, as they will not, nor if it is large and nobody asked for it.
        """
        layout = _layout(self._chosen, self._model.dtype, self._device)
        if self._packed is not None or layout is None:
            return
        state = [(p.data_ptr(), p._version) for p in self._model.parameters()]
        kept = _kept.setdefault(self._model, {})
        if self._chosen in kept and kept[self._chosen][0] == state:
            self._packed = kept[self._chosen][1]
            return
        kept.pop(self._chosen, None)
        self._packed = _laid_out(self._model, self._layers, layout, self._dtype)
        small = sum(p.nbytes for p in self._model.parameters()) <= _KEPT_BYTES
        if not self._model.training and (small or self._chosen != "auto"):
            kept[self._chosen] = state, self._packed

    def start(self, prompt: Tensor, length: int) -> Tensor:
        """Read a prompt (B, T) into a new cache with room for `length` tokens; return the next token's logits (B, V).

        The prompt is read with the model's own weights: many tokens at once need no other layout.
        """
        return self._plain.head(self._read(prompt, length, self._plain).select(1, -1)).float()

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each row, (B,); return the next token's logits (B, V)."""
        matrices = self._packed or self._plain
        return matrices.head(self._hidden(tokens.unsqueeze(1), matrices).squeeze(1)).float()

    @torch.no_grad()
    def divergence(self, ids: Tensor) -> tuple[float, float]:
        """Return how far the packed weights' predictions behind each token of (B, T) are from the model's own.

        The mean of KL(model, packed) in nats a token, and the share of positions at which both find the same token the
        likeliest. The tokens are read one by one, as they are when text is made: it takes as long.
        """
        self.pack()
        logits = self._plain.head(self._read(ids, ids.shape[1], self._plain))  # (B, T) -> (B, T, V)
        own = logits.float().log_softmax(dim=-1)
        self._filled = 0
        packed = torch.stack([self.step(token).log_softmax(dim=-1) for token in ids.unbind(dim=1)], dim=1)
        kl = F.kl_div(packed, own, reduction="none", log_target=True).sum(dim=-1)  # (B, T, V) -> (B, T)
        same = own.argmax(dim=-1) == packed.argmax(dim=-1)
        return float(kl.mean()), float(same.float().mean())

    def _read(self, ids: Tensor, length: int, matrices: _Matrices) -> Tensor:
        """(B, T) -> (B, T, D), into a new cache with room for `length` tokens."""
        config = self._model.config
        room = (len(ids), self._heads, length, config.n_embd // self._heads)  # (B, H, S, Dh)
        self._keys = [torch.empty(room, device=self._device, dtype=self._dtype) for _ in self._layers]
        self._values = [torch.empty(room, device=self._device, dtype=self._dtype) for _ in self._layers]
        self._filled = 0
        return self._hidden(ids, matrices)

    def _hidden(self, ids: Tensor, matrices: _Matrices) -> Tensor:
        """(B, T) -> (B, T, D): the tokens behind those in the cache, which then holds them too."""
        count = ids.shape[1]
        begin, self._filled = self._filled, self._filled + count
        positions = self._model.model.embed_positions(torch.arange(begin, self._filled, device=self._device))
        hidden = F.embedding(ids, self._model.model.embed_tokens.weight).to(self._dtype) + positions.to(self._dtype)
        for block, keys, values in zip(matrices.blocks, self._keys, self._values, strict=True):
            projected = block.query_key_value(block.norm_before_attention(hidden))  # (B, T, 3 D)
            by_head = projected.view(*ids.shape, 3, self._heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, Dh)
            query, key, value = by_head.unbind()
            keys.narrow(2, begin, count).copy_(key)
            values.narrow(2, begin, count).copy_(value)
            seen = keys.narrow(2, 0, self._filled), values.narrow(2, 0, self._filled)
            attended = F.scaled_dot_product_attention(query, *seen, is_causal=count > 1)
            hidden = hidden + block.attention_output(attended.transpose(1, 2).flatten(2))  # (B, H, T, Dh) -> (B, T, D)
            widened = block.activation(block.up(block.norm_before_feed_forward(hidden)))
            hidden = hidden + block.down(widened)
        return self._norm(hidden)


def why_not(model: nn.Module) -> str | None:
    """Return why a `Decoder` cannot compute a model, or None if it can."""
    if type(model) is not GPTKitForCausalLM:
        return f"{type(model).__name__} is no plain GPTKitForCausalLM"
    device = model.device
    if device.type not in ("cpu", "cuda"):
        return f"the model is on {device}, and this is for a CPU or a CUDA GPU"
    for name, parameter in model.named_parameters():
        if parameter.device != device:
            return f"{name} is on {parameter.device}, not on {device} as the rest"
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16) or type(parameter.data) is not Tensor:
            return f"{name} is a {parameter.dtype} {type(parameter.data).__name__}, no tensor in 32 or 16 bits"
    for name, module in model.named_modules():
        matrix = name.endswith("_proj") or name == "lm_head"
        if matrix and type(module) is not nn.Linear:
            return f"{name} is {type(module).__name__}, not a plain linear layer"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks"
    return None


def pays(new_tokens: int) -> bool:
    """Return whether so many new tokens are worth another layout of the weights."""
    return new_tokens >= _TOKENS_THAT_PAY


# --- layouts of the matrices


def _row_by_row(weight: Tensor, bias: Tensor | None) -> Linear:
    return lambda inputs: F.linear(inputs, weight, bias)


def _packed_float32(weight: Tensor, bias: Tensor | None) -> Linear:
    """Blocks of rows beside each other, as oneDNN wants them: twice as fast as row by row for a few tokens."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda inputs: product(inputs, packed, bias, "none", [], "")


def _packed_float16(weight: Tensor, bias: Tensor | None) -> Linear:
    """Two bytes a weight, products and sums in float32 (FBGEMM)."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    product = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda inputs: product(inputs, packed)


def _packed_int8(weight: Tensor, bias: Tensor | None) -> Linear:
    """A byte a weight, scaled by row, and inputs rounded to 8 bits as they come (FBGEMM)."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).double()
    zeros = torch.zeros(len(weight), dtype=torch.long)
    packed = torch.ops.quantized.linear_prepack(
        torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8), bias
    )
    product = torch.ops.quantized.linear_dynamic.default
    # Ranges of inputs are cut to 7 bits where the CPU would overflow else.
    return lambda inputs: product(inputs, packed, True)


def _has_packed_products(chosen: Literal["float16", "int8"]) -> bool:
    needed = {"float16": "linear_prepack_fp16", "int8": "linear_prepack"}[chosen]
    makes_them = chosen == "float16" or hasattr(torch, "quantize_per_channel")
    return (
        makes_them and "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch.ops.quantized, needed)
    )


def _layout(chosen: DecodingDtype, dtype: torch.dtype, device: torch.device) -> _Layout | None:
    """Return the layout for single tokens, or None where this machine has none that is better than the model's own."""
    if device.type != "cpu":
        return _row_by_row  # what is gained is one product for query, key and value
    if chosen == "int8":
        return _packed_int8
    if chosen == "float16" or dtype in (torch.float16, torch.bfloat16):
        return _packed_float16 if _has_packed_products("float16") else None
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return _packed_float32 if x86 and known and torch.backends.mkldnn.enabled else None


def _norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Linear:
    weight, bias = norm.weight.to(dtype), None if norm.bias is None else norm.bias.to(dtype)
    return lambda inputs: F.layer_norm(inputs, norm.normalized_shape, weight, bias, norm.eps)


def _block(layer: Any, matrix: Callable[..., Linear], dtype: torch.dtype) -> _Block:
    """Return a block whose matrices are what `matrix` makes of its linear layers."""
    assert isinstance(layer, TransformerBlock)
    attention, mlp = layer.self_attn, layer.mlp
    return _Block(
        norm_before_attention=_norm(layer.input_layernorm, dtype),
        query_key_value=matrix(attention.q_proj, attention.k_proj, attention.v_proj),
        attention_output=matrix(attention.o_proj),
        norm_before_feed_forward=_norm(layer.post_attention_layernorm, dtype),
        up=matrix(mlp.up_proj),
        activation=mlp.act_fn,
        down=matrix(mlp.down_proj),
    )


def _as_they_are(model: GPTKitForCausalLM, layers: Iterable[nn.Module], dtype: torch.dtype) -> _Matrices:
    """Return the matrices on the model's own weights: made for each text, and nothing to compute."""

    def plain(module: nn.Linear) -> Linear:
        def linear(inputs: Tensor) -> Tensor:
            # Of weights in half precision a CPU gets a float32 copy only now: most compute in half precision slower.
            return F.linear(inputs, module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype))

        return linear

    def matrix(*modules: nn.Linear) -> Linear:
        parts = [plain(module) for module in modules]
        return parts[0] if len(parts) == 1 else lambda inputs: torch.cat([p(inputs) for p in parts], dim=-1)

    return _Matrices([_block(layer, matrix, dtype) for layer in layers], matrix(model.lm_head))


def _laid_out(model: GPTKitForCausalLM, layers: Iterable[nn.Module], layout: _Layout, dtype: torch.dtype) -> _Matrices:
    """Return the matrices in a layout of their own."""

    @torch.no_grad()  # each thread has its own mode
    def matrix(*modules: nn.Linear) -> Linear:
        """Return one linear layer whose output is that of all modules, one behind the other."""
        weights = [module.weight.to(dtype) for module in modules]
        biases = [module.bias.to(dtype) for module in modules if module.bias is not None]
        if len(modules) == 1:
            return layout(weights[0], biases[0] if biases else None)
        return layout(torch.cat(weights), torch.cat(biases) if biases else None)

    if layout is _row_by_row:
        return _Matrices([_block(layer, matrix, dtype) for layer in layers], matrix(model.lm_head))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, warnings.catch_warnings():  # packing uses one thread
        # torch will drop quantised tensors some day; a machine whose torch has is told so by `_has_packed_products`.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        head = pool.submit(matrix, model.lm_head)
        return _Matrices(list(pool.map(lambda layer: _block(layer, matrix, dtype), layers)), head.result())
