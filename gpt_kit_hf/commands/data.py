"""`gpt-kit tokenize` and `inspect`, in a module of their own: they need no torch, except for a model's tokenizer."""

from __future__ import annotations

import sys

from gpt_kit_hf.commands.running import note, write
from gpt_kit_hf.data.instructions.inspect import inspect_rows
from gpt_kit_hf.data.text.corpus import choose_encoding
from gpt_kit_hf.data.text.sources import source_notes
from gpt_kit_hf.data.text.tokenize import tokenize_text
from gpt_kit_hf.options.data import TRAINED_BPE
from gpt_kit_hf.options.evaluation import InspectOptions
from gpt_kit_hf.options.run import TokenizeOptions


def tokenize(options: TokenizeOptions) -> None:
    """Tokenize a text, or a share of it, into the token cache."""
    if options.encoding.encoding == TRAINED_BPE:
        note(f"training a bpe of {options.encoding.vocab_size:,} tokens on the text, as the run will")
    encoding = choose_encoding(options.text, options.encoding)
    for line in source_notes(options.text):
        write(f"text     {line}\n")
    log = None if sys.stderr.isatty() else note  # a terminal shows a bar
    for line in tokenize_text(options.text, encoding, options.share, log=log).lines():
        write(f"{line}\n")


def inspect(options: InspectOptions) -> None:
    """Show which tokens of instruction rows would be trained. Raises DataError if none would be."""
    model = options.model_name_or_path
    length = _context_length(model) if options.max_length is None else options.max_length
    report = inspect_rows(options.row_options(), options.supervision(length), model=model, examples=options.examples)
    if model is None:
        write("note      each byte is a token; --model_name_or_path counts the tokens of a model\n")
    write(report.text(color=sys.stdout.isatty()) + "\n")
    report.check()


def _context_length(model: str | None) -> int:
    if model is None:
        return 1024
    from gpt_kit_hf.hub.model_folder import model_length  # imports torch

    return model_length(model)
