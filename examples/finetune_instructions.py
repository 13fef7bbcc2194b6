"""Finetune a model on instruction rows, all weights or a LoRA adapter.

`accelerate launch examples/finetune_instructions.py --model_name_or_path RUN --rows ROWS.jsonl --output_dir RUN2`

It is `gpt-kit finetune` as a script. In a program of your own:
`gpt_kit_hf.finetune(gpt_kit_hf.parse_finetune_options([...]))`.
"""

import sys

from gpt_kit_hf.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
