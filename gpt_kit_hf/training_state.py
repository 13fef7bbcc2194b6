"""What a checkpoint holds beside the model: optimizer, loss scale and the position in the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gpt_kit_hf.amp import AMPTrainer
from gpt_kit_hf.durable_files import load_json, load_tensors, save_json, save_tensors
from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.optimizer_state import flatten_optimizer_state, restore_optimizer_state

_STATE_FILE = "training_state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
_POSITION = ("step", "corpus", "data_position", "skipped_in_a_row")


def write_training_state(folder: Path, model: nn.Module, trainer: AMPTrainer, position: dict[str, Any]) -> None:
    """Write all that a run needs to continue to the bit; `position` says where it is.

    There is no random state in it: order and dropout follow from the seed and the step.
    """
    assert position.keys() == set(_POSITION), position
    tensors, optimizer = flatten_optimizer_state(trainer.optimizer.optimizer, _names(model))
    save_tensors(folder / _OPTIMIZER_FILE, tensors)
    scaler = trainer.scaler.state_dict()
    save_json(folder / _STATE_FILE, {**position, "optimizer": optimizer, "scaler": scaler})


def restore_training_state(folder: Path, model: nn.Module, trainer: AMPTrainer) -> dict[str, Any]:
    """Put optimizer and loss scale back as they were written and return the position.

    Raises CheckpointError if anything is missing or of another shape.
    """
    state = _read(folder)
    tensors = load_tensors(folder / _OPTIMIZER_FILE)
    restore_optimizer_state(trainer.optimizer.optimizer, tensors, state["optimizer"], _names(model))
    trainer.scaler.load_state_dict(state["scaler"])
    return {name: state[name] for name in _POSITION}


def read_position(folder: Path) -> dict[str, Any]:
    """Return where a checkpoint was written: its step, its corpus and the updates skipped last."""
    state = _read(folder)
    return {name: state[name] for name in _POSITION}


def _read(folder: Path) -> dict[str, Any]:
    state = load_json(folder / _STATE_FILE)
    missing = {*_POSITION, "optimizer", "scaler"} - state.keys()
    if missing:
        raise CheckpointError(f"{folder / _STATE_FILE} lacks {', '.join(sorted(missing))}")
    return state


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
