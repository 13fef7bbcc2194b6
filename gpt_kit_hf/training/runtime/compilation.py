"""torch.compile of a model's blocks, where the machine can compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from gpt_kit_hf.errors import UsageError


def compile_blocks(
    model: PreTrainedModel, wanted: bool | None, device: torch.device, log: Callable[[str], None]
) -> bool:
    """Compile the blocks of `blocks_to_compile` in place with torch.compile; return whether there are any."""
    blocks = blocks_to_compile(model, wanted, device, log)
    for block in blocks:
        compile_block(block, device)
    return bool(blocks)


def compile_block(block: nn.Module, device: torch.device) -> None:
    """Compile a block in place with torch.compile."""
    # With vectors of 512 bits, torch 2.13's code for dropout of attention in bfloat16 gives gradients that are NaN.
    # Other CPUs have no vectors of 256 bits, and would get code without any.
    wide = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    block.compile(options={"cpp.simdlen": 256} if wide else None)


def blocks_to_compile(
    model: PreTrainedModel, wanted: bool | None, device: torch.device, log: Callable[[str], None]
) -> list[nn.Module]:
    """Return the blocks of a model if they are to be compiled, each by `compile_block`, else none.

    `wanted=None` compiles on a GPU, where launching the small operations of a block takes longer than its matrix
    products. On a CPU it depends on the machine and the shape, and the first step takes 15 s longer: a plan measures
    it. The blocks have the same code, so torch compiles it once, and caches it for the next run. Without a C++
    compiler or Triton the model is left as it is, and `log` gets the reason. Raises UsageError for wanted=True if the
    model does not declare its blocks.
    """
    if not is_compiled(wanted, device):
        return []
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        if wanted:
            raise UsageError(f"torch_compile=true: {type(model).__name__} does not tell what its blocks are")
        return []
    if (reason := _why_not(device)) is not None:
        log(f"note     not compiled: {reason}")
        return []
    return blocks


def is_compiled(wanted: bool | None, device: torch.device) -> bool:
    """Return whether blocks are to be compiled, where the machine can."""
    return device.type == "cuda" if wanted is None else wanted


def _why_not(device: torch.device) -> str | None:
    """Compile a small function for a device; return the error in a line, or None if it works."""
    try:
        torch.compile(lambda x: x * 2.0 + 1.0)(torch.ones(8, device=device))
    except Exception as error:  # torch has no exception class for a machine that cannot compile
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        return (lines or [type(error).__name__])[0][:200]
    return None
