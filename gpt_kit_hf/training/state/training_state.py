"""The training state of a checkpoint: weights, optimizer state, loss scale and the position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import load_json, load_tensors, save_json, save_tensors
from gpt_kit_hf.training.state.host_copies import HostCopies
from gpt_kit_hf.training.state.optimizer_state import flatten_optimizer_state, restore_optimizer_state
from gpt_kit_hf.training.state.sharded_state import is_dtensor, restore_sharded_optimizer, sharded_like
from gpt_kit_hf.training.trainer import AMPTrainer

SHARDS = "sharded"
_STATE_FILE = "training_state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
_WEIGHTS = "weights"  # prefix of a weight's name among the tensors to copy; an optimizer tensor has its own
_POSITION = ("step", "corpus", "data_position", "skipped_in_a_row", "recent_norms", "chain", "micro_batch")
SMALL_FILES_BYTES = 32 << 20  # an upper bound for tokenizer, configuration and code


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs to continue exactly from one moment.

    It holds no random state: order and dropout follow from the seed and the step. The tensors are copies if `own`,
    else the live ones, which the next step changes.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    values: dict[str, Any]
    own: bool

    @property
    def required_bytes(self) -> int:
        """Upper bound of its size on disk."""
        distinct = {tensor.untyped_storage().data_ptr(): tensor for tensor in self.weights.values()}
        tensors = [*distinct.values(), *self.optimizer.values()]
        return sum(tensor.nbytes for tensor in tensors) + SMALL_FILES_BYTES

    def write(self, folder: Path) -> None:
        """Write optimizer and position; the caller writes the weights."""
        save_tensors(folder / _OPTIMIZER_FILE, self.optimizer)
        save_json(folder / _STATE_FILE, self.values)


def training_state(
    model: nn.Module, trainer: AMPTrainer, position: Mapping[str, Any], copies: HostCopies | None
) -> TrainingState:
    """Return the current state; `position` is that of `Steps.position`.

    With `copies`, the tensors are copied to host memory, if there is enough of it.
    """
    weights: dict[str, Tensor] = model.state_dict()
    optimizer, groups = flatten_optimizer_state(trainer.optimizer.optimizer, _names(model))
    values = {**position_and_scale(trainer, position), "optimizer": groups}
    # Frozen parameters, as those of an adapter's base model, do not change.
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trained = {f"{_WEIGHTS}.{name}": tensor for name, tensor in weights.items() if name not in frozen}
    copied = None if copies is None else copies.copied(trained | optimizer)
    if copied is not None:
        weights |= {label.removeprefix(f"{_WEIGHTS}."): copied[label] for label in trained}
        optimizer = {label: copied[label] for label in optimizer}
    return TrainingState(weights=weights, optimizer=optimizer, values=values, own=copied is not None)


def position_and_scale(trainer: AMPTrainer, position: Mapping[str, Any]) -> dict[str, Any]:
    """Return the position with the state of the loss scale, as JSON."""
    assert position.keys() == set(_POSITION), position
    return {**position, "scaler": trainer.scaler.state_dict()}


def write_position(folder: Path, values: Mapping[str, Any]) -> None:
    """Write what `position_and_scale` returned, of a sharded model whose optimizer state is in shards."""
    save_json(folder / _STATE_FILE, values)


def restore_training_state(folder: Path, model: nn.Module, trainer: AMPTrainer) -> dict[str, Any]:
    """Load optimizer state and loss scale and return the position.

    The optimizer keeps the options that it was built with, weight decay for example, as the user may have changed
    them. Raises CheckpointError if something is missing or has another shape.
    """
    state = _read(folder)
    optimizer = trainer.optimizer.optimizer
    built = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if (folder / SHARDS).is_dir():
        restore_sharded_optimizer(folder / SHARDS, model, optimizer)
    else:
        tensors = _sharded_alike(load_tensors(folder / _OPTIMIZER_FILE), model)
        restore_optimizer_state(optimizer, tensors, state["optimizer"], _names(model))
    for group, options in zip(optimizer.param_groups, built, strict=True):
        group.update(options)
    trainer.scaler.load_state_dict(state["scaler"])
    return {name: state[name] for name in _POSITION}


def read_position(folder: Path) -> dict[str, Any]:
    """Return the position of a checkpoint: its step, the place in the data and the updates skipped last."""
    state = _read(folder)
    return {name: state[name] for name in _POSITION}


def _read(folder: Path) -> dict[str, Any]:
    state = load_json(folder / _STATE_FILE)
    missing = {*_POSITION, "scaler"} - state.keys()
    if missing:
        raise CheckpointError(f"{folder / _STATE_FILE} lacks {', '.join(sorted(missing))}")
    step, skipped = state["step"], state["skipped_in_a_row"]
    if type(step) is not int or type(skipped) is not int or not 0 <= skipped <= step:
        raise CheckpointError(f"{folder / _STATE_FILE}: step {step!r} with {skipped!r} skipped is not a position")
    return state


def _sharded_alike(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return optimizer tensors, each sharded over the processes as its parameter is."""
    sharded: dict[str, Any] = {name: p for name, p in model.named_parameters() if is_dtensor(p)}
    if not sharded:
        return tensors
    from torch.distributed.tensor import distribute_tensor

    found = dict(tensors)
    for label, tensor in tensors.items():
        p = sharded.get(label.partition(".")[2])
        if p is not None and sharded_like(p, tensor.shape) is not None:
            found[label] = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return found


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
