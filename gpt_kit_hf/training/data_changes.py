"""Data that differs from what a run was begun with: refused, or allowed and recorded in run.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.run import CHANGED_TEXT
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.checkpoints import checkpoint_step
from gpt_kit_hf.storage.run_folder import RECORD_FILE
from gpt_kit_hf.storage.run_history import eval_changed
from gpt_kit_hf.training.state.training_state import read_position
from gpt_kit_hf.training.task import Task

# What is recorded of the text before and after a change.
_COUNTS = ("documents", "train_tokens", "eval_tokens", "eval_fingerprint")


def data_change(task: Task, checkpoint: Path, run: Path, allowed: Sequence[str] | None) -> dict[str, Any] | None:
    """Return {"before": facts, "now": facts} if the task's data is not that of the checkpoint, None if it is.

    Raises UsageError, with what differs, for a change that the names in `allowed` (allow_changes) do not allow.
    """
    before = read_position(checkpoint)["corpus"]
    if before == task.fingerprint:
        return None
    record, now = load_json(run / RECORD_FILE), task.facts()
    if task.data_name is None or task.data_name not in (allowed or ()):
        names = [name for name in now if name in record and record[name] != now[name]]
        changed = [f"{name} was {record[name]}, is {now[name]}" for name in names]
        listed = "; ".join(line for line in changed if len(line) < 200) or "same counts, different content"
        remedy = "restore the data, or name another output_dir"
        if task.data_name is not None:
            named = " ".join([*(allowed or ()), task.data_name])
            remedy = f"restore the data, or continue with the new one by --allow_changes {named}"
        elif CHANGED_TEXT in (allowed or ()):
            remedy = f"{remedy}; a streamed text must not change, as the run's position is a place in it"
        raise UsageError(
            f"{str(run)!r} was begun with other data ({listed}): its fingerprint was {before}, "
            f"that of the data now is {task.fingerprint}; {remedy}"
        )
    return {"before": _recorded(record, before), "now": _facts(now, task.fingerprint)}


def check_replayed_data(task: Task, checkpoint: Path | None, run: Path) -> None:
    """Raise UsageError unless the steps after the checkpoint, by default all, were computed on the task's data."""
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    sessions = [each for each in _changed_sessions(load_json(run / RECORD_FILE)) if each["after_step"] >= step]
    if any(_changed_to(each, task.fingerprint) for each in sessions if each["after_step"] == step):
        return
    if sessions and sessions[0]["data_changed"]["before"]["data_fingerprint"] != task.fingerprint:
        last = sessions[-1]["after_step"]
        raise UsageError(
            f"{str(run)!r}: the steps up to {last} were computed on other text than the later ones: replay steps from "
            f"{last + 1} on"
        )
    if checkpoint is not None:
        data_change(task, checkpoint, run, None)


def _changed_to(session: Mapping[str, Any], fingerprint: str) -> bool:
    return bool(session["data_changed"]["now"]["data_fingerprint"] == fingerprint)


def change_notes(change: Mapping[str, Any], step: int) -> list[str]:
    """Return log lines about a change of the text after a step."""
    before, now = change["before"], change["now"]
    counts = [
        f"{before[name]:,} to {now[name]:,} {name.replace('_', ' ')}"
        for name in ("documents", "train_tokens", "eval_tokens")
        if name in before and name in now
    ]
    prints = f"fingerprint {before['data_fingerprint']} to {now['data_fingerprint']}"
    lines = [f"the text changed after step {step}: {', '.join([*counts, prints])}"]
    if eval_changed(change):
        lines.append(
            f"the evaluation text changed, too: compare no scores across step {step}; parts of it may have been "
            "trained on, unless eval_files or dataset_test_split name it"
        )
    return lines


def _changed_sessions(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in record.get("sessions", []) if each.get("data_changed")]


def _recorded(record: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """Return what a run recorded of the data with this fingerprint.

    A run that was killed after a change, before its next checkpoint, has the new data in its record.
    """
    for change in [each["data_changed"] for each in _changed_sessions(record)]:
        for facts in (change["before"], change["now"]):
            if facts["data_fingerprint"] == fingerprint:
                return dict(facts)
    return _facts(record if record.get("data_fingerprint") == fingerprint else {}, fingerprint)


def _facts(found: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    return {"data_fingerprint": fingerprint, **{name: found[name] for name in _COUNTS if name in found}}
