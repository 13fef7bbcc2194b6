"""Pretrain a GPT: `accelerate launch examples/pretrain.py --config examples/configs/NAME.yaml --any_option value`."""

import sys

from gpt_kit_hf import parse_run_options, run_command, train

if __name__ == "__main__":
    sys.exit(run_command(lambda: train(parse_run_options(sys.argv[1:], prog="pretrain.py"))))
