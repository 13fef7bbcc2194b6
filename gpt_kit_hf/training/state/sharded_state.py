"""The optimizer of a model sharded over processes (FSDP2): each process writes and reads its own shards.

The weights are not among them: a checkpoint is a model folder, which holds them whole, as `full_state` gathers them.
A folder of shards holds the safetensors files of all processes and one JSON file; reading it runs no code. It can be
read by any number of processes, sharded in any way. `torch.distributed` modules that take long to import are imported
in the functions that need them, as a single process without a process group needs none.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import load_json, save_json, sync_path
from gpt_kit_hf.storage.digests import FileDigest, digest_of
from gpt_kit_hf.training.state.optimizer_state import flatten_optimizer_state, restore_optimizer_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_OPTIMIZER_FILE = "optimizer.json"
_WEIGHTS = "weights"  # in files of earlier versions: the kind of a weight; of an optimizer tensor it is exp_avg, say

T = TypeVar("T")


def is_dtensor(tensor: object) -> bool:
    """Return whether a tensor is sharded by torch.distributed; without a process group there is no such tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds, or the tensor itself."""
    part: Tensor = cast("Any", tensor).to_local() if is_dtensor(tensor) else tensor
    return part


def one_a_row(matrix: Tensor) -> Tensor:
    """Return the first column, (rows, 1), of a matrix that may be sharded by rows; it is sharded alike."""
    return matrix.detach()[:, :1]


def sharded_like(parameter: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Return a tensor of that shape with a parameter's sharding: the parameter, or a column of it; None for others."""
    if tuple(shape) == tuple(parameter.shape):
        return parameter.detach()
    if parameter.dim() == 2 and tuple(shape) == (parameter.shape[0], 1):
        return one_a_row(parameter)
    return None


@dataclass(frozen=True, kw_only=True)
class ShardedOptimizer:
    """The state of an optimizer: tensors, of which this process holds its shards, and the rest as JSON."""

    tensors: dict[str, Tensor]
    rest: dict[str, Any]


def sharded_optimizer(model: nn.Module, optimizer: Optimizer) -> ShardedOptimizer:
    """Return the live state of a sharded model's optimizer; all processes call it together, between two steps.

    Raises CheckpointError in all processes if state is sharded otherwise than its parameter.
    """
    names = _names(model)
    tensors, rest = flatten_optimizer_state(optimizer, names)
    with _failing_together("the optimizer was not saved"):
        _check_sharding({name: tensor for tensor, name in names.items()}, tensors)
    return ShardedOptimizer(tensors=tensors, rest=rest)


def write_sharded_optimizer(
    folder: Path, state: ShardedOptimizer, group: ProcessGroup | None = None
) -> dict[str, FileDigest]:
    """Write the shards that this process holds; all processes of the group call it together, also from threads.

    `folder` must be the same for all, on a shared file system, and empty or missing. Each process flushes and hashes
    its own files; returned are the digests of all, {name: digest}. Raises CheckpointError in all processes if one of
    them cannot write, or if their folders differ.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # The writer holds a whole file in memory, so each kind of tensor gets a file of its own.
    kinds = sorted({_kind(label) for label in state.tensors})
    files = {label: 1 + kinds.index(_kind(label)) for label in state.tensors}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _failing_together(f"{folder} was not written", group):
        save(dict(state.tensors), storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    with _failing_together(f"{folder} was not written", group):
        if _rank() == 0:
            try:
                _check_shards(_read_shards(folder), state.tensors)
            except CheckpointError as error:
                raise CheckpointError(f"shards of other processes are missing here: {error}") from error
            # Apart from the tensors: torch's writer would store by pickle what is no tensor.
            save_json(folder / _OPTIMIZER_FILE, state.rest)
    own: dict[str, FileDigest] = {}
    with _failing_together(f"{folder} was not written", group):
        # torch names a file by the process that wrote it, counted from one.
        for path in sorted(folder.glob(f"shard-{_rank() + 1:05d}-*")):
            sync_path(path)
            own[path.name] = digest_of(path)
    return {name: digest for digests in _gathered(own, group) for name, digest in digests.items()}


def restore_sharded_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load the optimizer state, exactly as written; all processes call it, each reads the shards it needs.

    The model, which has its weights already, may be sharded over any number of processes, or whole in one without a
    process group. Options of the optimizer are restored as by `restore_optimizer_state`. Raises CheckpointError in
    all processes if names, shapes or dtypes do not fit the model, or a shard is missing or unreadable.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    names = _names(model)
    with _failing_together(f"{folder} was not read"):
        rest = load_json(folder / _OPTIMIZER_FILE)
        # Earlier versions wrote the weights to the shards, too.
        shards = {label: each for label, each in _read_shards(folder).items() if _kind(label) != _WEIGHTS}
        tensors = _empty_moments(shards, {name: tensor.detach() for tensor, name in names.items()})
        _check_shards(shards, tensors)
    with _failing_together(f"{folder} was not read"):
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    restore_optimizer_state(optimizer, tensors, rest, names)


def full_state(model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the whole model on the first process's CPU, {} in the others; all call it together.

    With `trained_only`, frozen parameters are not gathered. The tensors are copies. Save them with `unsharded_model`.
    A tied weight is one tensor under all of its names.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    whole = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
    # What is on a CPU, and not sharded, comes back as it is.
    live = {local_part(tensor).untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    whole = {name: t.clone() if t.untyped_storage().data_ptr() in live else t for name, t in whole.items()}
    first = _names(model)
    same = {name: first[tensor] for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: whole[same[name]] for name in whole}


def replace_weights(model: nn.Module, read: Callable[[], dict[str, Tensor]]) -> None:
    """Give a model, sharded or whole, the weights that `read` returns for the whole model; all processes call.

    The first process reads for all, if the model is sharded.
    """
    if not any(is_dtensor(parameter) for parameter in model.parameters()):
        model.load_state_dict(read())
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole: dict[str, Any] = dict(read()) if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)


def unsharded_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model itself, or if FSDP2 has sharded it, the same model unsharded and without weights (meta device).

    Its `save_pretrained(state_dict=full_state(model))` writes what the whole model would. The sharded model's own
    would write torch's source files as the model's code, as FSDP2 changes its class to one in a module of torch; that
    of an adapter of PEFT writes no code, and is returned as it is.
    """
    original = _unsharded_class(model)
    if original is type(model) or not isinstance(model, PreTrainedModel):
        return model
    with torch.device("meta"):
        unsharded: PreTrainedModel = original(model.config)
    unsharded.generation_config = model.generation_config
    return unsharded


def _unsharded_class(model: nn.Module) -> Any:
    if not dist.is_initialized():
        return type(model)
    from torch.distributed.fsdp import FSDPModule

    # FSDP2's class, and FSDPModule itself, precede the original class.
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the parameters of a sharded model that belong to none of its parts; all processes enter it together.

    FSDP2 gathers them when the whole model is called. This is for calls of a module inside of it.
    """
    if _unsharded_class(model) is type(model):
        yield
        return
    sharded = cast("Any", model)
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


def reshard(model: nn.Module) -> None:
    """Free the weights that a sharded model has gathered: the next forward pass gathers them again."""
    for module in model.modules():
        if _unsharded_class(module) is not type(module):
            cast("Any", module).reshard()


def _names(model: nn.Module) -> dict[Any, str]:
    """Return {parameter or persistent buffer: its name}; a tied one has its first name.

    From the state dict, not `named_parameters`: it reshards a model that FSDP2 has gathered for an evaluation, and its
    names are without the prefix of activation checkpointing.
    """
    names: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return names


def _kind(label: str) -> str:
    return label.partition(".")[0]


def _empty_moments(shards: Mapping[str, TensorStorageMetadata], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return uninitialised tensors for the optimizer's state, sharded as their parameters are."""
    moments: dict[str, Tensor] = {}
    for label, stored in shards.items():
        name = label.partition(".")[2]
        if name not in weights:
            raise CheckpointError(f"{label} belongs to no parameter of the model")
        alike, dtype = sharded_like(weights[name], stored.size), stored.properties.dtype
        if alike is not None:
            moments[label] = torch.empty_like(alike, dtype=dtype)
        else:
            moments[label] = torch.empty(stored.size, dtype=dtype)
    return moments


def _check_sharding(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    """Refuse state that could not be sharded again over another number of processes."""
    for label, moment in moments.items():
        parameter = weights[label.partition(".")[2]]
        if is_dtensor(parameter) and not is_dtensor(moment) and moment.dim() > 0:
            raise CheckpointError(f"optimizer state {label} is not sharded as its parameter is and cannot be stored")


def _read_shards(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return the metadata of all tensors in a folder's files, from the headers."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    shards: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return shards


def _check_shards(shards: Mapping[str, TensorStorageMetadata], tensors: Mapping[str, Tensor]) -> None:
    """Refuse files that hold anything but every element of all these tensors."""
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


@contextmanager
def _failing_together(what: str, group: ProcessGroup | None = None) -> Iterator[None]:
    """Raise CheckpointError in all processes if one fails; otherwise the others would wait for it forever."""
    from torch.distributed.checkpoint.api import CheckpointException

    failure, cause = None, None
    try:
        with nullcontext() if dist.is_initialized() else warnings.catch_warnings():
            if not dist.is_initialized():
                # torch warns about a process without a process group even with no_dist=True.
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        failure = f"process {rank}: {type(cause).__name__}: {cause}"
    except Exception as error:
        cause = error
        failure = f"process {_rank()}: {error if isinstance(error, CheckpointError) else repr(error)}"
    for first in filter(None, _gathered(failure, group)):
        raise CheckpointError(f"{what}: {first}") from cause


def _gathered(own: T, group: ProcessGroup | None) -> list[T]:
    """Return what each process has."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
