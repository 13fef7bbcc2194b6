"""`gpt-kit tokenize`, in a module of its own: it needs no torch."""

from __future__ import annotations

import sys

from gpt_kit_hf.commands.running import note, write
from gpt_kit_hf.data.text.corpus import choose_encoding
from gpt_kit_hf.data.text.sources import source_notes
from gpt_kit_hf.data.text.tokenize import tokenize_text
from gpt_kit_hf.options.data import TRAINED_BPE
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
