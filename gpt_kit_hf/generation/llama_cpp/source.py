"""The GGUF file of a model: the file itself, or one written from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from gpt_kit_hf.generation.signals import sigterm_as_interrupt
from gpt_kit_hf.options.generation import DecodingDtype
from gpt_kit_hf.options.hub import Quantization
from gpt_kit_hf.storage.gguf_header import is_gguf

if TYPE_CHECKING:
    from gpt_kit_hf.export.gguf_file import GGUFExport

_QUANTIZATIONS: dict[DecodingDtype, Quantization] = {"float16": "f16", "int8": "q8_0"}


class WrittenModel(NamedTuple):
    """A model that was written as a GGUF file, its tokenizer of transformers, and what the file holds."""

    model: Any
    tokenizer: Any
    export: GGUFExport


@contextmanager
def gguf_file(place: str, dtype: DecodingDtype = "auto") -> Iterator[Path]:
    """Yield a GGUF file, or write one of the model of a folder or Hub repository, which is there within the block.

    "auto" writes the matrices in the model's own precision.
    """
    if is_gguf(Path(place)):
        yield Path(place)
        return
    with sigterm_as_interrupt(), TemporaryDirectory() as folder:  # the file is large, and must not stay
        path = Path(folder) / "model.gguf"
        write_gguf(place, path, _QUANTIZATIONS.get(dtype))
        yield path


def write_gguf(place: str, path: Path, quantization: Quantization | None) -> WrittenModel:
    """Write the model of a run, a folder or a Hub repository as a GGUF file, by default in its own precision."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpt_kit_hf.export.gguf_file import save_as_gguf
    from gpt_kit_hf.hub.model_folder import (
        check_tokenizer,
        find_model_folder,
        load_pretrained,
        load_text_encoding,
    )

    folder = find_model_folder(place)
    model = load_pretrained(AutoModelForCausalLM, folder, place)
    check_tokenizer(folder, model.config)
    tokenizer = load_pretrained(AutoTokenizer, folder, place)
    encoding = load_text_encoding(folder, place)
    own: dict[torch.dtype, Quantization] = {torch.bfloat16: "bf16", torch.float16: "f16"}
    done = save_as_gguf(
        model,
        encoding,
        path,
        quantization=quantization or own.get(model.dtype, "f32"),
        chat_template=tokenizer.chat_template,
    )
    return WrittenModel(model, tokenizer, done)
