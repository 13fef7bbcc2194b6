"""Native models: what the model of this package is as a class of transformers itself, written and compared.

Such a folder needs neither this package nor `trust_remote_code`, and other programs know its architecture.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.model.checkpoints.conversion import as_gpt2, new_folder, write_folder
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.own_class import own_model

_PROBE_TOKENS, _TOLERANCE = 32, 1e-5
# Where as_gpt2 would store something else that computes the same.
_TO_GPT2 = "gpt-kit convert --layout to-gpt2 writes {what} that compute the same"


@dataclass(frozen=True, kw_only=True)
class NativeExport:
    """What was written: the class, the number of tensors, all equal to the bit, and the largest difference of logits.

    The difference is that of fp32 logits, divided by the largest of them.
    """

    class_name: str
    tensors: int
    difference: float


def save_as_native(
    model: PreTrainedModel, path: str | Path, *, tokenizer_folder: str | Path | None = None
) -> NativeExport:
    """Write a folder that transformers loads by a class of its own, GPT2LMHeadModel, with the same tensors and logits.

    The tokenizer with its chat template is copied from `tokenizer_folder`, if given. After writing, the folder is
    loaded again and compared. After an error there is no folder. Raises UsageError for a folder that is not empty and
    for a model that no class computes exactly, with the field that stands in the way; CheckpointError if writing
    fails, or if what was written differs.
    """
    with new_folder(path) as stage:
        return write_native(model, stage, tokenizer_folder)


def write_native(model: PreTrainedModel, stage: Path, tokenizer_folder: str | Path | None) -> NativeExport:
    """Write the files of `save_as_native` into an empty folder, and compare."""
    native = as_native(model)
    write_folder(native, stage, tokenizer_folder)
    return _compare(model, native, stage)


def as_native(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of transformers' own class that computes the same; UsageError if there is no such class."""
    if is_native(model):
        return model
    own = own_model(model)
    if own is None:
        raise UsageError(f"model is a {type(model).__name__}; it must be a GPTKitForCausalLM")
    check_native(own.config)
    return as_gpt2(own)


def check_native(config: GPTKitConfig) -> None:
    """Raise UsageError with the field that stands in the way, if no class of transformers has exactly this shape."""
    if config.position_embedding != "learned":
        what = _TO_GPT2.format(what="learned ones")
        raise UsageError(f"position_embedding={config.position_embedding!r}: GPT2LMHeadModel learns them; {what}")
    if not config.use_bias:
        what = _TO_GPT2.format(what="zeros")
        raise UsageError(f"use_bias={config.use_bias}: GPT2LMHeadModel has biases; {what}")


def is_native(model: PreTrainedModel) -> bool:
    """Return whether a model's class is one of transformers."""
    return type(model).__module__.startswith("transformers.models.")


@torch.no_grad()
def _compare(model: PreTrainedModel, native: PreTrainedModel, stage: Path) -> NativeExport:
    """Load a written folder, and compare it with the model that it was made of."""
    read = type(native).from_pretrained(stage)
    written, expected = read.state_dict(), native.state_dict()
    unequal = [name for name in expected if name not in written or not _same_bits(written[name], expected[name])]
    if unequal or len(written) != len(expected):
        raise CheckpointError(f"read again, the native model has other tensors: {', '.join(unequal[:3])}")
    logits = [_logits(each) for each in (model, read)]
    difference = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-6))
    if not difference <= _TOLERANCE:
        raise CheckpointError(f"read again, the native model has logits that differ by {difference:.1e}")
    return NativeExport(class_name=type(native).__name__, tensors=len(written), difference=difference)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of a short row, computed in fp32, where those of two programs differ by rounding only."""
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    length = min(_PROBE_TOKENS, model.config.max_position_embeddings)
    ids = torch.arange(length)[None] * 7919 % model.config.vocab_size
    logits = model(ids, use_cache=False).logits
    assert isinstance(logits, torch.Tensor)
    return logits
