"""Conversion of checkpoints of other programs to this package's model, and back to GPT-2.

The tables of tensor names are in `layouts`. Reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from gpt_kit_hf.errors import UsageError, one_line, unknown_name
from gpt_kit_hf.model.checkpoints.folders import (
    TOKENIZER_FILES,
    find_folder,
    new_folder,
    read_config,
    read_generation_config,
    write_folder,
)
from gpt_kit_hf.model.checkpoints.gpt2 import as_gpt2, config_of_gpt2
from gpt_kit_hf.model.checkpoints.layouts import (
    CLASSIFIERS,
    GPT2_NAMES,
    HEAD,
    LLAMA_NAMES,
    TOKENS,
    build_model,
    check_plain,
    choose_class,
    equal_tensors,
    name_of_positions,
    refuse_names,
    rename_tensors,
)
from gpt_kit_hf.model.checkpoints.llama import config_of_llama
from gpt_kit_hf.model.checkpoints.state_dicts import load_state_dict
from gpt_kit_hf.model.checkpoints.weight_files import is_weight_file, read_weights, strip_prefix
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM, GPTKitPreTrainedModel
from gpt_kit_hf.model.own_class import is_gpt_kit, own_model
from gpt_kit_hf.options.model import Activation, Layout
from gpt_kit_hf.storage.atomic_files import load_json

ConfigReader: TypeAlias = Callable[[Path | str, Mapping[str, Any]], GPTKitConfig]
_CLASSES = (GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM)
# By model_type of a folder: what reads its configuration, the names of its tensors, and one that every model has.
_FOLDERS: Mapping[str, tuple[ConfigReader, Mapping[str, str], str]] = MappingProxyType(
    {
        "gpt2": (config_of_gpt2, GPT2_NAMES, name_of_positions(GPT2_NAMES)),
        **dict.fromkeys(("llama", "qwen3"), (config_of_llama, LLAMA_NAMES, TOKENS)),
    }
)


def load_gpt2_checkpoint(
    path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, drop_classifier: bool = False
) -> GPTKitForCausalLM:
    """Return the model of a GPT-2 checkpoint, a folder or a repository on the Hub, in eval mode.

    Weights are read from safetensors, else from a pickle that holds tensors only; in one file or in shards, with or
    without the prefix "transformer.", stored causal masks and output projection. An output projection that differs
    from the token embedding stays separate (`tie_word_embeddings=False`). `drop_classifier` leaves out a head for
    classification. Raises UsageError for a classifier without it, settings that this model does not support, missing
    or unexpected tensors, and a checkpoint that cannot be found; CheckpointError for a damaged file.
    """
    if not dtype.is_floating_point:
        raise UsageError(f"dtype is {dtype}; it must be a floating-point type")
    model = _load_folder(find_folder(path_or_id), ["gpt2"], dtype, drop_classifier)
    if not isinstance(model, GPTKitForCausalLM):
        raise UsageError(
            f"{str(path_or_id)!r} holds a classifier: convert_checkpoint makes a {type(model).__name__} of it, "
            "drop_classifier=True leaves the head out"
        )
    return model


def save_as_gpt2(model: GPTKitForCausalLM, path: str | Path, *, tokenizer_folder: str | Path | None = None) -> None:
    """Write a folder that `GPT2LMHeadModel.from_pretrained` loads and that computes the same.

    Sinusoidal positions are stored as a learned table, missing biases as zeros. The tokenizer is copied from
    `tokenizer_folder`, if given. After an error there is no folder. Raises UsageError for a folder that is not empty,
    a model with replaced layers (merge adapters first), and a tokenizer with more ids than the model; CheckpointError
    if writing fails.
    """
    own = own_model(model)
    if own is None:
        raise _other_class(model, "a GPTKitForCausalLM")
    with new_folder(path) as stage:
        write_folder(as_gpt2(own), stage, tokenizer_folder)


def as_gpt_kit(model: PreTrainedModel) -> GPTKitForCausalLM:
    """Return a model of this package, or what computes the same as a GPT-2, Llama or Qwen3 of transformers: a copy.

    Raises UsageError for a model of another class, and for settings that this package's model does not support.
    """
    own = own_model(model)
    if own is not None:
        return own
    if type(model) not in _CLASSES:
        raise _other_class(model, f"a GPTKitForCausalLM, {', '.join(kind.__name__ for kind in _CLASSES)}")
    source, stored = type(model).__name__, model.config.to_dict()
    config_of, names, _ = _FOLDERS[stored["model_type"]]
    config = config_of(source, stored)
    weights = model.state_dict()
    check_plain(weights, source)
    tensors = rename_tensors(weights, names, source)
    _untie_if_unequal(config, tensors)
    made = build_model(config, tensors, _common_dtype(tensors), source)
    assert isinstance(made, GPTKitForCausalLM)
    made.generation_config = copy.deepcopy(model.generation_config)
    made.train(model.training)
    return made


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    layout: Layout | None = None,
    *,
    n_head: int | None = None,
    hidden_act: Activation | None = None,
    eos_token_id: int | None = None,
    lora_scaling: float | None = None,
    drop_classifier: bool = False,
    tokenizer_folder: str | Path | None = None,
) -> None:
    """Write the model in `source` to `destination`, a folder that is empty or does not exist.

    - "gpt2", "llama", "qwen3": from a folder or Hub id with such a model of transformers to a folder of this package,
      with the tokenizer, in the dtype of the weights; by default what the folder's config.json says;
    - "to-gpt2": from a folder of this package or Hub id to a GPT-2 folder, with the tokenizer;
    - "nanogpt", "kit", "gpt-kit", or "gpt2": from a file of weights (safetensors, or a pickle of tensors only) with
      these names to a folder of this package; "gpt-kit" are the names of this package's own state dicts.

    For a file the configuration is inferred from the shapes. `n_head` must be given, unless the file holds nanoGPT's
    `model_args`. `hidden_act` is by default exact GELU for nanoGPT and the tanh approximation for the others. LoRA
    matrices are merged; `lora_scaling` is the factor of their product. Prefixes of wrappers are removed. Query, key
    and value projections without biases get zeros if the other layers have biases. A classifier becomes the class for
    its head; `drop_classifier` leaves the head out. `tokenizer_folder` replaces the source's tokenizer. Raises
    UsageError and CheckpointError as the functions above.
    """
    if layout is not None and layout not in get_args(Layout):
        raise UsageError(unknown_name("layout", layout, get_args(Layout)))
    chosen = {"n_head": n_head, "hidden_act": hidden_act, "eos_token_id": eos_token_id}
    file, other_tokenizer = Path(source), tokenizer_folder is not None
    is_file = layout in ("nanogpt", "kit", "gpt-kit") or (layout in ("gpt2", None) and is_weight_file(file))
    if is_file and layout is None:
        raise UsageError(f"layout: {str(source)!r} is a file of weights: give that of its tensors' names")
    with new_folder(destination) as stage:
        model: PreTrainedModel
        if is_file:
            assert layout is not None
            model = load_state_dict(file, layout, chosen, lora_scaling, drop_classifier)
        else:
            given = [name for name, value in {**chosen, "lora_scaling": lora_scaling}.items() if value is not None]
            if given:
                raise UsageError(f"{', '.join(given)}: for a file of weights only; a folder has a config.json")
            folder = find_folder(source)
            if tokenizer_folder is None and any((folder / name).is_file() for name in TOKENIZER_FILES):
                tokenizer_folder = folder
            if layout == "to-gpt2":
                model = as_gpt2(_load_gpt_kit(folder))
            else:
                model = _load_folder(folder, [layout] if layout else [*_FOLDERS], None, drop_classifier)
                if not other_tokenizer:
                    model.config.tokenizer_fingerprint = load_json(folder / "config.json").get("tokenizer_fingerprint")
        write_folder(model, stage, tokenizer_folder)


def _load_folder(
    folder: Path, types: list[str], dtype: torch.dtype | None, drop_classifier: bool
) -> GPTKitPreTrainedModel:
    """Return the model of a folder of transformers with one of these types; `dtype` is by default that of the weights.

    Raises UsageError, and CheckpointError for a damaged file.
    """
    source, found = str(folder), read_config(folder, types)
    config_of, names, known = _FOLDERS[found["model_type"]]
    config = config_of(folder / "config.json", found)
    stored = strip_prefix(read_weights(folder), known, source)
    tensors = rename_tensors(stored, names, source)
    del stored  # otherwise it would keep the memory that `build_model` releases
    kind = choose_class(tensors, config, source, drop=drop_classifier)
    _untie_if_unequal(config, tensors)
    generation_config = read_generation_config(folder, config)
    model = build_model(config, tensors, dtype or _common_dtype(tensors), source, kind)
    if model.can_generate():
        model.generation_config = generation_config
    return model


def _other_class(model: PreTrainedModel, known: str) -> UsageError:
    computes = ", and its code computes something else than this package's" if is_gpt_kit(model) else ""
    return UsageError(f"model is a {type(model).__name__}{computes}; it must be {known}")


def _untie_if_unequal(config: GPTKitConfig, tensors: Mapping[str, Tensor]) -> None:
    """Say in the configuration that the output projection is a tensor of its own, if it is."""
    if HEAD in tensors and TOKENS in tensors and not equal_tensors(tensors[HEAD], tensors[TOKENS]):
        config.tie_word_embeddings = False


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the narrowest dtype that holds the values of all tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))


def _load_gpt_kit(folder: Path) -> GPTKitForCausalLM:
    config = load_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("model_type") != "gpt_kit":
        raise UsageError(f"{str(folder)!r} is no model folder of this package: its config.json must say 'gpt_kit'")
    if heads := {kind.__name__ for kind in CLASSIFIERS.values()} & set(config.get("architectures") or ()):
        raise UsageError(f"{str(folder)!r} holds a {min(heads)}; only language models are converted to GPT-2")
    try:
        model, report = GPTKitForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise UsageError(f"{str(folder)!r} cannot be loaded: {one_line(error)}") from None
    # transformers only warns, and initialises missing tensors randomly.
    refuse_names(f"{str(folder)!r} lacks tensors of the model", report["missing_keys"])
    refuse_names(f"{str(folder)!r} holds tensors that the model does not have", report["unexpected_keys"])
    assert isinstance(model, GPTKitForCausalLM)
    return model
