"""The layout of a run folder: the names of its files, and whether a run may start or resume in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import read_jsonl, sync_path
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.storage.lock import move_aside

OPTIONS_FILE = "options.json"
RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
EVALUATIONS_FILE = "evaluations.json"
REPORT_FILE = "supervision.json"
INVARIANCE_FILE = "invariance.json"
ADAPTER_FOLDER = "adapter"
TENSORBOARD_FOLDER = "tensorboard"
EVENTS_PREFIX = "events.out.tfevents."  # of the names of its files
LOCK_FILE = "run.lock"


def check_run_folder(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UsageError if a run can neither start nor resume in the folder; nothing is changed."""
    if resume and overwrite:
        raise UsageError("resume and overwrite exclude each other: one continues the run, the other replaces it")
    try:
        existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
        holds = holds_run(run)
    except (OSError, ValueError) as error:
        raise UsageError(f"output_dir {str(run)!r} cannot be used: {error}") from None
    if holds and not (resume or overwrite):
        raise UsageError(f"output_dir {str(run)!r} already holds a run: use resume, overwrite or another folder")
    if not existing.is_dir():
        raise UsageError(f"output_dir {str(run)!r} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {str(run)!r} is not writable")
    if existing == run.absolute() and not holds:
        # Files that a run leaves if it is killed while it starts.
        ours = (LOCK_FILE, f".{LOCK_FILE}.", f".{OPTIONS_FILE}.")
        others = sorted(path.name for path in run.iterdir() if not path.name.startswith(ours))
        if others:
            raise UsageError(
                f"output_dir {str(run)!r} holds other files ({', '.join(others[:3])}): name a new or empty folder"
            )


def make_run_folder(run: Path, *, overwrite: bool) -> str | None:
    """Create the folder of a new run; with overwrite, move an old run aside and return its new path."""
    moved = str(move_aside(run)) if overwrite and holds_run(run) else None
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output_dir {str(run)!r} cannot be made: {error.strerror}") from None
    return moved


def holds_run(run: Path) -> bool:
    """Return whether the folder contains a run."""
    return (run / OPTIONS_FILE).is_file() or bool(list_checkpoints(run))


def recorded_steps(run: Path, first: int, last: int) -> dict[int, dict[str, Any]]:
    """Return the records of the steps of a run by number. Raises UsageError unless first..last are among them."""
    metrics = run / METRICS_FILE
    records = read_jsonl(metrics) if metrics.is_file() else []
    steps = {record["step"]: record for record in records if record.get("kind") == "train"}
    if not 1 <= first <= last or last not in steps:
        raise UsageError(f"replay {first}:{last}: the run has the steps 1 to {max(steps, default=0)}")
    return steps


def publish_in_run(run: Path, source: Path) -> None:
    """Copy a checkpoint's model files into the run folder, each atomically, so that `from_pretrained` loads it."""
    names = [path.name for path in source.iterdir() if path.suffix in (".json", ".py", ".safetensors", ".jinja")]
    internal = {"manifest.json", "training_state.json", "optimizer.safetensors"}
    for name in sorted(set(names) - internal, key=lambda name: (name == "config.json", name)):
        target, stage = run / name, run / f".{name}.stage"
        try:
            shutil.copyfile(source / name, stage)
            sync_path(stage)
            stage.replace(target)
        except OSError as error:
            raise CheckpointError(f"{target} was not written: {error}") from error
    sync_path(run)
