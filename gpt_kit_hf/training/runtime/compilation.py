"""Compiled blocks: steps that are faster after a slow first one, or a word about why not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from gpt_kit_hf.errors import UsageError


def compile_blocks(
    model: PreTrainedModel, wanted: bool | None, device: torch.device, say: Callable[[str], None]
) -> bool:
    """Have torch compile each block of a model in place, and return whether it will.

    `wanted=None` leaves the choice here: on a GPU, where the blocks' small operations cost more than their products.
    On a CPU a step takes as long either way (benchmarks/README.md), and the first one 15 seconds more. The blocks are
    alike: one is compiled for all, and torch keeps it for the next run. Where torch cannot compile, for want of a C++
    compiler or Triton, `say` is told and the model is left as it is. Raises UsageError, if it is asked for, where the
    model does not tell what its blocks are.
    """
    if not (device.type == "cuda" if wanted is None else wanted):
        return False
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        if wanted:
            raise UsageError(f"torch_compile=true: {type(model).__name__} does not tell what its blocks are")
        return False
    if (reason := _why_not(device)) is not None:
        say(f"note     not compiled: {reason}")
        return False
    for block in blocks:
        block.compile()
    return True


def _why_not(device: torch.device) -> str | None:
    """Return why torch cannot compile for a device, found by trying, or None if it can."""
    try:
        torch.compile(lambda x: x * 2.0 + 1.0)(torch.ones(8, device=device))
    except Exception as error:  # the compiler has no error class of its own for a machine that cannot compile
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        return (lines or [type(error).__name__])[0][:200]
    return None
