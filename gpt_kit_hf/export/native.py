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
from gpt_kit_hf.model.checkpoints.folders import new_folder, write_folder
from gpt_kit_hf.model.checkpoints.gpt2 import as_gpt2
from gpt_kit_hf.model.checkpoints.layouts import check_plain
from gpt_kit_hf.model.checkpoints.llama import as_llama
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.own_class import own_model
from gpt_kit_hf.storage.atomic_files import load_json, save_json
from gpt_kit_hf.tokenization.encodings import check_fingerprint
from gpt_kit_hf.tokenization.export import load_encoding

_PROBE_TOKENS, _TOLERANCE = 32, 1e-5
_TO_GPT2 = (
    "; gpt-kit convert --layout to-gpt2 writes a GPT-2 that computes the same, with a table or zeros in its place"
)


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
    """Write a folder that transformers loads by a class of its own, with the same tensors and logits.

    That is GPT2LMHeadModel for learned positions, Qwen3ForCausalLM for rotary ones with qk_norm, and LlamaForCausalLM
    without; a model of a class of transformers stays what it is. Dropout of embeddings and residuals, which the latter
    two do not have, is left out. The tokenizer with its chat template is copied from `tokenizer_folder`, if given.
    After writing, the folder is loaded again and compared. After an error there is no folder. Raises UsageError for a
    folder that is not empty, for a model that no class computes exactly, with the field that stands in the way, and
    for a tokenizer that is not the model's; CheckpointError if writing fails, or if what was written differs.
    """
    with new_folder(path) as stage:
        return write_native(model, stage, tokenizer_folder)


def write_native(model: PreTrainedModel, stage: Path, tokenizer_folder: str | Path | None) -> NativeExport:
    """Write the files of `save_as_native` into an empty folder, and compare."""
    native = as_native(model)
    expected = native.config.to_dict().get("tokenizer_fingerprint")
    if expected is not None and tokenizer_folder is not None:
        check_fingerprint(load_encoding(tokenizer_folder), expected, str(tokenizer_folder))
    write_folder(native, stage, tokenizer_folder)
    _add_old_names(stage / "config.json")
    return _compare(model, native, stage)


def _add_old_names(path: Path) -> None:
    """Add the rotation to a config.json under the names that transformers 4 and mlx-lm read.

    They would take their default for a theta that is in `rope_parameters` only.
    """
    config = load_json(path)
    rotation = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rotation:
        config["rope_theta"] = rotation.pop("rope_theta")
        config["rope_scaling"] = None if rotation["rope_type"] == "default" else rotation
        save_json(path, config)


def as_native(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of transformers' own class that computes the same; UsageError if there is no such class."""
    if is_native(model):
        check_plain(dict(model.named_parameters()), type(model).__name__)
        return model
    own = own_model(model)
    if own is None:
        raise UsageError(f"model is a {type(model).__name__}; it must be a GPTKitForCausalLM")
    name = native_class(own.config)
    native = as_gpt2(own) if name == "GPT2LMHeadModel" else as_llama(own)
    if own.config.tokenizer_fingerprint is not None:
        native.config.tokenizer_fingerprint = own.config.tokenizer_fingerprint
    return native


def native_class(config: GPTKitConfig) -> str:
    """Return the name of the class of transformers that has exactly the shape of a configuration.

    Raises UsageError with the field that stands in the way, if there is none.
    """
    if config.position_embedding == "sinusoidal":
        raise UsageError(f"position_embedding='sinusoidal': no class of transformers adds these{_TO_GPT2}")
    heads = {"num_key_value_heads": config.n_head, "head_dim": config.n_embd // config.n_head}
    if config.position_embedding == "learned":
        name = "GPT2LMHeadModel"
        needed = {"norm": "layernorm", "mlp": "gelu", "qk_norm": False, **heads, "use_bias": True}
    elif config.qk_norm:
        name, needed = "Qwen3ForCausalLM", {"norm": "rmsnorm", "mlp": "swiglu", "use_bias": False}
    else:
        name, needed = "LlamaForCausalLM", {"norm": "rmsnorm", "mlp": "swiglu"}
        if config.n_embd % config.n_head:
            raise UsageError(f"n_embd={config.n_embd}: {name} needs a multiple of n_head={config.n_head}")
    for field, value in needed.items():
        if getattr(config, field) != value:
            hint = _TO_GPT2 if field == "use_bias" and name == "GPT2LMHeadModel" else ""
            raise UsageError(
                f"{field}={getattr(config, field)!r}: {name}, the class of transformers with "
                f"position_embedding={config.position_embedding!r}, has {value!r}{hint}"
            )
    return name


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
