"""An optimizer's state as named tensors and JSON, and back, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from gpt_kit_hf.errors import CheckpointError, UsageError

# How an optimizer computes, not what: a restored optimizer keeps these as it was built.
_RUNTIME_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


def flatten_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an optimizer's state: tensors named "<state key>.<parameter name>", and the rest as JSON.

    The tensors are the live ones: clone them to write while training continues. The state of a parameter must consist
    of tensors and numbers, or CheckpointError is raised; a parameter without a name of its own raises UsageError.
    """
    tensors: dict[str, torch.Tensor] = {}
    parameters: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for group, labels in zip(optimizer.param_groups, _group_names(optimizer, names), strict=True):
        for parameter, name in zip(group["params"], labels, strict=True):
            # .get, as a lookup in this defaultdict would add an entry.
            state = optimizer.state.get(parameter, {})
            entries = {key: _state_entry(key, name, value) for key, value in state.items()}
            tensors |= {f"{key}.{name}": v.detach() for key, v in state.items() if torch.is_tensor(v)}
            parameters[name] = {"shape": list(parameter.shape), "state": entries}
        options = {key: _to_json(value) for key, value in _options(group).items()}
        groups.append({"parameters": labels, "options": options})
    return tensors, {"groups": groups, "parameters": parameters}


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    names: Mapping[torch.nn.Parameter, str],
) -> None:
    """Load what `flatten_optimizer_state` returned, so that the next step is the same to the bit.

    The tensors are copied in their stored dtype, to the devices that torch's `load_state_dict` chooses. The options
    of the groups are loaded, too, except `fused`, `foreach`, `capturable` and `differentiable`. Raises CheckpointError
    if groups, names, shapes and tensors do not match one to one; the optimizer is then unchanged.
    """
    labels = _group_names(optimizer, names)
    try:
        _check_parameters(optimizer, labels, state)
        found = _collect_state(tensors, state["parameters"])
        groups = _merge_groups(optimizer, labels, state["groups"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"optimizer state is malformed: {type(error).__name__}: {error}") from error
    order = list(itertools.chain.from_iterable(labels))
    # As in a new optimizer, a parameter without a step has no entry.
    state_dict = {index: found[name] for index, name in enumerate(order) if found[name]}
    optimizer.load_state_dict({"state": state_dict, "param_groups": groups})
    for parameter, name in zip(_parameters(optimizer), order, strict=True):
        for key, value in found[name].items():
            # torch casts state to the parameter's dtype, which would round float32 moments of a bfloat16 weight.
            if torch.is_tensor(value) and optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(optimizer.state[parameter][key].device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _group_names(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> list[list[str]]:
    parameters = _parameters(optimizer)
    for parameter in parameters:
        if parameter not in names:
            raise UsageError(f"names: a parameter of shape {tuple(parameter.shape)} in the optimizer has no name")
    if len({names[parameter] for parameter in parameters}) != len(parameters):
        raise UsageError("names: two parameters of the optimizer have the same name")
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _to_json(value: object) -> object:
    """Return the value of an option for JSON; `_merge_groups` restores its type."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _state_entry(key: object, name: str, value: object) -> object:
    """Return the JSON entry for a value of a parameter's state: a number itself, a tensor's dtype and shape."""
    if not isinstance(key, str) or "." in key:
        raise CheckpointError(f"optimizer state key {key!r} of {name} must be a string without a dot")
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if value is None or isinstance(value, (int, float)):
        return value
    raise CheckpointError(f"optimizer state {key!r} of {name} is a {type(value).__name__}, not stored here")


def _check_parameters(optimizer: torch.optim.Optimizer, labels: list[list[str]], state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless groups, parameter names and shapes of a state are those of the optimizer."""
    groups, parameters = state["groups"], state["parameters"]
    if len(groups) != len(labels):
        raise CheckpointError(f"the optimizer has {len(labels)} parameter groups, the checkpoint {len(groups)}")
    for position, (expected, group) in enumerate(zip(labels, groups, strict=True)):
        if odd := sorted(set(expected) ^ set(group["parameters"])):
            where = "the optimizer" if odd[0] in expected else "the checkpoint"
            raise CheckpointError(f"parameter group {position}: {odd[0]} is only in {where} ({len(odd)} differ)")
    order = list(itertools.chain.from_iterable(labels))
    if set(order) != set(parameters):
        raise CheckpointError("the checkpoint's parameters are not those of its parameter groups")
    for parameter, name in zip(_parameters(optimizer), order, strict=True):
        if list(parameter.shape) != (stored := parameters[name]["shape"]):
            raise CheckpointError(f"{name} has shape {list(parameter.shape)}, in the checkpoint {stored}")


def _collect_state(tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]) -> dict[str, dict[str, object]]:
    """Return {parameter name: {state key: a copy of its tensor, or its number}}; every tensor must be used once."""
    found: dict[str, dict[str, object]] = {name: {} for name in parameters}
    unused = set(tensors)
    for name, parameter in parameters.items():
        for key, entry in parameter["state"].items():
            if not isinstance(entry, dict):
                found[name][key] = _state_entry(key, name, entry)
                continue
            label = f"{key}.{name}"
            if label not in tensors:
                raise CheckpointError(f"optimizer state {label} is missing")
            if _state_entry(key, name, tensors[label]) != entry:
                raise CheckpointError(f"optimizer state {label} does not have the recorded dtype and shape {entry}")
            found[name][key] = tensors[label].detach().clone()
            unused.discard(label)
    if unused:
        raise CheckpointError(f"optimizer state {min(unused)} belongs to no parameter ({len(unused)} such)")
    return found


def _merge_groups(
    optimizer: torch.optim.Optimizer, labels: list[list[str]], saved_groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return parameter groups for `load_state_dict`, with the saved options and the current runtime options."""
    counter = itertools.count()
    merged: list[dict[str, Any]] = []
    for group, names, saved in zip(optimizer.param_groups, labels, saved_groups, strict=True):
        options = dict(saved["options"])
        for key, value in _options(group).items():
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
        merged.append({**options, "params": [next(counter) for _ in names]})
    return merged
