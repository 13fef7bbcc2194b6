"""Reading weight files of other programs: safetensors, or pickles of tensors. Reading runs no code from a file."""

from __future__ import annotations

import pickle
import re
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder: safetensors, else pickles; one file or shards. Raises UsageError."""
    found = next((folder / name for name in (*SAFETENSORS, *PICKLES) if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"{str(folder)!r} holds no weights: neither {SAFETENSORS[0]} nor {PICKLES[0]}")
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


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the state dict in a file, and the dictionary around it, if a training script stored one."""
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth") or not path.is_file():
        raise UsageError(f"{str(path)!r} is no file of weights (.safetensors, .bin, .pt or .pth)")
    stored = load_tensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    checkpoint: Mapping[str, Any] = {}
    if isinstance(stored, Mapping):
        keys = [key for key in ("model", "model_state_dict", "state_dict") if isinstance(stored.get(key), Mapping)]
        if keys:
            stored, checkpoint = stored[keys[0]], stored
    if not isinstance(stored, Mapping):
        raise UsageError(f"{path} holds a {type(stored).__name__}; it must hold a state dict")
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(f"{path}: {name!r} is a {type(value).__name__}; a state dict holds tensors by name")
    # Prefixes that data parallelism and torch.compile add.
    prefix = "module." if all(name.startswith("module.") for name in stored) else ""
    tensors = {name.removeprefix(prefix).replace("_orig_mod.", ""): tensor for name, tensor in stored.items()}
    if len(tensors) != len(stored):
        raise UsageError(f"{path} holds a tensor twice, with and without '_orig_mod.' in its name")
    return tensors, checkpoint


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))  # for the message only
        raise UsageError(
            f"{path} is refused: it holds Python objects beside tensors ({culprit[1] if culprit else 'unreadable'}), "
            "and reading those can run code; store the state dict alone, best as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise UsageError(f"{path} is no readable torch file: {type(error).__name__} {one_line(error)}") from None
