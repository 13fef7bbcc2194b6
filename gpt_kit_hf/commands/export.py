"""`gpt-kit export` and `convert`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpt_kit_hf.commands.running import note, write
from gpt_kit_hf.errors import CheckpointError, GPTKitError, UsageError
from gpt_kit_hf.export.gguf_file import import_gguf
from gpt_kit_hf.export.modelfile import modelfile
from gpt_kit_hf.generation.llama_cpp.source import write_gguf
from gpt_kit_hf.hub.model_folder import holds_tokenizer
from gpt_kit_hf.hub.native_form import export_native
from gpt_kit_hf.model.checkpoints.conversion import convert_checkpoint
from gpt_kit_hf.options.hub import ExportOptions
from gpt_kit_hf.options.model import ConvertOptions
from gpt_kit_hf.storage.atomic_files import replace_file


def convert(options: ConvertOptions) -> None:
    """Convert a checkpoint to another layout."""
    convert_checkpoint(
        options.source,
        options.destination,
        options.layout,
        n_head=options.n_head,
        hidden_act=options.hidden_act,
        eos_token_id=options.eos_token_id,
        lora_scaling=options.lora_scaling,
        drop_classifier=options.drop_classifier,
        tokenizer_folder=options.tokenizer_folder,
    )
    write(f"the model was written to {options.destination}\n")
    if not holds_tokenizer(Path(options.destination)):
        write("note      it has no tokenizer, which generate and chat need; give one by --tokenizer_folder\n")


def export(options: ExportOptions) -> None:
    """Write a model for programs that do not know this package."""
    if options.format == "gguf":
        _export_gguf(options)
        return
    done = export_native(options.source, options.destination)
    write(
        f"the model was written to {options.destination} as {done.class_name}\n"
        f"read again  {done.tensors} tensors equal to the bit, logits within {done.difference:.1e}\n"
    )


def _export_gguf(options: ExportOptions) -> None:
    import_gguf()
    path = Path(options.destination)
    beside = path.with_suffix(".Modelfile")
    if beside.exists():
        raise UsageError(f"{str(beside)!r} exists; nothing is overwritten")
    model, tokenizer, done = write_gguf(options.source, path, options.quantization or "f16")
    text = modelfile(path.name, context=model.config.max_position_embeddings, chat_template=tokenizer.chat_template)
    replace_file(beside, text)
    types = ", ".join(f"{count} {kind}" for kind, count in done.types.items())
    write(
        f"the model was written to {path}, architecture {done.architecture}, and {beside.name} for Ollama beside it\n"
        f"read again  {done.tokens} tokens and all tensors equal to the bit: {types}\n"
    )
    if find_spec("xllamacpp") is None:
        note('not run: llama.cpp is not installed; pip install "gpt-kit-hf[llama]" lets the export compare it')
        return
    try:
        _run_and_compare(model, tokenizer, path)
    except GPTKitError as error:
        raise CheckpointError(f"{path} was written, but it is not verified: {error}") from error


def _run_and_compare(model: Any, tokenizer: Any, path: Path) -> None:
    """Run a GGUF file beside its model, and write how they compare. Raises GPTKitError if they differ."""
    from gpt_kit_hf.generation.llama_cpp.compare import compare_with_llama_cpp

    # Not with the encoding: that reads special tokens other than EOS as plain text, unlike llama.cpp and transformers.
    found = compare_with_llama_cpp(model, tokenizer, path)
    write(f"{found.line()}\n")
    found.require()
