"""Whether a run folder is what its run wrote: checkpoints to the byte, metrics without gap, the receipt's chain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import feed_file, load_json, read_jsonl
from gpt_kit_hf.storage.checkpoints import MANIFEST, list_checkpoints, verify_checkpoint
from gpt_kit_hf.storage.run_folder import LOCK_FILE, METRICS_FILE, OPTIONS_FILE, RECORD_FILE, holds_run
from gpt_kit_hf.training.state.batch_digests import chained
from gpt_kit_hf.training.state.training_state import read_position


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found: a line for each part that was looked at, and a line for each fault."""

    lines: list[str]
    problems: list[str]


def verify_run(run: Path) -> Verification:
    """Look at all that a run has written. Raises UsageError if the folder holds no run; nothing is changed."""
    if not holds_run(run):
        raise UsageError(f"{str(run)!r} holds no run")
    lines: list[str] = []
    problems: list[str] = []
    record = _record(run, problems)
    chains = _metrics(run, lines, problems)
    for folder in list_checkpoints(run):
        faults = verify_checkpoint(folder) or _position_faults(folder, chains)
        problems += [f"{folder.name}: {fault}" for fault in faults]
        lines.append(f"{folder.name}  {'intact' if not faults else f'{len(faults)} faults'}")
    if not list_checkpoints(run):
        lines.append("no checkpoint yet")
    _published(run, record, lines, problems)
    lines += _left_over(run)
    return Verification(lines=lines, problems=problems)


def _record(run: Path, problems: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name in (OPTIONS_FILE, RECORD_FILE):
        try:
            record = load_json(run / name)
        except CheckpointError as error:
            problems.append(str(error))
    return record


def _metrics(run: Path, lines: list[str], problems: list[str]) -> dict[int, str]:
    """Return the chain after each step; the steps must be 1, 2, ... and each chain follow from the one before."""
    chains = {0: ""}
    if not (run / METRICS_FILE).exists():
        lines.append(f"{METRICS_FILE}  not begun")
        return chains
    try:
        steps = [line for line in read_jsonl(run / METRICS_FILE, report=lines.append) if line.get("kind") == "train"]
    except CheckpointError as error:
        problems.append(str(error))
        return chains
    for wanted, line in enumerate(steps, 1):
        if line.get("step") != wanted:
            problems.append(f"{METRICS_FILE}: step {line.get('step')} stands where step {wanted} should")
            return chains
        if chained(chains[wanted - 1], str(line.get("batch"))) != line.get("chain"):
            problems.append(f"{METRICS_FILE}: the chain of step {wanted} does not follow from the step before")
            return chains
        chains[wanted] = str(line["chain"])
    lines.append(f"{METRICS_FILE}  {len(steps):,} steps, each once, chain {chains[len(steps)] or '(none)'}")
    return chains


def _position_faults(folder: Path, chains: Mapping[int, str]) -> list[str]:
    try:
        position = read_position(folder)
    except CheckpointError as error:
        return [str(error)]
    if position["step"] in chains and chains[position["step"]] != position["chain"]:
        return [f"its batches are not those of {METRICS_FILE}: chain {position['chain']}"]
    return []


def _published(run: Path, record: Mapping[str, Any], lines: list[str], problems: list[str]) -> None:
    """Compare the model in the run's root with the checkpoint that it was copied from."""
    results = record.get("results")
    if not isinstance(results, dict) or not (run / "config.json").is_file():
        lines.append("not finished")
        return
    source = run / "checkpoints" / f"step-{results.get('steps', 0):08d}"
    weights = sorted(run.glob("*.safetensors"))
    same = [path.name for path in weights if (source / path.name).is_file()]
    if not same:  # an adapter is merged, and its checkpoint holds the adapter alone
        lines.append(f"finished after step {results.get('steps')}; the root holds a merged model")
        return
    try:
        files = load_json(source / MANIFEST)["files"]
        other = [name for name in same if _sha256(run / name) != files[name]["sha256"]]
        problems += [f"{name} is not that of {source.name}" for name in other]
    except (CheckpointError, KeyError, TypeError) as error:
        problems.append(f"the model in the root cannot be compared with {source.name}: {error}")
        return
    lines.append(f"finished after step {results.get('steps')}; the root holds the model of {source.name}")


def _left_over(run: Path) -> list[str]:
    found = [*run.glob("checkpoints/damaged-*"), *run.glob("checkpoints/.stage-*"), *run.glob("checkpoints/.trash-*")]
    lines = [f"left over  {path.relative_to(run)}" for path in sorted(found)]
    if (run / LOCK_FILE).exists():
        lines.append(f"{LOCK_FILE} is there: the run is under way, or was killed")
    return lines


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    feed_file(digest, path)
    return digest.hexdigest()
