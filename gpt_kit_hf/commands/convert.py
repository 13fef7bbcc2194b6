"""`gpt-kit convert`."""

from __future__ import annotations

from gpt_kit_hf.commands.running import write
from gpt_kit_hf.model.conversion import convert_checkpoint
from gpt_kit_hf.options.model import ConvertOptions


def convert(options: ConvertOptions) -> None:
    """Convert a checkpoint to another layout."""
    convert_checkpoint(
        options.source,
        options.destination,
        options.layout,
        n_head=options.n_head,
        hidden_act=options.hidden_act,
        eos_token_id=options.eos_token_id,
        lora_scaling=options.lora_scaling,
        drop_classifier=options.drop_classifier,
        tokenizer_folder=options.tokenizer_folder,
    )
    write(f"the model was written to {options.destination}\n")
