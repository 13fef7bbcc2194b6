"""Verification of a run folder: every byte of its checkpoints, every step once, the chain of batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import load_json, read_jsonl
from gpt_kit_hf.storage.checkpoints import MANIFEST, checkpoint_folder, list_checkpoints, verify_checkpoint
from gpt_kit_hf.storage.digests import digest_of
from gpt_kit_hf.storage.run_folder import LOCK_FILE, METRICS_FILE, OPTIONS_FILE, RECORD_FILE, holds_run
from gpt_kit_hf.training.state.batch_digests import chained
from gpt_kit_hf.training.state.training_state import read_position


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The findings: a line for each part that was checked, and a line for each problem."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify_run(run: Path) -> Verification:
    """Check everything that a run has written, changing nothing. Raises UsageError if the folder holds no run."""
    if not holds_run(run):
        raise UsageError(f"{str(run)!r} holds no run")
    found = Verification()
    record: dict[str, Any] = {}
    for name in (OPTIONS_FILE, RECORD_FILE):
        try:
            record = load_json(run / name)
        except CheckpointError as error:
            found.problems.append(str(error))
    chains = _check_metrics(run, found)
    checkpoints = list_checkpoints(run)
    for folder in checkpoints:
        faults = verify_checkpoint(folder) or _position_faults(folder, chains)
        found.problems.extend(f"{folder.name}: {fault}" for fault in faults)
        found.lines.append(f"{folder.name}  {f'{len(faults)} faults' if faults else 'intact'}")
    if not checkpoints:
        found.lines.append("no checkpoint yet")
    _check_published(run, record, found)
    for pattern in ("damaged-*", ".stage-*", ".trash-*"):
        found.lines.extend(
            f"left over  {path.relative_to(run)}" for path in sorted(run.glob(f"checkpoints/{pattern}"))
        )
    if (run / LOCK_FILE).exists():
        found.lines.append(f"{LOCK_FILE} exists: the run is in progress, or was killed")
    return found


def _check_metrics(run: Path, found: Verification) -> dict[int, str]:
    """Return the chain after each step; the steps must be 1, 2, ... and each chain must follow from the one before."""
    chains = {0: ""}
    if not (run / METRICS_FILE).exists():
        found.lines.append(f"{METRICS_FILE}  no step yet")
        return chains
    try:
        lines = read_jsonl(run / METRICS_FILE, report=found.lines.append)
    except CheckpointError as error:
        found.problems.append(str(error))
        return chains
    steps = [line for line in lines if line.get("kind") == "train"]
    for number, line in enumerate(steps, 1):
        if line.get("step") != number:
            found.problems.append(f"{METRICS_FILE}: step {line.get('step')} stands where step {number} should")
            return chains
        if chained(chains[number - 1], str(line.get("batch"))) != line.get("chain"):
            found.problems.append(f"{METRICS_FILE}: the chain of step {number} does not follow from the step before")
            return chains
        chains[number] = str(line["chain"])
    found.lines.append(f"{METRICS_FILE}  {len(steps):,} steps, each once, chain {chains[len(steps)] or '(none)'}")
    return chains


def _position_faults(folder: Path, chains: Mapping[int, str]) -> list[str]:
    try:
        position = read_position(folder)
    except CheckpointError as error:
        return [str(error)]
    if chains.get(position["step"], position["chain"]) != position["chain"]:
        return [f"its batches are not those of {METRICS_FILE}: chain {position['chain']}"]
    return []


def _check_published(run: Path, record: Mapping[str, Any], found: Verification) -> None:
    """Compare the model in the run's root folder with the checkpoint that it was copied from."""
    results = record.get("results")
    if not isinstance(results, dict) or not (run / "config.json").is_file():
        found.lines.append("not finished")
        return
    # Earlier versions published the last checkpoint always.
    step: Any = results.get("published_step", results.get("steps", 0))
    source = checkpoint_folder(run, step)
    copied = [path.name for path in sorted(run.glob("*.safetensors")) if (source / path.name).is_file()]
    if not copied:  # LoRA: the checkpoint holds the adapter alone
        found.lines.append(f"finished after step {step}; the root folder holds a merged model")
        return
    try:
        files = load_json(source / MANIFEST)["files"]
        for name in copied:
            if digest_of(run / name).sha256 != files[name]["sha256"]:
                found.problems.append(f"{name} is not that of {source.name}")
    except (CheckpointError, KeyError, TypeError) as error:
        found.problems.append(f"the model in the root folder cannot be compared with {source.name}: {error}")
        return
    found.lines.append(f"finished after step {step}; the root folder holds the model of {source.name}")
