"""What the commands of `gpt-kit` do; their names and options are in `gpt_kit_command`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import tokenization
from gpt_kit_hf.errors import GPTKitError, UsageError
from gpt_kit_hf.generation import stream_text
from gpt_kit_hf.option_parsing import parse_run_options
from gpt_kit_hf.progress import printable
from gpt_kit_hf.run_folder import find_model_folder
from gpt_kit_hf.tokenizer_twin import load_encoding
from gpt_kit_hf.training import train

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def run_command(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; an error that has a name here is one line, not a traceback."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # The bars of saving and loading a small model only break the lines of the run.
    transformers.utils.logging.disable_progress_bar()
    try:
        command()
    except UsageError as error:
        return _fail(error, USAGE_ERROR)
    except GPTKitError as error:
        return _fail(error, FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return 0


def _fail(error: object, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    return code


def train_command(arguments: Sequence[str]) -> int:
    """Pretrain a GPT as the arguments say."""
    return run_command(lambda: train(parse_run_options(arguments)))


def generate_command(
    place: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    slide: bool,
) -> int:
    """Stream text that a run's, a folder's or a Hub repository's model continues from the prompt."""

    def generate() -> None:
        folder = find_model_folder(place)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"{place!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        expected = model.config.to_dict().get("tokenizer_fingerprint")
        if expected is not None and Path(folder).is_dir():
            tokenization.check_fingerprint(load_encoding(folder), expected, folder)
        if seed is not None:
            torch.manual_seed(seed)
        # A text without a prompt begins where documents begin.
        start = prompt or (tokenizer.bos_token or "")
        _write(prompt)
        stream_text(
            model,
            tokenizer,
            start,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            overflow="slide" if slide else "error",
            on_text=_write,
        )
        _write("\n")

    return run_command(generate)


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
