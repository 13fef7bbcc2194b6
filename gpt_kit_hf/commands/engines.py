"""Which engine runs a model: torch or llama.cpp; and what llama.cpp cannot do, refused before torch is imported."""

from __future__ import annotations

from pathlib import Path

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.generation import (
    EngineOptions,
    GenerateOptions,
    LoadedModelOptions,
    SamplingOptions,
)
from gpt_kit_hf.storage.gguf_header import is_gguf, read_gguf_header


def uses_llama_cpp(options: EngineOptions) -> bool:
    """Return whether llama.cpp computes the model."""
    return options.engine == "llama.cpp" or (options.engine == "auto" and is_gguf(Path(options.model_name_or_path)))


def check_engine(options: EngineOptions) -> None:
    """Raise UsageError for a model that the engine cannot run, and for options that it does not have."""
    named = options.model_name_or_path
    is_file = is_gguf(Path(named))
    if not uses_llama_cpp(options):
        if is_file:
            raise UsageError(f"engine=torch: {named!r} is a GGUF file, which only llama.cpp runs: leave --engine out")
        return
    from gpt_kit_hf.generation.llama_cpp.server import check_installed

    check_installed()
    if isinstance(options, LoadedModelOptions) and options.device != "cpu":
        raise UsageError(f"device={options.device}: llama.cpp runs on the CPU here; leave --device out")
    if isinstance(options, GenerateOptions) and options.overflow != "error":
        raise UsageError(
            f"overflow={options.overflow}: llama.cpp does not continue a text beyond the model's context; lower "
            "--max_new_tokens, or give the folder of the model and --engine torch"
        )
    if not is_file:
        return  # a temporary file is written of it, in the precision that `dtype` names
    if isinstance(options, SamplingOptions) and options.dtype != "auto":
        raise UsageError(
            f"dtype={options.dtype}: the weights of a GGUF file have the precision that it was written in; give "
            "another file, or the folder of the model"
        )
    read_gguf_header(Path(named))
