"""Finetune a model on instruction rows, all weights or a LoRA adapter.

`accelerate launch examples/finetune_instructions.py --model_name_or_path RUN --rows ROWS.jsonl --output_dir RUN2`
"""

import sys

from gpt_kit_hf import finetune, parse_finetune_options, run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: finetune(parse_finetune_options(sys.argv[1:], prog="finetune_instructions.py"))))
