"""`gpt-kit export`."""

from __future__ import annotations

from gpt_kit_hf.commands.running import write
from gpt_kit_hf.hub.native_form import export_native
from gpt_kit_hf.options.hub import ExportOptions


def export(options: ExportOptions) -> None:
    """Write a model for programs that do not know this package."""
    done = export_native(options.source, options.destination)
    write(
        f"the model was written to {options.destination} as {done.class_name}\n"
        f"read again  {done.tensors} tensors equal to the bit, logits within {done.difference:.1e}\n"
    )
