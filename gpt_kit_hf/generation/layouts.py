"""The layouts of a matrix in decoding: how its weights are stored, and which operation multiplies by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_kit_hf.options.generation import DecodingDtype

Linear: TypeAlias = Callable[[Tensor], Tensor]
# (weight, bias) -> the linear layer, with its weight in some memory layout.
Layout: TypeAlias = Callable[[Tensor, "Tensor | None"], Linear]


def row_by_row(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return the linear layer on the weight as it is."""
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


def has_packed_products(dtype: Literal["float16", "int8"]) -> bool:
    """Return whether this machine's torch multiplies by weights of a dtype."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    if dtype == "float16":
        return hasattr(torch.ops.quantized, "linear_prepack_fp16")
    return hasattr(torch.ops.quantized, "linear_prepack") and hasattr(torch, "quantize_per_channel")


def layout_of(dtype: DecodingDtype, model_dtype: torch.dtype, device: torch.device) -> Layout | None:
    """Return the layout for single tokens, or None if this machine has none faster than the model's own."""
    if device.type != "cpu":
        return row_by_row  # the gain is one product for several matrices with the same input
    if dtype == "int8":
        return _packed_int8
    if dtype == "float16" or model_dtype in (torch.float16, torch.bfloat16):
        return _packed_float16 if has_packed_products("float16") else None
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )
    return _packed_float32 if is_x86 and has_product and torch.backends.mkldnn.enabled else None
