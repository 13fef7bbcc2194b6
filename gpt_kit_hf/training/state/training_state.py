"""What a checkpoint holds: the model's weights, optimizer, loss scale and the position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import load_json, load_tensors, save_json, save_tensors
from gpt_kit_hf.training.state.optimizer_state import flatten_optimizer_state, restore_optimizer_state
from gpt_kit_hf.training.state.sharded_state import restore_sharded_state
from gpt_kit_hf.training.trainer import AMPTrainer

SHARDS = "sharded"
_STATE_FILE = "training_state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
_POSITION = ("step", "corpus", "data_position", "skipped_in_a_row", "recent_norms", "chain")
_SMALL_FILES = 32 << 20  # tokenizer, configuration, code: generously
_ROOM_LEFT = 2.5  # times the copy: writing it takes memory, too


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a run needs to continue to the bit, at one moment.

    There is no random state in it: order and dropout follow from the seed and the step. `own` says whether the
    tensors are copies, or the live ones, which the next step changes.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    values: dict[str, Any]
    own: bool

    @property
    def required_bytes(self) -> int:
        """How much room on the disk it takes."""
        distinct = {tensor.untyped_storage().data_ptr(): tensor for tensor in self.weights.values()}
        tensors = [*distinct.values(), *self.optimizer.values()]
        return sum(tensor.nbytes for tensor in tensors) + _SMALL_FILES

    def write(self, folder: Path) -> None:
        """Write everything but the model."""
        save_tensors(folder / _OPTIMIZER_FILE, self.optimizer)
        save_json(folder / _STATE_FILE, self.values)


def training_state(
    model: nn.Module, trainer: AMPTrainer, position: Mapping[str, Any], *, copied: bool
) -> TrainingState:
    """Return the state of now; `position` says where the run is.

    Copies are made only where there is memory for them and for writing them.
    """
    assert position.keys() == set(_POSITION), position
    weights: dict[str, Tensor] = model.state_dict()
    optimizer, groups = flatten_optimizer_state(trainer.optimizer.optimizer, _names(model))
    values = {**position, "optimizer": groups, "scaler": trainer.scaler.state_dict()}
    own = copied and _fits(weights, optimizer)
    if own:
        # What is not trained, as a base model under an adapter, does not change.
        still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        weights = _copies(weights, still)
        optimizer = {name: tensor.clone() for name, tensor in optimizer.items()}
    return TrainingState(weights=weights, optimizer=optimizer, values=values, own=own)


def write_position(folder: Path, trainer: AMPTrainer, position: Mapping[str, Any]) -> None:
    """Write where the run is, beside the shards of a model that is cut, which hold the rest."""
    save_json(folder / _STATE_FILE, {**position, "scaler": trainer.scaler.state_dict()})


def restore_training_state(folder: Path, model: nn.Module, trainer: AMPTrainer) -> dict[str, Any]:
    """Put optimizer and loss scale back as they were written and return the position.

    The options of the optimizer, weight decay for example, stay as it was built: those of the run, unless the user
    changed them. Raises CheckpointError if anything is missing or of another shape.
    """
    state = _read(folder)
    optimizer = trainer.optimizer.optimizer
    built = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if (folder / SHARDS).is_dir():
        restore_sharded_state(folder / SHARDS, model, optimizer)
    else:
        tensors = _cut_alike(load_tensors(folder / _OPTIMIZER_FILE), model)
        restore_optimizer_state(optimizer, tensors, state["optimizer"], _names(model))
    for group, options in zip(optimizer.param_groups, built, strict=True):
        group.update(options)
    trainer.scaler.load_state_dict(state["scaler"])
    return {name: state[name] for name in _POSITION}


def read_position(folder: Path) -> dict[str, Any]:
    """Return where a checkpoint was written: its step, its corpus and the updates skipped last."""
    state = _read(folder)
    return {name: state[name] for name in _POSITION}


def _read(folder: Path) -> dict[str, Any]:
    state = load_json(folder / _STATE_FILE)
    missing = {*_POSITION, "scaler"} - state.keys()
    if missing:
        raise CheckpointError(f"{folder / _STATE_FILE} lacks {', '.join(sorted(missing))}")
    step, skipped = state["step"], state["skipped_in_a_row"]
    if type(step) is not int or type(skipped) is not int or not 0 <= skipped <= step:
        raise CheckpointError(f"{folder / _STATE_FILE}: step {step!r} with {skipped!r} skipped is no position")
    return state


def _cut_alike(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return an optimizer's tensors, cut over the processes as the parameters are that they belong to."""
    cut = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    found: dict[str, Tensor] = {}
    for label, tensor in tensors.items():
        p = cut.get(label.partition(".")[2])
        whole = p is None or tensor.shape != p.shape
        found[label] = (
            tensor
            if p is None or whole
            else distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        )
    return found


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _fits(weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> bool:
    wanted = sum(tensor.nbytes for tensor in (*weights.values(), *optimizer.values()))
    return bool(psutil.virtual_memory().available > _ROOM_LEFT * wanted)


def _copies(tensors: Mapping[str, Tensor], but: set[str]) -> dict[str, Tensor]:
    """Return copies in which tied tensors are tied, as what writes them looks for those."""
    made: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if name not in but and place not in made:
            made[place] = tensor.detach().clone()
        copies[name] = tensor if name in but else made[place]
    return copies
