"""A GGUF file of the tiny model over bytes."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM

from gpt_kit_hf import get_encoding, save_as_gguf


def write_tiny_gguf(folder: Path, file: Path, *, chat_template: str | None = None) -> None:
    """Write the model of a folder, whose vocabulary is the bytes, as a file in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_as_gguf(model, get_encoding("bytes"), file, quantization="f32", chat_template=chat_template)
