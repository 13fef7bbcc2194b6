"""The check of a model folder of unknown origin before it is loaded: no pickle, no code, no absurd sizes.

It reads file names, JSON of bounded size and safetensors headers, never a weight, so a folder of any size is checked
at once. It covers what transformers and PEFT would open; other files, such as pickles beside safetensors, are ignored.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gpt_kit_hf.hub.untrusted_files import (
    Shapes,
    check_size,
    count_elements,
    largest_dimension,
    read_header,
    read_object,
    refuse,
    show,
)
from gpt_kit_hf.model.checkpoints.layouts import HEAD, stored_shapes
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", ".safetensors.index.json"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_STATE, _OPTIMIZER, _MANIFEST = "training_state.json", "optimizer.safetensors", "manifest.json"
_TEMPLATES = "additional_chat_templates"

# Loaders open files with these suffixes by name. Of other files only pickles matter, and only their names.
_LOADABLE = (".json", ".safetensors", ".jinja", ".model", ".txt")
_PICKLES = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp", ".metadata")
# transformers prefers such files to the weights that everyone else reads.
_RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

# Bytes; several times the largest known file of each kind.
_MIB = 1 << 20
_MAX_BYTES = {
    **dict.fromkeys((_CONFIG, "generation_config.json", "special_tokens_map.json", _ADAPTER_CONFIG), 4 * _MIB),
    **dict.fromkeys(("processor_config.json", "preprocessor_config.json", "chat_template.json"), 4 * _MIB),
    **dict.fromkeys(("tokenizer_config.json", "added_tokens.json", _MANIFEST), 16 * _MIB),
    **dict.fromkeys((_STATE, f"model{_INDEX}"), 32 * _MIB),
    **dict.fromkeys(("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"), 64 * _MIB),
    **dict.fromkeys(("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model"), 64 * _MIB),
}
_CHECKED_BEFORE = {_CONFIG, _ADAPTER_CONFIG, _STATE, _MANIFEST, f"model{_INDEX}"}
_MAX_TEMPLATE_BYTES = 1 * _MIB
_MAX_VOCABULARY_VALUES = 3_000_000  # other JSON files have the limit of `read_object`
_MAX_FIELDS = 1_000
_MAX_TENSORS, _MAX_FILES = 200_000, 10_000

_LAYERS = ("n_layer", "num_hidden_layers", "num_layers", "n_layers")
_WIDTHS = ("n_embd", "hidden_size", "d_model")
_HEADS = ("n_head", "num_attention_heads", "num_key_value_heads")
_OTHER_SIZES = ("n_inner", "intermediate_size", "max_position_embeddings", "n_positions", "n_ctx")
# The largest integer by the end of its field's name: each of these fields is a loop of a constructor.
_MAX_BY_FIELD = (
    (re.compile(r"layers?$"), 1024),
    (re.compile(r"labels$"), 1 << 15),
    (re.compile(r"experts$"), 1 << 16),
)
# A claim of fewer elements does no harm, however little is stored.
_HARMLESS_ELEMENTS = 1 << 26
# Fields of tokenizer_config.json that the tokenizer's class takes for files, wherever they are.
_TOKENIZER_FILES = ("init_inputs", "vocab", "merges", "gguf_file", "tokenizer_object", "fast_tokenizer_files")
# Fields of adapter_config.json that make PEFT import a module by name, or copy layers of the base.
_ADAPTER_EXTRAS = ("megatron_config", "layer_replication")


def check_model_folder(folder: Path) -> None:
    """Raise CheckpointError, one line with file, fault and rule, unless the folder can be loaded safely.

    `folder` is one of a model, an adapter or a checkpoint of a run. Its weights must be complete safetensors that fit
    the configuration, its JSON valid and of bounded size; files must be in the folder, or in the Hub cache's blob
    store if the folder is a snapshot; nothing may need code from the folder. An adapter's base is checked, too, if it
    is a local folder.
    """
    try:
        _check_folder(folder, is_base=False)
    except (OSError, RuntimeError) as error:  # before Python 3.13, a cycle of links is a RuntimeError
        refuse(folder, f"it cannot be read: {error}")


def _check_folder(folder: Path, *, is_base: bool) -> None:
    files, pickles = _list_folder(folder)
    if _CONFIG not in files and (is_base or _ADAPTER_CONFIG not in files):
        refuse(folder, f"it holds no {_CONFIG}")
    shapes: Shapes = {}
    if _CONFIG in files:
        config = _load_json(files[_CONFIG])
        _check_config(files[_CONFIG], config)
        shapes = _read_weights(folder, files, pickles, config)
        # A loader would allocate sizes that the weights do not have, and fill them with random numbers.
        for each in (config, config.get("text_config")) if shapes else ():
            if isinstance(each, dict):
                _check_sizes(files[_CONFIG], each, shapes)
        if shapes and config.get("model_type") == GPTKitConfig.model_type:
            _check_gpt_kit(files[_CONFIG], config, shapes)
    if _ADAPTER_CONFIG in files:
        shapes |= _check_adapter(folder, files, alone=_CONFIG not in files)
    if _STATE in files:
        _check_state(folder, files, shapes)
    # Last, as vocabularies are slow to parse.
    for name in sorted(files.keys() & _MAX_BYTES.keys() - _CHECKED_BEFORE):
        if name == "tokenizer_config.json":
            _check_tokenizer_config(files[name])
        elif name.endswith(".json"):
            _load_json(files[name])
        else:
            check_size(files[name], _MAX_BYTES[name])


# --- files -----------------------------------------------------------------------------------------------


def _list_folder(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files that a loader may open, by name, all of them regular files, and the names of pickles."""
    root = folder.resolve(strict=True)
    names = sorted(path.name for path in root.iterdir())
    files = {name: folder / name for name in names if name.endswith(_LOADABLE)}
    if len(files) > _MAX_FILES:
        refuse(folder, f"it holds {len(files):,} model files; {_MAX_FILES:,} are allowed")
    files |= {f"{_TEMPLATES}/{path.name}": path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    for name, path in files.items():
        _check_regular(path, root)
        if _RANK_SHARD.fullmatch(name):
            refuse(path, "it is a shard of a distributed checkpoint, which transformers would prefer to the weights")
        if name.endswith(".jinja"):
            check_size(path, _MAX_TEMPLATE_BYTES)
    return files, [name for name in names if name.endswith(_PICKLES)]


def _check_regular(path: Path, root: Path) -> None:
    """Refuse what is no regular file, and a link that leaves `root` for anything but the Hub cache's blob stores."""
    allowed = [root]
    for snapshot in (root, *root.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            allowed += [repository / "blobs", repository.parent / "blobs"]  # its own store, and the shared one
            break
    real = path.resolve(strict=True)
    if not any(real.is_relative_to(place) for place in allowed):
        refuse(path, "it is a link out of its folder; a model's files must be in its folder")
    if not real.is_file():
        refuse(path, "it must be a regular file, not a folder, a pipe or a device")


def _load_json(path: Path) -> dict[str, Any]:
    limit = {"max_values": _MAX_VOCABULARY_VALUES} if path.name in ("tokenizer.json", "tekken.json") else {}
    return read_object(path, max_bytes=_MAX_BYTES.get(path.name, 4 * _MIB), **limit)


# --- weights ---------------------------------------------------------------------------------------------


def _read_weights(folder: Path, files: Mapping[str, Path], pickles: list[str], config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the weights that `from_pretrained` would load; an empty dict if there are no weights."""
    name = config.get("transformers_weights")
    if name is None:
        name = next((name for name in (_WEIGHTS, f"model{_INDEX}") if name in files), None)
    elif not isinstance(name, str) or name not in files or not name.endswith((".safetensors", _INDEX)):
        refuse(folder / _CONFIG, f"transformers_weights is {show(name)}; it must name safetensors beside it")
    if name is None:
        if pickles:
            refuse(folder / pickles[0], "its weights are a pickle, which can run code: store them as safetensors")
        return {}
    shapes = _read_shards(files[name], files) if name.endswith(_INDEX) else read_header(files[name])
    if not shapes:
        refuse(files[name], "it holds no tensors")
    return shapes


def _read_shards(index: Path, files: Mapping[str, Path]) -> Shapes:
    """Return the shapes of the tensors in all files that an index names."""
    weight_map = _load_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        refuse(index, "it has no weight_map from tensors to files")
    shapes: Shapes = {}
    for shard in sorted(weight_map.values(), key=str):
        # `files` holds plain names of this folder: a path that leaves it is not among them.
        if not isinstance(shard, str) or shard not in files or not shard.endswith(".safetensors"):
            refuse(index, f"it points to {show(shard)}; a shard must be a safetensors file beside its index")
    for shard in sorted(set(weight_map.values())):
        stored = read_header(files[shard])
        if duplicates := stored.keys() & shapes.keys():
            refuse(files[shard], f"it holds {show(min(duplicates))}, which another shard holds, too")
        shapes |= stored
        if len(shapes) > _MAX_TENSORS:
            refuse(index, f"its shards hold more than the {_MAX_TENSORS:,} tensors that a model may have")
    if missing := weight_map.keys() - shapes.keys():
        refuse(index, f"it lists {show(min(missing))}, which no shard holds")
    return shapes


# --- configuration ---------------------------------------------------------------------------------------


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse fields that lead to code, to other files, or to endless loops."""
    model_type, own = config.get("model_type"), _own_code(path, config)
    if own and (model_type not in tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or "AutoTokenizer" in own):
        # transformers would ask, and at a terminal a user might say yes.
        refuse(path, f"model_type {show(model_type)} needs code of its own (auto_map), which is not run")
    if len(config) > _MAX_FIELDS:  # transformers compares each unknown field with all known ones
        refuse(path, f"it has {len(config):,} fields; it may have {_MAX_FIELDS:,}")
    if "configuration_files" in config:
        refuse(path, "configuration_files names other files to be read in its place")
    for name, value in _walk(config):
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            refuse(path, f"{name} is {show(value)}, code from the Hub, which is not run")
        if type(value) is int:
            maximum = next((maximum for end, maximum in _MAX_BY_FIELD if end.search(name)), (1 << 63) - 1)
            if abs(value) > maximum:
                refuse(path, f"{name} is {show(value)}; it may be {maximum:,} at most")


def _own_code(path: Path, settings: Mapping[str, Any]) -> Collection[str]:
    """Return the names of the Auto classes for which the folder has code of its own."""
    auto_map = settings.get("auto_map") or {}
    if isinstance(auto_map, list):  # the oldest form
        return ("AutoTokenizer",)
    if not isinstance(auto_map, dict):
        refuse(path, f"auto_map is {show(auto_map)}; it must be a JSON object")
    return auto_map.keys()


def _walk(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (field, value) for each scalar of a configuration; one in a list has the field of the list."""
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            # Implementations by submodule: the keys are names of submodules.
            keep = name.endswith("_implementation")
            pending += [(name if keep else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(name, inner) for inner in value]
        else:
            yield name, value


def _check_tokenizer_config(path: Path) -> None:
    settings = _load_json(path)
    if "AutoTokenizer" in _own_code(path, settings):
        refuse(path, "the tokenizer needs code of its own (auto_map), which is not run")
    for name in _TOKENIZER_FILES:
        if settings.get(name):
            refuse(path, f"{name} names what to read; a tokenizer is read from the files of its folder")


def _check_sizes(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse sizes that no model with these weights has, whatever its type; absent fields are not checked."""
    for name in (*_LAYERS, *_WIDTHS, "vocab_size"):
        value = config.get(name)
        maximum = max(128, len(shapes)) if name in _LAYERS else largest_dimension(shapes)
        if value is not None and not (type(value) is int and 1 <= value <= maximum):
            refuse(path, f"{name} is {show(value)}; by the weights it must be an integer from 1 to {maximum:,}")
    width = max((config[name] for name in _WIDTHS if config.get(name)), default=1)
    head_dim = config.get("head_dim")
    # Quantized weights store up to 16 numbers in one element.
    maximum = max(_HARMLESS_ELEMENTS, 16 * count_elements(shapes)) // width
    for name in (*_LAYERS, "vocab_size", *_OTHER_SIZES, *_HEADS):
        values = config.get(name)
        factor = width if name in _LAYERS else head_dim if name in _HEADS and type(head_dim) is int else 1
        for value in values if isinstance(values, list) else [values]:
            if type(value) is int and value * factor > maximum:
                refuse(path, f"{name} is {show(value)}, more than the {count_elements(shapes):,} weights can hold")


def _check_gpt_kit(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse weights that are not those of the model on the meta device; tensors of other tools may be added."""
    try:
        described = GPTKitConfig.from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # untrusted values can fail with any exception
        refuse(path, f"it is not a configuration of this model: {error.__cause__ or error}")
    layers = {int(found[1]) for found in map(re.compile(r"(?:model\.)?layers\.(\d{1,9})\.").match, shapes) if found}
    if layers != set(range(described.n_layer)):
        refuse(path, f"n_layer is {described.n_layer}, the weights hold {len(layers)} layers")
    if config.get("quantization_config"):  # each method stores a matrix as other tensors
        return
    expected = {name: tuple(shape) for name, shape in stored_shapes(described).items()}
    if HEAD in shapes:  # a tied head may be stored, too
        expected[HEAD] = (described.vocab_size, described.n_embd)
    elif shapes.keys() & {"score.weight", "qa_outputs.weight"}:  # a classifier
        expected.pop(HEAD, None)
    prefix = "" if "embed_tokens.weight" in shapes else "model."  # a model without its head is saved without a prefix
    expected = {name if name == HEAD else prefix + name.removeprefix("model."): expected[name] for name in expected}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            stored = f"have shape {list(shapes[name])}" if name in shapes else "lack it"
            refuse(path, f"{name} must have shape {list(shape)}, the weights {stored}")
    own = tuple(f"{prefix}{name}" for name in ("layers.", "norm.", "embed_"))
    if unread := sorted(name for name in shapes.keys() - expected.keys() if name.startswith(own)):
        refuse(path, f"the model that it describes has no {show(unread[0])}, which the weights hold")


# --- adapters and checkpoints ----------------------------------------------------------------------------


def _check_adapter(folder: Path, files: Mapping[str, Path], *, alone: bool) -> Shapes:
    """Return the shapes of an adapter's weights; an `alone` adapter's base is the model that it names."""
    path = files[_ADAPTER_CONFIG]
    settings = _load_json(path)
    if settings.get("peft_type") != "LORA":
        # Other types can read files and fetch tokenizers that their settings name.
        refuse(path, f"peft_type is {show(settings.get('peft_type'))}; only adapters of type 'LORA' are loaded")
    for name in _ADAPTER_EXTRAS:
        if settings.get(name):
            refuse(path, f"{name} is set; only adapters that add matrices and nothing else are loaded")
    if _ADAPTER_WEIGHTS not in files:
        refuse(folder / _ADAPTER_WEIGHTS, "it is missing; the weights of an adapter must be safetensors")
    shapes = read_header(files[_ADAPTER_WEIGHTS])
    maximum, pattern = largest_dimension(shapes), settings.get("rank_pattern") or {}
    for rank in [settings.get("r", 8), *(pattern.values() if isinstance(pattern, dict) else [pattern])]:
        if type(rank) is not int or not 1 <= rank <= maximum:
            refuse(path, f"the rank is {show(rank)}; by the weights it must be an integer from 1 to {maximum:,}")
    base = settings.get("base_model_name_or_path")
    if alone and isinstance(base, str) and _is_folder(base):
        _check_folder(Path(base), is_base=True)
    return shapes


def _is_folder(place: str) -> bool:
    try:
        return Path(place).is_dir()
    except (OSError, ValueError):  # not a path at all
        return False


def _check_state(folder: Path, files: Mapping[str, Path], shapes: Shapes) -> None:
    """Refuse a checkpoint whose training state is too large for its weights, or that holds a pickle."""
    for name in files.keys() & {_STATE, _MANIFEST}:
        _load_json(files[name])
    tensors = 0
    for path in _files_below(folder):
        if path.name.endswith(_PICKLES):
            refuse(path, "it is a pickle, which can run code; a checkpoint of a run holds none")
        if path.suffix != ".safetensors" or (path.parent == folder and path.name != _OPTIMIZER):
            continue
        _check_regular(path, folder.resolve())
        state = read_header(path)
        tensors += len(state)
        if tensors > _MAX_TENSORS:
            refuse(folder, f"its state has more than the {_MAX_TENSORS:,} tensors that it may have")
        # An optimizer has a few numbers for each weight, and one or two for each tensor.
        if path.name == _OPTIMIZER and count_elements(state) > 16 * (count_elements(shapes) + len(shapes)):
            refuse(
                path, f"it holds {count_elements(state):,} numbers, too many for {count_elements(shapes):,} weights"
            )


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders; links to folders are not followed."""
    seen = 0
    for parent, _, names in os.walk(folder):
        seen += len(names)
        if seen > _MAX_FILES:
            refuse(folder, f"it holds more than the {_MAX_FILES:,} files that a checkpoint may have")
        yield from (Path(parent, name) for name in sorted(names))
