"""Reading weight files of other programs: safetensors, or pickles of tensors. Reading runs no code from a file.

What training tools wrap around a model is undone: prefixes of names, and LoRA layers, which are merged.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from gpt_kit_hf.errors import UsageError, one_line
from gpt_kit_hf.storage.atomic_files import load_json, load_tensors

_INDEX = ".index.json"
SAFETENSORS = ("model.safetensors", "model.safetensors" + _INDEX)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin" + _INDEX)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Parts of names that torch.compile, FSDP and activation checkpointing insert anywhere.
_MARKS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
# PEFT's adapters ("lora_A.default.weight"), those of loralib ("lora_A"), and hand-written ones ("lora.A").
_LORA = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<matrix>[AB])(?:\.(?P<adapter>\w+))??(?:\.weight)?|lora\.(?P<plain>[AB]))"
)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder: safetensors, else pickles; one file or shards. Raises UsageError."""
    found = next((folder / name for name in (*SAFETENSORS, *PICKLES) if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(
            f"{str(folder)!r} holds no weights: neither {SAFETENSORS[0]} nor {PICKLES[0]}{tensorflow_hint(folder)}"
        )
    tensors: dict[str, Tensor] = {}
    for file in _shards(found) if found.name.endswith(_INDEX) else [found]:
        shard, _ = read_state_dict(file)
        if duplicates := shard.keys() & tensors.keys():
            raise UsageError(f"{file} holds {min(duplicates)}, which another shard holds, too")
        tensors |= shard
    return tensors


def _shards(index: Path) -> list[Path]:
    """Return the files that an index lists; UsageError if one of them is not in the same folder."""
    names = load_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UsageError(f"{index} holds no weight_map of file names")
    files = sorted(set(names.values()))
    for name in files:
        # The name is checked, not the resolved path: files in the Hub's cache are links to another folder.
        if PurePosixPath(name).name != name or name == ".." or "\\" in name:
            raise UsageError(f"{index} points to {name!r}; a shard must lie beside its index")
    return [index.parent / name for name in files]


def is_weight_file(path: Path) -> bool:
    """Return whether a path has the suffix of a file of weights, and no folder is there."""
    return path.suffix in _SUFFIXES and not path.is_dir()


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the state dict in a file, and the dictionary around it, if a training script stored one."""
    if not is_weight_file(path) or not path.is_file():
        hint = tensorflow_hint(path)
        if is_weight_file(path) and not path.exists():
            raise UsageError(f"{str(path)!r} does not exist{hint}")
        raise UsageError(f"{str(path)!r} is no file of weights ({', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}){hint}")
    stored = load_tensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    checkpoint: Mapping[str, Any] = {}
    if isinstance(stored, Mapping):
        keys = [key for key in ("model", "model_state_dict", "state_dict") if isinstance(stored.get(key), Mapping)]
        if len(keys) > 1:
            raise UsageError(f"{path} holds weights under {' and '.join(map(repr, keys))}; store one of them alone")
        if keys:
            stored, checkpoint = stored[keys[0]], stored
    if not isinstance(stored, Mapping):
        raise UsageError(f"{path} holds a {type(stored).__name__}; it must hold a state dict")
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(f"{path}: {name!r} is a {type(value).__name__}; a state dict holds tensors by name")
    tensors = {_MARKS.sub("", name): tensor for name, tensor in stored.items()}
    if len(tensors) != len(stored):
        raise UsageError(f"{path} holds a tensor twice, with and without '_orig_mod.' in its name")
    return tensors, checkpoint


def tensorflow_hint(path: Path) -> str:
    """Return what to do instead if a path names, or is a folder with, TensorFlow's weights; else an empty string."""
    names = [path.name, *(each.name for each in (path if path.is_dir() else path.parent).glob("*"))]
    asked = names[1:] if path.is_dir() else [n for n in names if n.startswith(path.name)]
    if not any(re.search(r"\.data-\d+-of-\d+$|\.ckpt(-\d+)?\.(index|meta)$|^tf_model\.h5$", name) for name in asked):
        return ""
    return (
        "; TensorFlow's files are not read: take the same weights from the Hub, such as `gpt-kit convert "
        "openai-community/gpt2 FOLDER --layout gpt2` (gpt2-medium, gpt2-large, gpt2-xl)"
    )


def strip_prefix(tensors: Mapping[str, Tensor], known: str, source: str) -> dict[str, Tensor]:
    """Return the tensors without the prefix that a wrapper put before all names ("module.", "model.", ...).

    The name that ends with `known`, such as "transformer.wpe.weight", tells the prefix; if there is only a name with
    its last part ("wpe.weight"), the part before that is added to the names that lack it. Raises UsageError for a file
    with several models.
    """
    short = ".".join(known.split(".")[-2:])
    found = [name for name in tensors if f".{name}".endswith(f".{short}")]
    if len(found) > 1:
        raise UsageError(f"{source} holds several models: {', '.join(sorted(found)[:3])}; store one of them alone")
    if not found:
        return dict(tensors)
    whole = f".{found[0]}".endswith(f".{known}")
    prefix, missing = found[0].removesuffix(known if whole else short), known.removesuffix(short)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        is_head = inner.partition(".")[0] in ("lm_head", "score", "classifier", "qa_outputs")
        renamed[inner if whole or is_head else missing + inner] = tensor
    if len(renamed) != len(tensors):
        raise UsageError(f"{source} holds a tensor twice, with and without {prefix!r} before its name")
    return renamed


def merge_lora(
    tensors: Mapping[str, Tensor], scaling: float | None, source: str, *, transposed: bool
) -> dict[str, Tensor]:
    """Return the weights with LoRA updates added: W + scaling * B A (Hu et al. 2021, eq. 3).

    With `transposed`, weights are stored as (in, out). Raises UsageError if the scaling is not given, as files of
    weights do not hold it, and for adapters without a base or with a missing matrix.
    """
    merged = dict(tensors)
    pairs: dict[tuple[str, str | None], dict[str, str]] = {}
    for name in tensors:
        if found := _LORA.fullmatch(name):
            pairs.setdefault((found["module"], found["adapter"]), {})[found["matrix"] or found["plain"]] = name
    modules = [module for module, _ in pairs]
    if scaling is not None and not pairs:
        raise UsageError(f"lora_scaling is given, and {source} holds no LoRA matrices")
    for (module, _), names in pairs.items():
        weight = next(
            (w for w in (f"{module}{part}.weight" for part in (".base_layer", ".linear", "")) if w in merged), ""
        )
        if names.keys() != {"A", "B"} or not weight or modules.count(module) > 1:
            lacks = "several adapters for it" if modules.count(module) > 1 else "not its weight and one pair A and B"
            raise UsageError(f"{source}: {module} has LoRA matrices, but {lacks}; merge the adapter before saving")
        first, second = (merged.pop(names[matrix]).float() for matrix in "AB")
        if f"{module}.lora.A" in names.values():  # x @ A @ B, with A (in, r)
            first, second = first.T, second.T
        if scaling is None:
            raise UsageError(
                f"{source} holds LoRA matrices of rank {first.shape[0]}, but not the factor of their product: give "
                "lora_scaling (PEFT: lora_alpha / r; a hand-written layer: often its alpha)"
            )
        base = merged.pop(weight)
        update = (second @ first).T if transposed else second @ first
        if update.shape != base.shape:
            raise UsageError(
                f"{source}: {module} has shape {tuple(base.shape)}, its LoRA update {tuple(update.shape)}"
            )
        merged[f"{module}.weight"] = (base.float() + scaling * update).to(base.dtype)
        for part in (".base_layer", ".linear"):
            if f"{module}{part}.bias" in merged:
                merged[f"{module}.bias"] = merged.pop(f"{module}{part}.bias")
    return merged


class _NumpyType:
    """Stands in for numpy.dtype in a pickle: the kind and size of a number."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1].replace("|", "=")


def _number(kind: _NumpyType, data: bytes) -> float | int | bool:
    """Stand in for numpy's function that makes a scalar: training scripts store their best loss as one."""
    letter = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u8": "Q", "u4": "I", "b1": "?"}[kind.code]
    value: float | int | bool = struct.unpack(f"{kind.order}{letter}", data)[0]
    return value


_NUMBERS: list[Any] = [
    (_NumpyType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def _read_pickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))  # for the message only
        raise UsageError(
            f"{path} is refused: it holds Python objects beside tensors ({culprit[1] if culprit else 'unreadable'}), "
            "and reading those can run code; store the state dict alone, best as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise UsageError(f"{path} is no readable torch file: {type(error).__name__} {one_line(error)}") from None
