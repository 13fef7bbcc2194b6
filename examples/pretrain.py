"""Pretrain a GPT: `accelerate launch examples/pretrain.py --config examples/configs/NAME.yaml --any_option value`.

It is `gpt-kit train` as a script. In a program of your own: `gpt_kit_hf.train(gpt_kit_hf.parse_run_options([...]))`.
"""

import sys

from gpt_kit_hf.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
