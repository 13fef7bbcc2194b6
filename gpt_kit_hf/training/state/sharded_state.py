"""Weights and optimizer of a model that is cut over processes, each of which writes and reads its own shards.

A folder holds safetensors files, some for each process, and one JSON file; reading it runs no code. How many processes
wrote it, and how the model was cut over them, does not matter to those who read it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import load_json, save_json
from gpt_kit_hf.training.state.optimizer_state import flatten_optimizer_state, restore_optimizer_state

_OPTIMIZER_FILE = "optimizer.json"
_WEIGHTS = "weights"  # beside the optimizer's own names for its state, as exp_avg


def write_sharded_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write what this process holds of a model and its optimizer; every process calls, between two steps.

    The folder is one that all of them see and that holds nothing else; it is made if there is none. Raises
    CheckpointError in all processes if one of them cannot write, if the folder is not the same for all, or for an
    optimizer whose state is cut otherwise than its parameters.
    """
    names = _names(model)
    moments, groups = flatten_optimizer_state(optimizer, names)
    weights = {name: tensor.detach() for tensor, name in names.items()}
    tensors = _labelled(weights, moments)
    # The writer has a whole file in memory, so there is one for each kind of tensor.
    kinds = sorted({_kind(label) for label in tensors})
    files = {label: 1 + kinds.index(_kind(label)) for label in tensors}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _failing_together(f"{folder} was not written"):
        _check_cut(weights, moments)
    with _failing_together(f"{folder} was not written"), _alone_or_not():
        state_dict_saver.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    with _failing_together(f"{folder} was not written"):
        if _rank() == 0:
            try:
                _check_shards(_read_shards(folder), tensors)
            except CheckpointError as error:
                raise CheckpointError(f"what the others wrote is not here: {error}") from error
            # Apart from the tensors: what is no tensor would be stored by pickle there.
            save_json(folder / _OPTIMIZER_FILE, groups)


def restore_sharded_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put weights and optimizer back as they were, to the bit; every process calls, and reads what it needs.

    The model may be cut over any number of processes, or whole in one that has no process group. What of the
    optimizer's options comes back is what `restore_optimizer_state` says. Raises CheckpointError, in all processes, if
    names, shapes or types are not those of the model, or if a shard is missing or cannot be read; the model is not to
    be used then.
    """
    names = _names(model)
    weights = {name: tensor.detach() for tensor, name in names.items()}
    with _failing_together(f"{folder} was not read"):
        groups = load_json(folder / _OPTIMIZER_FILE)
        shards = _read_shards(folder)
        moments = _empty_moments(shards, weights)
        tensors = _labelled(weights, moments)
        _check_shards(shards, tensors)
    with _failing_together(f"{folder} was not read"), _alone_or_not():
        reader = HuggingFaceStorageReader(str(folder))
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    restore_optimizer_state(optimizer, moments, groups, names)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole model's state on the CPU of the first process, an empty dict in the others; every one calls.

    `uncut_model` saves it. A tied weight is one tensor under all of its names.
    """
    whole = cast(
        "dict[str, Tensor]",
        get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)),
    )
    first = _names(model)
    same = {name: first[tensor] for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: whole[same[name]] for name in whole}


def uncut_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model as it was before FSDP2 cut it, without its weights: on the meta device.

    Its `save_pretrained(state_dict=full_state(model))` writes what that of the whole model would. The cut model's own
    writes torch's source files as the model's code: FSDP2 gives it a class of its own, in a module of torch.
    """
    # That class, and FSDPModule itself, come before the one that it was.
    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        twin: PreTrainedModel = kind(model.config)
    twin.generation_config = model.generation_config
    return twin


# --- the names of tensors


def _names(model: nn.Module) -> dict[Any, str]:
    """Return {weight or stored buffer: its name}, a tied one under its first.

    Not `named_parameters`: asked for its state, a model that FSDP2 has gathered to evaluate goes back to its shards,
    and wrappers that recompute activations leave their mark out of the names.
    """
    names: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return names


def _labelled(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"{_WEIGHTS}.{name}": tensor for name, tensor in weights.items()} | dict(moments)
    assert len(tensors) == len(weights) + len(moments)
    return tensors


def _kind(label: str) -> str:
    return label.partition(".")[0]


def _empty_moments(shards: Mapping[str, TensorStorageMetadata], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return room for the optimizer's tensors, cut as their parameters are."""
    moments: dict[str, Tensor] = {}
    for label, stored in shards.items():
        kind, _, name = label.partition(".")
        if kind == _WEIGHTS:
            continue
        if name not in weights:
            raise CheckpointError(f"{label} belongs to no parameter of the model")
        parameter, dtype = weights[name], stored.properties.dtype
        if stored.size == parameter.shape:
            moments[label] = torch.empty_like(parameter, dtype=dtype)
        else:
            moments[label] = torch.empty(stored.size, dtype=dtype)
    return moments


# --- what must hold


def _check_cut(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    """Refuse state that another number of processes could not cut again."""
    for label, moment in moments.items():
        parameter = weights[label.partition(".")[2]]
        if isinstance(parameter, DTensor) and not isinstance(moment, DTensor) and moment.dim() > 0:
            raise CheckpointError(f"optimizer state {label} is not cut as its parameter is, and not stored here")


def _read_shards(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return which parts of which tensors the files of a folder hold, from their headers."""
    shards: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return shards


def _check_shards(shards: Mapping[str, TensorStorageMetadata], tensors: Mapping[str, Tensor]) -> None:
    """Refuse files that do not hold every element of all the tensors, and nothing else."""
    if odd := sorted(shards.keys() ^ tensors.keys()):
        where = "the files" if odd[0] in shards else "the model and its optimizer"
        raise CheckpointError(f"{odd[0]} is only in {where} ({len(odd)} differ)")
    for label, tensor in tensors.items():
        stored = shards[label]
        held = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if held != tensor.numel():
            raise CheckpointError(f"of {label} the files hold {held:,} elements instead of {tensor.numel():,}")
        if stored.size != tensor.shape or stored.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{label} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"in the files {stored.properties.dtype} of shape {list(stored.size)}"
            )


# --- processes


@contextmanager
def _failing_together(what: str) -> Iterator[None]:
    """Raise CheckpointError in all processes if anything fails in one: the others would wait for it without end."""
    failure, cause = None, None
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        failure = f"process {rank}: {type(cause).__name__}: {cause}"
    except Exception as error:
        cause = error
        failure = f"process {_rank()}: {error if isinstance(error, CheckpointError) else repr(error)}"
    failures = [failure]
    if dist.is_initialized():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    for first in filter(None, failures):
        raise CheckpointError(f"{what}: {first}") from cause


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def _alone_or_not() -> Iterator[None]:
    """Take a process without a group for what it is: torch warns of it, even where told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
