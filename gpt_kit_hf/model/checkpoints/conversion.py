"""Conversion of GPT-2, nanoGPT and from-scratch kit checkpoints to this package's model, and back to GPT-2.

The tables of tensor names are in `layouts`. Reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import copy
import functools
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, StrictDataclassError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from gpt_kit_hf.errors import CheckpointError, UsageError, one_line, unknown_name
from gpt_kit_hf.model.checkpoints.layouts import (
    CLASSIFIERS,
    GPT2_NAMES,
    HEAD,
    POSITIONS,
    TOKENS,
    build_model,
    check_tensors,
    choose_class,
    equal_tensors,
    expand_braces,
    name_of_positions,
    refuse_names,
    rename_tensors,
    stored_shapes,
)
from gpt_kit_hf.model.checkpoints.state_dicts import load_state_dict
from gpt_kit_hf.model.checkpoints.weight_files import (
    PICKLES,
    SAFETENSORS,
    is_weight_file,
    read_weights,
    strip_prefix,
    tensorflow_hint,
)
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM, GPTKitPreTrainedModel
from gpt_kit_hf.model.own_class import is_gpt_kit, own_model
from gpt_kit_hf.model.presets import config_error_message
from gpt_kit_hf.options.files import may_be_hub_id
from gpt_kit_hf.options.model import Activation, Layout
from gpt_kit_hf.storage.atomic_files import load_json

_T = TypeVar("_T")
# What GPT-2 has no field for.
_GPT2_SHAPE = {"norm": "layernorm", "mlp": "gelu", "qk_norm": False}

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
# Fields that GPT2Config and GPTKitConfig share, the latter partly as aliases.
_GPT2_FIELDS = (
    *("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "activation_function"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "id2label", "label2id", "problem_type"),
)
# Switches of transformers' GPT-2 that this model lacks, with the values that it computes.
_GPT2_SWITCHES = MappingProxyType(
    {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
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
    model = _load_gpt2(_find_folder(path_or_id), dtype, drop_classifier)
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
        computes = ", and its code computes something else than this package's" if is_gpt_kit(model) else ""
        raise UsageError(f"model is a {type(model).__name__}{computes}; it must be a GPTKitForCausalLM")
    with new_folder(path) as stage:
        write_folder(as_gpt2(own), stage, tokenizer_folder)


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    layout: Layout,
    *,
    n_head: int | None = None,
    hidden_act: Activation | None = None,
    eos_token_id: int | None = None,
    lora_scaling: float | None = None,
    drop_classifier: bool = False,
    tokenizer_folder: str | Path | None = None,
) -> None:
    """Write the model in `source` to `destination`, a folder that is empty or does not exist.

    - "gpt2": from a GPT-2 folder or Hub id to a folder of this package, with the tokenizer;
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
    if layout not in get_args(Layout):
        raise UsageError(unknown_name("layout", layout, get_args(Layout)))
    chosen = {"n_head": n_head, "hidden_act": hidden_act, "eos_token_id": eos_token_id}
    with new_folder(destination) as stage:
        model: PreTrainedModel
        file = Path(source)
        if layout in ("nanogpt", "kit", "gpt-kit") or (layout == "gpt2" and is_weight_file(file)):
            model = load_state_dict(file, layout, chosen, lora_scaling, drop_classifier)
        else:
            given = [name for name, value in {**chosen, "lora_scaling": lora_scaling}.items() if value is not None]
            if given:
                raise UsageError(f"{', '.join(given)}: for a file of weights only; a folder has a config.json")
            folder = _find_folder(source)
            if tokenizer_folder is None and any((folder / name).is_file() for name in _TOKENIZER_FILES):
                tokenizer_folder = folder
            if layout == "gpt2":
                model = _load_gpt2(folder, torch.float32, drop_classifier)
            else:
                model = as_gpt2(_load_gpt_kit(folder))
        write_folder(model, stage, tokenizer_folder)


# --- reading


def _load_gpt2(folder: Path, dtype: torch.dtype, drop_classifier: bool) -> GPTKitPreTrainedModel:
    config = _read_gpt2_config(folder / "config.json")
    stored = strip_prefix(read_weights(folder), name_of_positions(GPT2_NAMES), str(folder))
    tensors = rename_tensors(stored, GPT2_NAMES, str(folder))
    del stored  # otherwise it would keep the memory that `build_model` releases
    kind = choose_class(tensors, config, str(folder), drop=drop_classifier)
    if HEAD in tensors and TOKENS in tensors and not equal_tensors(tensors[HEAD], tensors[TOKENS]):
        config.tie_word_embeddings = False
    generation_config = _read_generation_config(folder, config)
    model = build_model(config, tensors, dtype, str(folder), kind)
    if model.can_generate():
        model.generation_config = generation_config
    return model


def _read_gpt2_config(path: Path) -> GPTKitConfig:
    """Return the configuration for a GPT-2's config.json."""
    if not path.is_file():
        raise UsageError(f"{str(path.parent)!r} holds no config.json{tensorflow_hint(path.parent)}")
    stored = load_json(path)
    # The first GPT-2 configurations had no model_type.
    if stored.get("model_type", "gpt2" if "n_embd" in stored else None) != "gpt2":
        own = "; to write it as GPT-2, give layout to-gpt2" if stored.get("model_type") == "gpt_kit" else ""
        raise UsageError(f"{path}: model_type is {stored.get('model_type')!r}; it must be 'gpt2'{own}")
    if stored.get("quantization_config"):
        raise UsageError(f"{path}: the weights are quantized; convert the checkpoint that they were made from")
    gpt2 = _checked(lambda: GPT2Config.from_dict(stored), path)
    for name, value in _GPT2_SWITCHES.items():
        if getattr(gpt2, name) != value:
            raise UsageError(f"{path}: {name}={getattr(gpt2, name)} is not supported; it must be {value}")
    if gpt2.activation_function not in get_args(Activation):
        raise UsageError(
            f"{path}: activation_function={gpt2.activation_function!r} is not supported; "
            f"it must be one of {', '.join(get_args(Activation))}"
        )
    return _checked(lambda: GPTKitConfig(**{name: getattr(gpt2, name) for name in _GPT2_FIELDS}), path)


def _read_generation_config(folder: Path, config: GPTKitConfig) -> GenerationConfig:
    path = folder / "generation_config.json"
    if not path.is_file():
        # Older folders keep generation settings in config.json.
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        return GenerationConfig.from_model_config({**ids, **load_json(folder / "config.json")})
    load_json(path)  # for its error message
    return _checked(lambda: GenerationConfig.from_pretrained(folder), path)


def _checked(build: Callable[[], _T], source: object) -> _T:
    """Return `build()`; UsageError in one line for a stored value that it refuses."""
    try:
        return build()
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UsageError(f"{source}: {config_error_message(error)}") from None


def _find_folder(path_or_id: str | Path) -> Path:
    """Return a local folder, or the cached copy of a Hub repository with only the needed files."""
    folder, text = Path(path_or_id), str(path_or_id)
    if folder.is_dir():
        return folder
    # A Hub id is a name with at most an owner before it.
    if isinstance(path_or_id, Path) or folder.exists() or not may_be_hub_id(text):
        raise UsageError(f"{text!r} is no folder{tensorflow_hint(folder)}")
    patterns = ["config.json", "generation_config.json", *_TOKENIZER_FILES]
    try:
        fetched = snapshot_download(text, allow_patterns=[*patterns, *SAFETENSORS, "model-*.safetensors"])
        # Many repositories hold both formats; the pickle is downloaded only if there are no safetensors.
        if not any((Path(fetched) / name).is_file() for name in SAFETENSORS):
            fetched = snapshot_download(text, allow_patterns=[*patterns, *PICKLES, "pytorch_model-*.bin"])
        return Path(fetched)
    except RepositoryNotFoundError:
        reason = "no such local folder, and no such repository on the Hub, or no access to it"
    except LocalEntryNotFoundError:
        reason = "no such local folder; the Hub cannot be reached, and its cache does not hold the repository"
    except Exception as error:  # the Hub client also raises errors of its HTTP library
        reason = one_line(error)
    raise UsageError(f"{text!r}: {reason}")


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


# --- writing


def as_gpt2(model: GPTKitForCausalLM) -> GPT2LMHeadModel:
    """Return a GPT2LMHeadModel that computes the same."""
    config = model.config
    ours = _tensors_for_gpt2(model)
    stored: dict[str, Tensor] = {}
    for theirs, target in GPT2_NAMES.items():
        if target == "" or (not target.startswith("model.") and target not in ours):
            continue
        for layer in range(config.n_layer if "{layer}" in target else 1):
            parts = expand_braces(target.removesuffix(".T").replace("{layer}", str(layer)))
            tensor = torch.cat([ours[part].detach().to("cpu") for part in parts])  # 3 of (D, D) -> (3D, D)
            tensor = tensor.T if target.endswith(".T") else tensor
            stored[theirs.replace("{layer}", str(layer))] = tensor.contiguous()
    fields = {name: getattr(config, name) for name in _GPT2_FIELDS}
    fields["activation_function"] = "gelu" if config.hidden_act == "gelu" else "gelu_new"
    fields["tie_word_embeddings"] = HEAD not in ours
    if config.n_inner == 4 * config.n_embd:
        fields["n_inner"] = None  # as in the published GPT-2: some readers do not know the field
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in stored.values()))
    gpt2 = GPT2LMHeadModel.from_pretrained(None, config=GPT2Config(**fields), state_dict=stored, dtype=dtype)
    gpt2.generation_config = copy.deepcopy(model.generation_config)
    return gpt2


def _tensors_for_gpt2(model: GPTKitForCausalLM) -> dict[str, Tensor]:
    """Return the model's tensors and those that only GPT-2 stores; the output projection only if it is not tied."""
    config, ours = copy.deepcopy(model.config), dict(model.state_dict())
    for name, value in _GPT2_SHAPE.items():
        if getattr(config, name) != value:
            raise UsageError(f"GPT-2 has {name}={value!r}, the model {getattr(config, name)!r}")
    if model.model.embed_positions is None:
        raise UsageError(f"GPT-2 has a table of positions, the model position_embedding={config.position_embedding!r}")
    # An output projection that was untied after construction keeps its values, whatever the configuration says.
    if config.tie_word_embeddings and {HEAD, TOKENS} <= ours.keys() and equal_tensors(ours[HEAD], ours[TOKENS]):
        del ours[HEAD]
    else:
        config.tie_word_embeddings = False
    shapes = stored_shapes(config)
    check_tensors(ours, shapes, "model")
    if not config.use_bias:
        for name in shapes.keys() - {TOKENS, POSITIONS, HEAD}:
            ours[f"{name.removesuffix('weight')}bias"] = ours[name].new_zeros(ours[name].shape[0])
    # Sinusoidal positions are a buffer that is not in the state dict.
    positions = model.model.embed_positions.weight
    assert isinstance(positions, Tensor)
    ours.setdefault(POSITIONS, positions.to(ours[TOKENS].dtype))
    return ours


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` that is renamed to it at the end, or removed after an error."""
    final = Path(path).absolute()
    if final.exists() and not (final.is_dir() and next(final.iterdir(), None) is None):
        raise UsageError(f"{str(path)!r} exists and is not an empty folder; nothing is overwritten")
    stage = final.with_name(f".{final.name}.{secrets.token_hex(8)}")
    try:
        stage.mkdir(parents=True)
        yield stage
        stage.rename(final)
    except OSError as error:
        raise CheckpointError(f"{path} was not written: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_folder(model: PreTrainedModel, stage: Path, tokenizer_folder: str | Path | None) -> None:
    """Write a model to a folder, and copy the tokenizer of another; UsageError if that does not fit."""
    if tokenizer_folder is not None:
        _write_tokenizer(Path(tokenizer_folder), stage, model.config.vocab_size)
    _checked(lambda: model.save_pretrained(stage), "model")


def _write_tokenizer(folder: Path, stage: Path, vocab_size: int) -> None:
    """Copy the tokenizer's files, or rewrite them with AutoTokenizer if they do not name a tokenizer class."""
    settings, written = folder / "tokenizer_config.json", stage / "tokenizer.json"
    try:
        if (folder / written.name).is_file() and settings.is_file() and "tokenizer_class" in load_json(settings):
            for name in _TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, stage / name)
        else:
            AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).save_pretrained(str(stage))
        ids = Tokenizer.from_file(str(written)).get_vocab(with_added_tokens=True).values()
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UsageError(f"tokenizer_folder {str(folder)!r} cannot be read: {one_line(error)}") from None
    if max(ids, default=0) >= vocab_size:
        raise UsageError(f"tokenizer_folder {str(folder)!r} has the id {max(ids)}, the model vocab_size={vocab_size}")
