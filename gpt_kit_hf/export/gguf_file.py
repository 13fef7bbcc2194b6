"""GGUF files, the format of llama.cpp: written, and read again and compared."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import tiktoken
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpt_kit_hf.errors import CheckpointError, UsageError, unknown_name
from gpt_kit_hf.export.gguf_shape import Architecture, add_metadata, choose_architecture, tensors_of
from gpt_kit_hf.export.gguf_vocabulary import add_vocabulary, check_vocabulary
from gpt_kit_hf.model.checkpoints.conversion import as_gpt_kit
from gpt_kit_hf.model.checkpoints.layouts import stored_tensors
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.options.hub import Quantization
from gpt_kit_hf.storage.atomic_files import check_can_be_made, sync_path

if TYPE_CHECKING:
    import gguf

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # weights in a block of q8_0


@dataclass(frozen=True, kw_only=True)
class GGUFExport:
    """What was written: llama.cpp's architecture, the tokens, and the number of tensors of each type."""

    architecture: str
    tokens: int
    types: dict[str, int]


def save_as_gguf(
    model: PreTrainedModel,
    encoding: tiktoken.Encoding,
    path: str | Path,
    *,
    quantization: Quantization = "f16",
    chat_template: str | None = None,
) -> GGUFExport:
    """Write a model and its vocabulary as a GGUF file, read it again and compare.

    The model is one of this package, or a GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM of transformers.
    `quantization` is the type of the matrices; vectors, and the table of positions, stay in float32. Rows that no
    block of q8_0 divides are written as f16. After an error there is no file. Raises UsageError for a file that
    exists, a model or vocabulary that llama.cpp does not compute exactly, with what stands in the way, and without
    the package gguf; CheckpointError if writing fails, or if what is read again differs.
    """
    if quantization not in get_args(Quantization):
        raise UsageError(unknown_name("quantization", str(quantization), get_args(Quantization)))
    own = as_gpt_kit(model)
    stored_tensors(own)  # refuses quantised weights, and layers of an adapter
    architecture = choose_architecture(own.config)
    check_vocabulary(encoding)
    if encoding.n_vocab > own.config.vocab_size:
        raise UsageError(f"the vocabulary has {encoding.n_vocab} tokens, the model vocab_size={own.config.vocab_size}")
    end_ids = _end_ids(own)
    with _new_file(Path(path)) as stage:
        return _write(own, encoding, stage, architecture, quantization, chat_template, end_ids, Path(path).stem)


def import_gguf() -> Any:
    """Return the package gguf; UsageError if it is not installed."""
    try:
        return import_module("gguf")
    except ModuleNotFoundError:
        raise UsageError('GGUF files need the package gguf: pip install "gpt-kit-hf[gguf]"') from None


def _end_ids(model: GPTKitForCausalLM) -> list[int]:
    """Return the ids that end a text in generation."""
    settings = model.generation_config
    found = model.config.eos_token_id if settings is None or settings.eos_token_id is None else settings.eos_token_id
    ids = [found] if isinstance(found, int) else list(found or [])
    if len(ids) > 2:
        raise UsageError(f"eos_token_id={ids}: a GGUF file has two such ids at most")
    return ids


def _write(
    model: GPTKitForCausalLM,
    encoding: tiktoken.Encoding,
    stage: Path,
    architecture: Architecture,
    quantization: Quantization,
    chat_template: str | None,
    end_ids: Sequence[int],
    name: str,
) -> GGUFExport:
    gguf = import_gguf()
    writer = gguf.GGUFWriter(str(stage), architecture.name)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[quantization]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, model.config)
    tokens = add_vocabulary(writer, encoding, model.config.vocab_size, end_ids)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    types: Counter[str] = Counter()
    for tensor_name, tensor in tensors_of(model, architecture):
        data, kind = _stored(tensor_name, tensor, quantization)
        writer.add_tensor(tensor_name, data, raw_dtype=kind)
        types[kind.name] += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare(model, stage, architecture, quantization, tokens)
    return GGUFExport(architecture=architecture.name, tokens=len(tokens), types=dict(types))


def _stored(
    name: str, tensor: Tensor, quantization: Quantization
) -> tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]:
    """Return a tensor as the file holds it, and the type of that."""
    package = import_gguf()
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    kind = package.GGMLQuantizationType[quantization.upper()]
    if values.ndim == 1 or name == "position_embd.weight":
        kind = package.GGMLQuantizationType.F32
    elif quantization == "q8_0" and values.shape[-1] % _BLOCK:
        kind = package.GGMLQuantizationType.F16
    return package.quants.quantize(values, kind), kind


def _compare(
    model: GPTKitForCausalLM, stage: Path, architecture: Architecture, quantization: Quantization, tokens: list[str]
) -> None:
    """Read the file again; CheckpointError if a token or a tensor is not what was to be written."""
    reader = import_gguf().GGUFReader(str(stage))
    found = {each.name: each for each in reader.tensors}
    expected = dict(tensors_of(model, architecture))
    if found.keys() != expected.keys():
        names = ", ".join(sorted(found.keys() ^ expected.keys())[:3])
        raise CheckpointError(f"read again, the file has other tensors: {names}")
    for name, tensor in expected.items():
        data, kind = _stored(name, tensor, quantization)
        same = np.array_equal(found[name].data.view(np.uint8).ravel(), data.view(np.uint8).ravel())
        if found[name].tensor_type != kind or found[name].shape.tolist() != list(tensor.shape)[::-1] or not same:
            raise CheckpointError(f"read again, {name} differs from what was written")
    if reader.get_field("tokenizer.ggml.tokens").contents() != tokens:
        raise CheckpointError("read again, the file has other tokens")


@contextmanager
def _new_file(final: Path) -> Iterator[Path]:
    """Yield the path of a hidden file that takes its name at the end, and is removed after an error."""
    if final.exists():
        raise UsageError(f"{str(final)!r} exists; nothing is overwritten")
    check_can_be_made(final)
    stage = final.with_name(f".{final.name}.{secrets.token_hex(8)}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield stage
        sync_path(stage)
        os.link(stage, final)  # unlike a rename, it does not replace a file that has appeared meanwhile
        sync_path(final.parent)
    except FileExistsError:
        raise UsageError(f"{str(final)!r} exists; nothing is overwritten") from None
    except OSError as error:
        raise CheckpointError(f"{final} was not written: {error}") from error
    finally:
        with suppress(OSError):  # or it would hide why nothing was written
            stage.unlink()
