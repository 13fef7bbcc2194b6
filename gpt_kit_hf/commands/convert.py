"""`gpt-kit convert`."""

from __future__ import annotations

from pathlib import Path

from gpt_kit_hf.commands.running import write
from gpt_kit_hf.hub.model_folder import holds_tokenizer
from gpt_kit_hf.model.checkpoints.conversion import convert_checkpoint
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
    if not holds_tokenizer(Path(options.destination)):
        write("note      it has no tokenizer, which generate and chat need; give one by --tokenizer_folder\n")
