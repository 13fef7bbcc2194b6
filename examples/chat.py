"""Chat with a finetuned model from a program: `python examples/chat.py RUN "What is a noun?" "And a verb?"`.

The chat template that is saved with the tokenizer formats the prompt, as in training.
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import ChatOptions, Conversation, UsageError, run_command


def main() -> None:
    """Ask the questions of the command line, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a run or model, or a Hub id")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    asked = parser.parse_args()
    try:
        model, tokenizer = (kind.from_pretrained(asked.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    except OSError as error:
        raise UsageError(f"model {asked.model!r}: {str(error).splitlines()[0]}") from None
    conversation = Conversation(model, tokenizer, ChatOptions(max_new_tokens=asked.max_new_tokens, temperature=0.0))
    for question in asked.questions:
        sys.stdout.write(f"> {question}\n")
        conversation.answer(question, sys.stdout.write, sys.stderr.write)
        sys.stdout.write("\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
