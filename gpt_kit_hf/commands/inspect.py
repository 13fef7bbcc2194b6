"""`gpt-kit inspect`, in a module of its own: without a model it needs no torch."""

from __future__ import annotations

import sys

from gpt_kit_hf.commands.running import write
from gpt_kit_hf.data.instructions.inspect import inspect_rows
from gpt_kit_hf.options.evaluation import InspectOptions


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
