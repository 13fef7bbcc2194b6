"""Checkpoints that a kill, a full disk or a flipped bit cannot spoil, and the run folder they live in.

    RUN/run.lock                        the one process that may write here
    RUN/metrics.jsonl                   one JSON object a line
    RUN/checkpoints/step-00000200/      a complete model folder, the training state, and manifest.json
    RUN/checkpoints/.stage-*, .trash-*  half-written and half-deleted folders, never read

A folder gets its final name by one rename, after all of it has reached the disk; so whatever has that name
was whole once, and the manifest's sizes and SHA-256 digests say whether it still is. All state is safetensors
and JSON: reading a checkpoint runs no code. Written for POSIX file systems, NFS among them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpt_kit_hf.errors import CheckpointError, UsageError

MANIFEST = "manifest.json"
_FORMAT = 1
# Far above what the largest preset writes, far below what would make a reader wait.
_MAX_JSON_BYTES = 64 << 20
_MAX_HEADER_BYTES = 16 << 20
# Where and how an optimizer computes, not what: these stay as the optimizer at hand was built.
_RUNTIME_OPTIONS = ("foreach", "fused", "capturable", "differentiable")

_log = logging.getLogger(__name__)
Report = Callable[[str], None]


# --- single files ----------------------------------------------------------------------------------------


def sync_path(path: Path) -> None:
    """Return once the file's bytes, or the folder's entries, are on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a kill, finds either the old content or the new, never a part.

    Raises CheckpointError where the file system refuses; the old content then stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            _write_synced(temporary, data.encode() if isinstance(data, str) else data)
            temporary.replace(path)
            sync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} was not written: {error}") from error


def save_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object that `load_json` returns equal: floats to the last bit, no NaN or infinity.

    Raises CheckpointError for what JSON would change (a tuple, a key that is not text) or cannot hold, and for
    more than `load_json` reads.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not representable as JSON: {error}") from error
    if _parse_object(text.encode(), str(path)) != value:
        raise CheckpointError(f"{path}: holds a tuple, or a key that is not text, which JSON would change")
    if len(text) >= _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {len(text):,} bytes, more than the {_MAX_JSON_BYTES:,} allowed")
    replace_file(path, text + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; no key twice, every number finite.

    Raises CheckpointError for anything else, and for a file of more than 64 MiB before it is read.
    """
    return _parse_object(_read_bounded(path, _MAX_JSON_BYTES), str(path))


def append_jsonl(path: Path, record: Mapping[str, object]) -> None:
    """Append one JSON object as one line, in one write; a write that fails midway is taken back.

    The line is safe from a kill at once, from a power cut only after `sync_path`. A run that continues calls
    `cut_jsonl` first, or a torn last line and the new one become one. Raises CheckpointError.
    """
    try:
        data = json.dumps(record, allow_nan=False).encode() + b"\n"
        with path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            written = 0
            try:
                written = file.write(data)
            finally:
                if written != len(data):
                    file.truncate(start)
        if written != len(data):
            raise OSError("the disk took only a part of it")
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"no line was added to {path}: {error}") from error


def read_jsonl(path: Path, *, report: Report = _log.warning) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file in order; a torn last line, as a kill leaves it, is only reported.

    Raises CheckpointError for a missing file and, with its number, for any other line that is no JSON object.
    """
    return [record for _, record in _jsonl_lines(path, report)]


def cut_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool], *, report: Report = _log.warning) -> int:
    """Drop the lines for which `keep` is false, and a torn last one, by one atomic rewrite.

    Kept lines stay byte for byte. Returns how many whole lines went. Raises CheckpointError as `read_jsonl`.
    """
    lines = _jsonl_lines(path, report)
    kept = [line for line, record in lines if keep(record)]
    replace_file(path, b"".join(line + b"\n" for line in kept))
    return len(lines) - len(kept)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors; on any device, strided in any way, sharing storage or not.

    Raises CheckpointError for what the format cannot hold (sparse, meta, sharded) and where the disk refuses.
    """
    ready: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_meta:
            raise CheckpointError(f"{path}: {name} is not a plain dense tensor and cannot be stored")
        value = tensor.detach().to("cpu").contiguous()
        # The format refuses two names for one storage; the second gets bytes of its own.
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        ready[name] = value
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} was not written: {error}") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file on the CPU, in memory of their own.

    Raises CheckpointError for a file that is not whole, and for a header over 16 MiB before it is read.
    """
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
        if header > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: its header claims {header:,} bytes, the file has {size:,}")
        # Not memory-mapped: on NFS, tensors would die with the file, which rotation deletes some day.
        return load_file(path, backend="pread")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than the {limit:,} bytes that such a file may have")
    return data


def _parse_object(data: bytes, source: str) -> dict[str, Any]:
    def refuse(word: str) -> float:
        raise ValueError(f"{word} is not a JSON number")

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return keys

    try:
        value = json.loads(data.decode(), parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: must be a JSON object, is a {type(value).__name__}")
    return value


def _jsonl_lines(path: Path, report: Report) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        *whole, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    lines = [(line, _parse_object(line, f"{path}:{number}")) for number, line in enumerate(whole, 1)]
    if last:
        try:
            lines.append((last, _parse_object(last, f"{path}:{len(whole) + 1}")))
        except CheckpointError as error:
            report(f"dropped a torn last line: {error}")
    return lines


# --- optimizer state -------------------------------------------------------------------------------------


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


# --- checkpoints -----------------------------------------------------------------------------------------


def save_checkpoint(
    run: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep_last: int,
    keep: Collection[int] = (),
    barrier: Callable[[], None] = lambda: None,
    required_bytes: int = 0,
    report: Report = _log.warning,
) -> Path:
    """Write the checkpoint of a step, whole or not at all, then delete old ones; return its folder.

    `write` fills the empty folder that it is given; it is not called if there is an intact checkpoint of the
    step, which stays as it is. A damaged one is moved aside. Left in the end: the newest `keep_last` up to this
    step, the steps in `keep`, and any newer ones. `barrier` is called exactly once, before the folder gets its
    name, also when the write failed: the other processes wait in theirs after their part. If it raises, nothing
    is renamed. One save at a time, under the run's lock.
    Raises CheckpointError, with all older checkpoints in place, if less than `required_bytes` are free or the
    file system refuses.
    """
    if step < 0 or keep_last < 1:
        raise UsageError(f"step={step}, keep_last={keep_last}: must be at least 0 and 1")
    final = run / "checkpoints" / f"step-{step:08d}"
    stage = final.with_name(f".stage-{final.name}")
    try:
        try:
            staged = _fill_stage(stage, final, write, required_bytes, report)
        finally:
            # Also on failure: the others wait there.
            barrier()
        if staged:
            stage.rename(final)
            sync_path(final.parent)
    except Exception as error:
        # The tokenizers library reports a full disk as a bare Exception.
        if not isinstance(error, (OSError, SafetensorError, CheckpointError)) and type(error) is not Exception:
            raise
        raise CheckpointError(f"the checkpoint of step {step} was not saved: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    _rotate(run, step, keep_last, keep, report)
    return final


def checkpoint_step(folder: Path) -> int:
    """Return the step in a checkpoint folder's name; raise CheckpointError for a name of another form."""
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    if match is None or folder.name != f"step-{int(match[1]):08d}":
        raise CheckpointError(f"{folder.name!r} is not the name of a checkpoint (step-00000200)")
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run by rising step, unverified; none if there is no such run."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = [path for path in (run / "checkpoints").iterdir() if _is_checkpoint(path)]
        return sorted(found, key=checkpoint_step)
    return []


def verify_checkpoint(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint, one line each; if empty, every byte is as it was written.

    Reported: a manifest that is missing, malformed or of another step; files that are missing, changed or not
    in the manifest; symbolic links; names that leave the folder. No file outside the folder is opened.
    """
    try:
        found, problems = _scan(folder)
        if MANIFEST not in found:
            return [f"{MANIFEST} is missing", *problems]
        expected = _read_manifest(folder)
        for name, entry in expected.items():
            problems += _compare(name, found.get(name), entry)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    return problems + [f"{name} is not in the manifest" for name in found.keys() - expected.keys() - {MANIFEST}]


def latest_checkpoint(run: Path, *, report: Report = _log.warning) -> Path | None:
    """Return the newest intact checkpoint, or None if the run has none at all.

    Each newer one that is damaged is reported in one line. Raises CheckpointError if all are damaged.
    """
    checkpoints = list_checkpoints(run)
    for folder in reversed(checkpoints):
        problems = verify_checkpoint(folder)
        if not problems:
            return folder
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        report(f"{folder.name} is damaged and not used: {problems[0]}{more}")
    if checkpoints:
        raise CheckpointError(f"none of the {len(checkpoints)} checkpoints in {run} is intact")
    return None


def _is_checkpoint(path: Path) -> bool:
    try:
        return checkpoint_step(path) >= 0 and path.is_dir()
    except CheckpointError:
        return False


def _fill_stage(stage: Path, final: Path, write: Callable[[Path], None], required_bytes: int, report: Report) -> bool:
    """Write, sync and describe the stage folder; return False where the final one is there and intact."""
    final.parent.mkdir(parents=True, exist_ok=True)
    sync_path(final.parent.parent)
    # The run's lock admits one writer, so whatever a killed one left is garbage and only takes up space.
    for left in [*final.parent.glob(".stage-*"), *final.parent.glob(".trash-*")]:
        _discard(left, report)
    if final.is_dir():
        problems = verify_checkpoint(final)
        if not problems:
            return False
        aside = _free_name(final.with_name(f"damaged-{final.name}"))
        final.rename(aside)
        report(f"{final.name} was damaged ({problems[0]}); moved to {aside.name} and written anew")
    free = shutil.disk_usage(final.parent).free
    if free < required_bytes:
        raise CheckpointError(f"it needs {required_bytes:,} bytes, {final.parent} has {free:,} free")
    stage.mkdir()
    write(stage)
    _write_manifest(stage, checkpoint_step(final))
    return True


def _write_manifest(stage: Path, step: int) -> None:
    found, problems = _scan(stage)
    if problems or MANIFEST in found or not found:
        raise CheckpointError(f"{problems[0] if problems else f'only {MANIFEST}, or no file, was written'}")
    for path in found.values():
        sync_path(path)
    for folder in {parent for path in found.values() for parent in path.parents if stage in parent.parents}:
        sync_path(folder)
    files = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in found.items()}
    # Syncs the stage folder, too.
    save_json(stage / MANIFEST, {"format": _FORMAT, "step": step, "files": files})


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return {name: (bytes, SHA-256)} of a well-formed manifest that belongs to this folder."""
    manifest = load_json(folder / MANIFEST)
    files = manifest.get("files")
    step = manifest.get("step")
    if manifest.get("format") != _FORMAT or type(step) is not int or not isinstance(files, dict) or not files:
        raise CheckpointError(f"{MANIFEST} is not of format {_FORMAT}")
    if _is_checkpoint(folder) and checkpoint_step(folder) != step:
        raise CheckpointError(f"{MANIFEST} is of step {step}")
    expected: dict[str, tuple[int, str]] = {}
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
            raise CheckpointError(f"{MANIFEST} names {name!r}, which leaves the folder or is not in plain form")
        if not isinstance(entry, dict) or type(entry.get("size")) is not int:
            raise CheckpointError(f"{MANIFEST} has no size for {name}")
        expected[name] = (entry["size"], str(entry.get("sha256")))
    return expected


def _scan(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the regular files below a folder by relative name, and a line for each entry of another kind."""

    def fail(error: OSError) -> None:
        raise error

    found: dict[str, Path] = {}
    problems: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        for path in (Path(parent, name) for name in [*folders, *names]):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[name] = path
            elif not stat.S_ISDIR(mode):
                problems.append(f"{name} is a {'symbolic link' if stat.S_ISLNK(mode) else 'special file'}")
    return found, problems


def _compare(name: str, path: Path | None, entry: tuple[int, str]) -> Iterator[str]:
    if path is None:
        yield f"{name} is missing"
    elif (size := path.stat().st_size) != entry[0]:
        yield f"{name} has {size:,} bytes instead of {entry[0]:,}"
    elif _sha256(path) != entry[1]:
        yield f"{name} has changed: its SHA-256 differs"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _rotate(run: Path, step: int, keep_last: int, keep: Collection[int], report: Report) -> None:
    # Newer ones are damaged, or of a history that the user left. Counted, they would push out the good ones.
    old = [path for path in list_checkpoints(run) if checkpoint_step(path) <= step]
    for folder in old[:-keep_last]:
        if checkpoint_step(folder) not in keep:
            _discard(folder, report)


def _discard(folder: Path, report: Report) -> None:
    """Delete a folder under a name that no reader takes for a checkpoint; a failure is only reported."""
    trash = folder
    try:
        if not folder.name.startswith("."):
            trash = folder.with_name(f".trash-{folder.name}")
            folder.rename(trash)
        trash.unlink() if trash.is_symlink() else shutil.rmtree(trash)
    except OSError as error:
        report(f"could not delete {trash}: {error}")


def _free_name(path: Path) -> Path:
    """Return the path, with the first of -1, -2, ... behind it under which nothing exists."""
    candidates = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


# --- the run folder's lock -------------------------------------------------------------------------------


class RunLock:
    """Hold, as a context manager, the right to write into a run folder; the folder is made if missing.

    The lock is the file `run.lock` with {host, pid, started}. It comes into being by a hard link, which is
    atomic on local disks and NFS alike and shows the whole record at once; `flock` alone would be simpler, but
    many cluster file systems have it on one host only, or not at all, and a worker forked from a killed process
    would go on holding it. The lock of a process of this host that has ended is taken over: those who find it
    queue in an `flock` of that very file, and the first replaces it by its own in one rename. Raises
    CheckpointError while another process holds it, and for any process of another host, which cannot be seen
    from here. A host is its name.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._record: dict[str, object] = {}

    def __enter__(self) -> RunLock:
        path = self.run / "run.lock"
        record = {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}
        temporary = path.with_name(f".run.lock.{secrets.token_hex(8)}")
        try:
            try:
                self.run.mkdir(parents=True, exist_ok=True)
                _write_synced(temporary, json.dumps(record).encode())
                # One round, but for a lock that comes or goes between the two looks.
                if not any(_link(temporary, path) or _take_over(temporary, path) for _ in range(100)):
                    raise CheckpointError(f"{path} cannot be taken; remove it if no process uses this run")
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.run} cannot be locked: {error}") from error
        self._record = record
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the lock file if it is still this process's own; a forked child leaves its parent's."""
        # A lock that cannot be deleted must not hide the block's exception; its process is gone soon anyway.
        with suppress(OSError, CheckpointError):
            path = self.run / "run.lock"
            if self._record.get("pid") == os.getpid() and load_json(path) == self._record:
                path.unlink()


def move_aside(run: Path) -> Path:
    """Rename RUN to RUN.replaced-1, or the next free number, and return the new path; nothing is deleted.

    Takes the run's lock meanwhile, so call it before locking. Raises CheckpointError if the run is in use.
    """
    run = run.absolute()
    if not run.is_dir():
        raise CheckpointError(f"{run} is not a folder")
    with RunLock(run) as lock:
        target = _free_name(run.with_name(f"{run.name}.replaced"))
        try:
            run.rename(target)
        except OSError as error:
            raise CheckpointError(f"{run} cannot be moved to {target.name}: {error}") from error
        lock.run = target
    return target


def _link(temporary: Path, path: Path) -> bool:
    """Create the lock with the content of `temporary`; return False if it exists."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError:
        # Some mounted drives have no hard links. A reader may see an empty record for an instant: refused.
        try:
            _write_synced(path, temporary.read_bytes())
        except FileExistsError:
            return False
    return True


def _take_over(temporary: Path, path: Path) -> bool:
    """Replace the lock of a process that has ended; return False if the lock changed meanwhile."""
    # Here, not above: Windows lacks it, and the rest of the package works there.
    import fcntl

    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                # While this process waited, another may have replaced the file that is now locked.
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return False
                _refuse_if_held(path, file.read(4096))
                temporary.replace(path)
            finally:
                # Closing would not do where another thread has forked meanwhile: the child shares the lock.
                fcntl.flock(file, fcntl.LOCK_UN)
    except FileNotFoundError:
        return False
    return True


def _refuse_if_held(path: Path, data: bytes) -> None:
    try:
        owner = _parse_object(data, str(path))
    except CheckpointError:
        owner = {}
    host, pid = owner.get("host"), owner.get("pid")
    if not isinstance(host, str) or type(pid) is not int or pid < 1:
        raise CheckpointError(f"the lock {path} is unreadable; remove it if no process uses this run")
    if host != socket.gethostname():
        raise CheckpointError(
            f"{path.parent} is in use by process {pid} on {host}; if that one is surely gone, remove {path}"
        )
    if _is_running(pid, owner.get("started")):
        raise CheckpointError(f"{path.parent} is in use by process {pid} on this host, {host}")


def _is_running(pid: int, started: object) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = _process_start(pid)
    # Where the system does not tell, a process of that number counts as the owner: refusing loses nothing.
    return not (started and now) or started == now


def _process_start(pid: int) -> str:
    """Return when a process began, unlike for any other of its number; "ended" for a zombie, "" if unknown."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    # Behind the command's name, in parentheses and of any bytes: the state, 18 other fields, the start.
    fields = status.rpartition(b")")[2].split()
    return "ended" if fields[0] in (b"Z", b"X") else f"{int(fields[19])} ticks after boot {boot}"
