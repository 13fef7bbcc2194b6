"""The attention function that a run asks for."""

from __future__ import annotations

from typing import Any

import torch

from gpt_kit_hf.errors import UsageError


def check_attention(name: str, device: torch.device, precision: str) -> None:
    """Raise UsageError for an attention function that cannot train on a device in a precision."""
    if device.type == "cpu" and name == "flex_attention":
        raise UsageError("attn_implementation=flex_attention: torch has no gradients for it on a CPU; use sdpa")
    if name.startswith("flash_attention") and (device.type == "cpu" or precision == "fp32"):
        raise UsageError(f"attn_implementation={name}: it needs a GPU, and mixed_precision bf16 or fp16; use sdpa")


def set_attention(model: Any, name: str) -> None:
    """Let a model use an attention function; "auto" leaves its own. Raises UsageError if the model cannot."""
    if name == "auto":
        return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UsageError(f"attn_implementation={name}: {str(error).strip().splitlines()[0]}") from error
