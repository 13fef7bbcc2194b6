"""`gpt-kit export`."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM

from gpt_kit_hf.commands.running import write
from gpt_kit_hf.export.native import save_as_native
from gpt_kit_hf.hub.model_folder import find_model_folder, holds_tokenizer, load_pretrained
from gpt_kit_hf.options.hub import ExportOptions


def export(options: ExportOptions) -> None:
    """Write a model for programs that do not know this package."""
    folder = find_model_folder(options.source)
    model = load_pretrained(AutoModelForCausalLM, folder, options.source)
    tokenizer = folder if holds_tokenizer(Path(folder)) else None
    done = save_as_native(model, options.destination, tokenizer_folder=tokenizer)
    write(
        f"the model was written to {options.destination} as {done.class_name}\n"
        f"read again  {done.tensors} tensors equal to the bit, logits within {done.difference:.1e}\n"
    )
