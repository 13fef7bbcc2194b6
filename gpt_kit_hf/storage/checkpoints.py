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
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import Report, feed_file, free_name, load_json, save_json, sync_path

MANIFEST = "manifest.json"
_FORMAT = 1

_log = logging.getLogger(__name__)


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
        aside = free_name(final.with_name(f"damaged-{final.name}"))
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
    mode = _ordinary_mode(stage)
    for path in found.values():
        # safetensors makes its files 0600: colleagues could not read the model. No call where nothing changes,
        # since mounts on which a file's mode is fixed refuse it.
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
        sync_path(path)
    for folder in {parent for path in found.values() for parent in path.parents if stage in parent.parents}:
        sync_path(folder)
    files = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in found.items()}
    # Syncs the stage folder, too.
    save_json(stage / MANIFEST, {"format": _FORMAT, "step": step, "files": files})


def _ordinary_mode(folder: Path) -> int:
    """Return the mode of a new file in the folder. Python can read the umask only by changing it for all threads."""
    probe = folder / f".{secrets.token_hex(8)}"
    probe.touch(exist_ok=False)
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


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
    feed_file(digest, path)
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
