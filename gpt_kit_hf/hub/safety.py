"""Whether a model folder, which may come from a stranger, can be loaded: no pickle, no code, no surprise in its sizes.

Read are the names in the folder, JSON files of bounded size and the headers of safetensors files: no weight is read
and no model is built, so a folder of any size is judged at once. What is judged is what transformers and PEFT would
read. Files beside that, such as pickles next to safetensors, are left alone, as nothing opens them.
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
    count_numbers,
    largest_size,
    read_header,
    read_object,
    refuse,
    show,
)
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", ".safetensors.index.json"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_STATE, _OPTIMIZER, _MANIFEST = "training_state.json", "optimizer.safetensors", "manifest.json"
_TEMPLATES = "additional_chat_templates"

# What a loader opens by its name; of everything else only those that hold pickles are looked at, by name.
_READ = (".json", ".safetensors", ".jinja", ".model", ".txt")
_PICKLES = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp", ".metadata")
# transformers prefers such files to the weights that everyone else reads.
_RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

# In bytes; several times the largest that is known of each kind.
_MIB = 1 << 20
_MOST_BYTES = {
    **dict.fromkeys((_CONFIG, "generation_config.json", "special_tokens_map.json", _ADAPTER_CONFIG), 4 * _MIB),
    **dict.fromkeys(("processor_config.json", "preprocessor_config.json", "chat_template.json"), 4 * _MIB),
    **dict.fromkeys(("tokenizer_config.json", "added_tokens.json", _MANIFEST), 16 * _MIB),
    **dict.fromkeys((_STATE, f"model{_INDEX}"), 32 * _MIB),
    **dict.fromkeys(("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"), 64 * _MIB),
    **dict.fromkeys(("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model"), 64 * _MIB),
}
_MOST_TEMPLATE_BYTES = 1 * _MIB
_MOST_VOCABULARY_VALUES = 3_000_000  # the ordinary bound is that of `read_object`
_READ_BEFORE = {_CONFIG, _ADAPTER_CONFIG, _STATE, _MANIFEST, f"model{_INDEX}", "tokenizer_config.json"}
_MOST_FIELDS = 1_000
_MOST_TENSORS, _MOST_FILES = 200_000, 10_000

_LAYERS = ("n_layer", "num_hidden_layers", "num_layers", "n_layers")
_WIDTHS = ("n_embd", "hidden_size", "d_model")
_HEADS = ("n_head", "num_attention_heads", "num_key_value_heads")
_OTHER_SIZES = ("n_inner", "intermediate_size", "max_position_embeddings", "n_positions", "n_ctx")
# What a number in a configuration may be at most, by the end of its name: each one is a loop of a constructor.
_MOST = ((re.compile(r"layers?$"), 1024), (re.compile(r"labels$"), 1 << 15), (re.compile(r"experts$"), 1 << 16))
# Below so many elements a claim does no harm, however little is stored.
_HARMLESS = 1 << 26
# In a tokenizer's settings: what its class would take for files, and read wherever they lie.
_TOKENIZER_ROADS = ("init_inputs", "vocab", "merges", "gguf_file", "tokenizer_object", "fast_tokenizer_files")
# In an adapter's settings: what makes PEFT import a module by its name, and what copies layers of the base.
_ADAPTER_ROADS = ("megatron_config", "layer_replication")


def check_model_folder(folder: Path) -> None:
    """Raise CheckpointError, in one line with file, fault and rule, unless a folder can be loaded safely.

    The folder is one of a model, of an adapter, or a checkpoint of a run. Its weights are whole safetensors, which the
    configuration describes; what is JSON is well-formed and of bounded size; files lie in the folder, or in the store
    of the Hub's cache if that is where the folder is; nothing needs code of the folder's own. An adapter's base is
    checked with it where it is a folder, too.
    """
    try:
        _check_folder(folder, has_base=False)
    except (OSError, RuntimeError) as error:  # before Python 3.13, links in a circle are a RuntimeError
        refuse(folder, f"it cannot be read: {error}")


def _check_folder(folder: Path, *, has_base: bool) -> None:
    files, pickles = _list_folder(folder)
    if _CONFIG not in files and (has_base or _ADAPTER_CONFIG not in files):
        refuse(folder, f"it holds no {_CONFIG}")
    config: dict[str, Any] = {}
    if _CONFIG in files:
        config = _load_json(files[_CONFIG])
        _check_configuration(files[_CONFIG], config)
    if "tokenizer_config.json" in files:
        _check_tokenizer_settings(files["tokenizer_config.json"])
    shapes = _read_weights(folder, files, pickles, config) if _CONFIG in files else {}
    if shapes:
        _check_claims(files[_CONFIG], config, shapes)
    if _ADAPTER_CONFIG in files:
        shapes |= _check_adapter(folder, files, alone=_CONFIG not in files)
    if _STATE in files:
        _check_state(folder, files, shapes)
    for name in sorted(files.keys() & _MOST_BYTES.keys() - _READ_BEFORE):
        # Not before: among these are the slow ones.
        _load_json(files[name]) if name.endswith(".json") else check_size(files[name], _MOST_BYTES[name])


# --- files -----------------------------------------------------------------------------------------------


def _list_folder(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files that a loader may open, by name, all of them plain, and the names of pickles."""
    root = folder.resolve(strict=True)
    names = sorted(path.name for path in root.iterdir())
    files = {name: folder / name for name in names if name.endswith(_READ)}
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if len(files) > _MOST_FILES:
        refuse(folder, f"it holds {len(files):,} files of a model's kinds; {_MOST_FILES:,} are allowed")
    templates = folder / _TEMPLATES
    if _TEMPLATES in names and templates.is_dir():
        files |= {f"{_TEMPLATES}/{path.name}": path for path in sorted(templates.iterdir()) if path.suffix == ".jinja"}
    stores = _hub_stores(root)
    for name, path in files.items():
        _check_plain(path, (root, *stores))
        if _RANK_SHARD.fullmatch(name):
            refuse(path, "a part of a distributed checkpoint, which transformers would read in place of the weights")
        if name.endswith(".jinja"):
            check_size(path, _MOST_TEMPLATE_BYTES)
    return files, pickles


def _hub_stores(root: Path) -> tuple[Path, ...]:
    """Return where the files of a snapshot in the Hub's cache lie: the store of its repository, and the shared one."""
    for snapshot in (root, *root.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs", repository.parent / "blobs"
    return ()


def _check_plain(path: Path, roots: tuple[Path, ...]) -> None:
    real = path.resolve(strict=True)
    if not any(real.is_relative_to(root) for root in roots):
        refuse(path, "it is a link out of its folder; a model's files must lie in it")
    if not real.is_file():
        refuse(path, "it must be a plain file, not a folder, a pipe or a device")


def _load_json(path: Path) -> dict[str, Any]:
    values = {"most_values": _MOST_VOCABULARY_VALUES} if path.name in ("tokenizer.json", "tekken.json") else {}
    return read_object(path, most_bytes=_MOST_BYTES.get(path.name, 4 * _MIB), **values)


# --- weights ---------------------------------------------------------------------------------------------


def _read_weights(folder: Path, files: Mapping[str, Path], pickles: list[str], config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the weights that `from_pretrained` would take; none where there is no file of weights."""
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
        # Only names of the folder's own listing: nothing that leaves it is among them.
        if not isinstance(shard, str) or shard not in files or not shard.endswith(".safetensors"):
            refuse(index, f"it points to {show(shard)}; a shard must be a safetensors file beside its index")
    for shard in sorted(set(weight_map.values())):
        stored = read_header(files[shard])
        if twice := stored.keys() & shapes.keys():
            refuse(files[shard], f"it holds {show(min(twice))}, which another shard holds, too")
        shapes |= stored
        if len(shapes) > _MOST_TENSORS:
            refuse(index, f"its shards hold more than the {_MOST_TENSORS:,} tensors that a model may have")
    if missing := weight_map.keys() - shapes.keys():
        refuse(index, f"it lists {show(min(missing))}, which no shard holds")
    return shapes


# --- configuration ---------------------------------------------------------------------------------------


def _check_configuration(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings that lead to code, to other files, or into endless loops."""
    model_type, own = config.get("model_type"), _own_code(path, config)
    if own and (model_type not in tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or "AutoTokenizer" in own):
        # transformers would ask, and at a terminal a user might say yes.
        refuse(path, f"model_type {show(model_type)} needs code of its own (auto_map), which is not run")
    if len(config) > _MOST_FIELDS:  # each unknown one is compared with all that are known
        refuse(path, f"it has {len(config):,} fields; it may have {_MOST_FIELDS:,}")
    if "configuration_files" in config:
        refuse(path, "configuration_files names other files to be read in its place")
    for name, value in _walk(config):
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            refuse(path, f"{name} is {show(value)}, code from the Hub, which is not run")
        if type(value) is not int:
            continue
        most = next((most for end, most in _MOST if end.search(name)), (1 << 63) - 1)
        if abs(value) > most:
            refuse(path, f"{name} is {show(value)}; it may be {most:,} at most")


def _own_code(path: Path, settings: Mapping[str, Any]) -> Collection[str]:
    """Return the names of the Auto classes for which a folder has code of its own."""
    auto_map = settings.get("auto_map") or {}
    if isinstance(auto_map, list):  # the oldest form
        return ("AutoTokenizer",)
    if not isinstance(auto_map, dict):
        refuse(path, f"auto_map is {show(auto_map)}; it must be a JSON object")
    return auto_map.keys()


def _walk(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every plain value in a configuration with the name that it, or the list that it is in, stands under."""
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            # One implementation for each part of a model: the parts' names say nothing.
            keep = name.endswith("_implementation")
            pending += [(name if keep else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(name, inner) for inner in value]
        else:
            yield name, value


def _check_tokenizer_settings(path: Path) -> None:
    settings = _load_json(path)
    if "AutoTokenizer" in _own_code(path, settings):
        refuse(path, "the tokenizer needs code of its own (auto_map), which is not run")
    for name in _TOKENIZER_ROADS:
        if settings.get(name):
            refuse(path, f"{name} names what to read; a tokenizer is read from the files of its folder")


def _check_claims(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse sizes that the weights do not bear out, which would be built and filled with random numbers."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            _check_sizes(path, part, shapes)
    if config.get("model_type") != GPTKitConfig.model_type:
        return
    try:
        ours = GPTKitConfig.from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # a stranger's values can fail as anything
        refuse(path, f"it is not a configuration of this model: {error.__cause__ or error}")
    layers = {int(found[1]) for found in map(re.compile(r"(?:model\.)?layers\.(\d{1,9})\.").match, shapes) if found}
    if layers != set(range(ours.n_layer)):
        refuse(path, f"n_layer is {ours.n_layer}, the weights hold {len(layers)} layers")
    if not config.get("quantization_config"):  # which stores a matrix as other tensors, each method its own
        _check_shapes(path, ours, shapes)


def _check_sizes(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse sizes that no model with such weights has, whatever its type; a size that is not given is not checked."""
    for name in (*_LAYERS, *_WIDTHS, "vocab_size"):
        value = config.get(name)
        most = max(128, len(shapes)) if name in _LAYERS else largest_size(shapes)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            refuse(path, f"{name} is {show(value)}; by the weights it must be a whole number from 1 to {most:,}")
    width = max((config[name] for name in _WIDTHS if config.get(name)), default=1)
    per_head = config.get("head_dim")
    # Quantised, 16 numbers can be one.
    most = max(_HARMLESS, 16 * count_numbers(shapes)) // width
    for name in (*_LAYERS, "vocab_size", *_OTHER_SIZES, *_HEADS):
        values = config.get(name)
        by = width if name in _LAYERS else per_head if name in _HEADS and type(per_head) is int else 1
        for value in values if isinstance(values, list) else [values]:
            if type(value) is int and value * by > most:
                refuse(
                    path,
                    f"{name} is {show(value)}, more than the weights, {count_numbers(shapes):,} numbers, can hold",
                )


def _check_shapes(path: Path, config: GPTKitConfig, shapes: Shapes) -> None:
    """Refuse weights of this package's model that are not those of its configuration, but for additional ones."""
    width, inner = config.n_embd, config.n_inner
    assert inner is not None  # the configuration fills it in
    matrices = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    matrices |= {"mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    block = {**matrices, "input_layernorm": (width,), "post_attention_layernorm": (width,)}
    modules = {f"layers.{layer}.{name}": shape for layer in range(config.n_layer) for name, shape in block.items()}
    modules["norm"] = (width,)
    expected = {f"{name}.weight": shape for name, shape in modules.items()}
    if config.use_bias:
        expected |= {f"{name}.bias": shape[:1] for name, shape in modules.items()}
    expected["embed_tokens.weight"] = (config.vocab_size, width)
    if config.position_embedding == "learned":
        expected["embed_positions.weight"] = (config.max_position_embeddings, width)
    prefix = "" if "embed_tokens.weight" in shapes else "model."  # without the head it is saved without the prefix
    expected = {f"{prefix}{name}": shape for name, shape in expected.items()}
    if not config.tie_word_embeddings or "lm_head.weight" in shapes:
        expected["lm_head.weight"] = (config.vocab_size, width)
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            stored = f"have shape {list(shapes[name])}" if name in shapes else "lack it"
            refuse(path, f"{name} must have shape {list(shape)}, the weights {stored}")
    own = tuple(f"{prefix}{part}" for part in ("layers.", "norm.", "embed_"))
    if unread := sorted(name for name in shapes.keys() - expected.keys() if name.startswith(own)):
        refuse(path, f"the model that it describes has no {show(unread[0])}, which the weights hold")


# --- adapters and checkpoints ----------------------------------------------------------------------------


def _check_adapter(folder: Path, files: Mapping[str, Path], *, alone: bool) -> Shapes:
    """Return the shapes of an adapter's weights; where it lies `alone`, the model that it names is its base."""
    path = files[_ADAPTER_CONFIG]
    settings = _load_json(path)
    if settings.get("peft_type") != "LORA":
        # Others can read files and fetch tokenizers that their settings name.
        refuse(path, f"peft_type is {show(settings.get('peft_type'))}; only adapters of type 'LORA' are loaded")
    for name in _ADAPTER_ROADS:
        if settings.get(name):
            refuse(path, f"{name} makes of an adapter more than added matrices, and is not loaded")
    if _ADAPTER_WEIGHTS not in files:
        refuse(folder / _ADAPTER_WEIGHTS, "it is missing; the weights of an adapter must be safetensors")
    shapes = read_header(files[_ADAPTER_WEIGHTS])
    most, pattern = largest_size(shapes), settings.get("rank_pattern") or {}
    for rank in [settings.get("r", 8), *(pattern.values() if isinstance(pattern, dict) else [pattern])]:
        if type(rank) is not int or not 1 <= rank <= most:
            refuse(path, f"the rank is {show(rank)}; by the weights it must be a whole number from 1 to {most:,}")
    base = settings.get("base_model_name_or_path")
    if alone and isinstance(base, str) and _is_folder(base):
        _check_folder(Path(base), has_base=True)
    return shapes


def _is_folder(place: str) -> bool:
    try:
        return Path(place).is_dir()
    except (OSError, ValueError):  # no path at all
        return False


def _check_state(folder: Path, files: Mapping[str, Path], shapes: Shapes) -> None:
    """Refuse a checkpoint whose state is too large for its weights, or that holds what no run writes."""
    for name in (_STATE, _MANIFEST):
        if name in files:
            _load_json(files[name])
    tensors = 0
    for path in _files_below(folder):
        if path.name.endswith(_PICKLES):
            refuse(path, "it is a pickle, which can run code; a checkpoint of a run holds none")
        if path.suffix != ".safetensors" or (path.parent == folder and path.name != _OPTIMIZER):
            continue
        _check_plain(path, (folder.resolve(), *_hub_stores(folder.resolve())))
        state = read_header(path)
        tensors += len(state)
        if tensors > _MOST_TENSORS:
            refuse(folder, f"its state has more than the {_MOST_TENSORS:,} tensors that it may have")
        # A few numbers for each weight, and one or two for each tensor.
        if path.name == _OPTIMIZER and count_numbers(state) > 16 * (count_numbers(shapes) + len(shapes)):
            refuse(path, f"it holds {count_numbers(state):,} numbers, too many for {count_numbers(shapes):,} weights")


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder and those in it, which no link leads out of."""
    seen = 0
    for parent, _, names in os.walk(folder):
        seen += len(names)
        if seen > _MOST_FILES:
            refuse(folder, f"it holds more than the {_MOST_FILES:,} files that a checkpoint may have")
        yield from (Path(parent, name) for name in sorted(names))
