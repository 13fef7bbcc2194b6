"""The layout of a run folder: the names of its files, and who may begin or continue a run in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import sync_path
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
LOCK_FILE = "run.lock"


def check_run_folder(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UsageError, with nothing changed, if a run can neither begin nor continue in the folder."""
    if resume and overwrite:
        raise UsageError("resume and overwrite: give one of them; the first keeps the run, the second replaces it")
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
        # What a run killed in its first moment leaves is ours.
        ours = (LOCK_FILE, f".{LOCK_FILE}.", f".{OPTIONS_FILE}.")
        others = sorted(path.name for path in run.iterdir() if not path.name.startswith(ours))
        if others:
            raise UsageError(
                f"output_dir {str(run)!r} holds other files ({', '.join(others[:3])}): name a new or empty folder"
            )


def make_run_folder(run: Path, *, overwrite: bool) -> str | None:
    """Make the folder of a new run; return where a run that was there lies now, if one had to be moved aside."""
    moved = str(move_aside(run)) if overwrite and holds_run(run) else None
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output_dir {str(run)!r} cannot be made: {error.strerror}") from None
    return moved


def holds_run(run: Path) -> bool:
    """Return whether a run was begun in the folder."""
    return (run / OPTIONS_FILE).is_file() or bool(list_checkpoints(run))


def publish_in_run(run: Path, source: Path) -> None:
    """Copy a checkpoint's model files into the run's root, each whole or not at all, so that the run loads itself."""
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
