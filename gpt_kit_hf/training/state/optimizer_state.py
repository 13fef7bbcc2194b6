"""An optimizer's state as named tensors and JSON, and back, so that the next step is the same to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from gpt_kit_hf.errors import CheckpointError, UsageError

# Where and how an optimizer computes, not what: these stay as the optimizer at hand was built.
_RUNTIME_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


def flatten_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an optimizer's state: tensors named "<state key>.<parameter name>", and the rest as JSON.

    The tensors are the live ones: clone them to write while training goes on. Works for an optimizer whose
    state per parameter is tensors and numbers; raises CheckpointError for any other, and UsageError for a
    parameter without a name of its own.
    """
    tensors: dict[str, torch.Tensor] = {}
    parameters: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for group, labels in zip(optimizer.param_groups, _group_names(optimizer, names), strict=True):
        for parameter, name in zip(group["params"], labels, strict=True):
            # .get: the state is a defaultdict, and looking must not add an entry.
            state = optimizer.state.get(parameter, {})
            entries = {key: _state_entry(key, name, value) for key, value in state.items()}
            tensors |= {f"{key}.{name}": v.detach() for key, v in state.items() if torch.is_tensor(v)}
            parameters[name] = {"shape": list(parameter.shape), "state": entries}
        options = {key: _plain(value) for key, value in _options(group).items()}
        groups.append({"parameters": labels, "options": options})
    return tensors, {"groups": groups, "parameters": parameters}


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    names: Mapping[torch.nn.Parameter, str],
) -> None:
    """Put back what `flatten_optimizer_state` returned, so that the next step is the same to the bit.

    The tensors are copied to the devices that torch's own `load_state_dict` gives them, in their stored
    dtype. Learning rate, betas and other options come back too; `fused`, `foreach`, `capturable` and
    `differentiable` stay as built. Raises CheckpointError, with the optimizer untouched, unless groups, names,
    shapes and tensors match one to one.
    """
    labels = _group_names(optimizer, names)
    try:
        _check_parameters(optimizer, labels, state)
        found = _collect_state(tensors, state["parameters"])
        groups = _merge_groups(optimizer, labels, state["groups"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"optimizer state is malformed: {type(error).__name__}: {error}") from error
    order = list(itertools.chain.from_iterable(labels))
    # Like a fresh optimizer, a parameter that has not been stepped yet has no entry.
    state_dict = {index: found[name] for index, name in enumerate(order) if found[name]}
    optimizer.load_state_dict({"state": state_dict, "param_groups": groups})
    live = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for parameter, name in zip(live, order, strict=True):
        for key, value in found[name].items():
            # torch casts state to the parameter's dtype: float32 moments of a bfloat16 weight would be rounded.
            if torch.is_tensor(value) and optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(optimizer.state[parameter][key].device)


def _group_names(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> list[list[str]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unnamed = [parameter for parameter in parameters if parameter not in names]
    if unnamed:
        raise UsageError(f"names: a parameter of shape {tuple(unnamed[0].shape)} in the optimizer has no name")
    if len({names[parameter] for parameter in parameters}) != len(parameters):
        raise UsageError("names: two parameters of the optimizer have the same name")
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _plain(value: object) -> object:
    """Return an option as JSON holds it; `_merge_groups` gives it back the type that the optimizer uses."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _state_entry(key: object, name: str, value: object) -> object:
    if isinstance(value, torch.Tensor):
        entry: object = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    elif value is None or isinstance(value, (int, float)):
        entry = value
    else:
        raise CheckpointError(f"optimizer state {key!r} of {name} is a {type(value).__name__}, not stored here")
    if not isinstance(key, str) or "." in key:
        raise CheckpointError(f"optimizer state key {key!r} of {name} must be text without a dot")
    return entry


def _check_parameters(optimizer: torch.optim.Optimizer, labels: list[list[str]], state: Mapping[str, Any]) -> None:
    """Refuse a state whose groups, parameter names or shapes are not those of the optimizer."""
    if len(state["groups"]) != len(labels):
        raise CheckpointError(
            f"the optimizer has {len(labels)} parameter groups, the checkpoint {len(state['groups'])}"
        )
    for position, (wanted, group) in enumerate(zip(labels, state["groups"], strict=True)):
        odd = sorted(set(wanted) ^ set(group["parameters"]))
        if odd:
            where = "the optimizer" if odd[0] in wanted else "the checkpoint"
            raise CheckpointError(f"parameter group {position}: {odd[0]} is only in {where} ({len(odd)} differ)")
    if set(itertools.chain.from_iterable(labels)) != set(state["parameters"]):
        raise CheckpointError("the checkpoint's parameters are not those of its parameter groups")
    for group, wanted in zip(optimizer.param_groups, labels, strict=True):
        for parameter, name in zip(group["params"], wanted, strict=True):
            if list(parameter.shape) != state["parameters"][name]["shape"]:
                stored = state["parameters"][name]["shape"]
                raise CheckpointError(f"{name} has shape {list(parameter.shape)}, in the checkpoint {stored}")


def _collect_state(tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]) -> dict[str, dict[str, object]]:
    """Return {parameter name: {state key: a copy of its tensor, or its number}}; every tensor used once."""
    found: dict[str, dict[str, object]] = {}
    used: set[str] = set()
    for name, parameter in parameters.items():
        found[name] = {}
        for key, entry in parameter["state"].items():
            if not isinstance(entry, dict):
                found[name][key] = _state_entry(key, name, entry)
                continue
            label = f"{key}.{name}"
            if label not in tensors:
                raise CheckpointError(f"optimizer state {label} is missing")
            if _state_entry(key, name, tensors[label]) != entry:
                raise CheckpointError(f"optimizer state {label} has not the recorded dtype and shape {entry}")
            found[name][key] = tensors[label].detach().clone()
            used.add(label)
    if extra := sorted(set(tensors) - used):
        raise CheckpointError(f"optimizer state {extra[0]} belongs to no parameter ({len(extra)} such)")
    return found


def _merge_groups(
    optimizer: torch.optim.Optimizer, labels: list[list[str]], saved_groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the parameter groups in the form of `state_dict`: stored options, runtime options as built."""
    counter = itertools.count()
    merged: list[dict[str, Any]] = []
    for group, wanted, saved in zip(optimizer.param_groups, labels, saved_groups, strict=True):
        current, options = _options(group), dict(saved["options"])
        for key, value in current.items():
            if key not in options:
                raise CheckpointError(f"optimizer option {key!r} is missing in the checkpoint")
            if key in _RUNTIME_OPTIONS:
                options[key] = value
            elif isinstance(value, torch.Tensor):
                options[key] = torch.full_like(value, options[key])
            elif isinstance(value, tuple):
                options[key] = tuple(options[key])
            elif isinstance(value, (int, float)) and not isinstance(options[key], (int, float)):
                raise CheckpointError(f"optimizer option {key!r} is {options[key]!r}, must be a number")
        merged.append({**options, "params": [next(counter) for _ in wanted]})
    return merged
