"""llama.cpp as a peer: the model of a benchmark as GGUF files, run by the package's engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_kit_hf import get_encoding, save_as_gguf
from gpt_kit_hf.options.hub import Quantization

QUANTIZATIONS: dict[str, Quantization] = {"F32": "f32", "F16": "f16", "Q8_0": "q8_0"}


def methods(model: Any, folder: Path) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Return what continues a prompt (1, T) greedily, by precision; nothing where xllamacpp is not installed."""
    if find_spec("xllamacpp") is None:
        print("llama.cpp is left out: pip install 'gpt-kit-hf[llama]'")
        return {}
    return {f"llama.cpp, {precision}": _method(model, folder / f"{precision}.gguf") for precision in QUANTIZATIONS}


def _method(model: Any, file: Path) -> Callable[[Tensor, int], Tensor]:
    from gpt_kit_hf.generation.llama_cpp.model import LlamaCppModel

    model.generation_config.eos_token_id = model.config.vocab_size - 1  # hardly ever the most likely
    # Only ids are read and written, so the vocabulary does not matter.
    save_as_gguf(model, get_encoding("bytes"), file, quantization=QUANTIZATIONS[file.stem])
    # As many threads as torch.
    engine = LlamaCppModel(file, threads=torch.get_num_threads())

    def generate(prompt: Tensor, new: int) -> Tensor:
        ids = prompt[0].tolist()
        return torch.tensor([ids + engine.greedy(ids, new)])

    return generate
