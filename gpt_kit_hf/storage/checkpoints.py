"""Checkpoints that survive a kill or a full disk, and in which a flipped bit is detected.

    RUN/run.lock                        the process that may write here
    RUN/metrics.jsonl                   one JSON object per line
    RUN/checkpoints/step-00000200/      a complete model folder, the training state and manifest.json
    RUN/checkpoints/.stage-*, .trash-*  incomplete folders, never read

A checkpoint is written to a stage folder, flushed to the disk and renamed, so a folder with its final name was
complete once; the sizes and SHA-256 digests in its manifest show whether it still is. All state is safetensors and
JSON: reading a checkpoint runs no code. For POSIX file systems, NFS included.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from safetensors import SafetensorError

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import Report, free_name, load_json, save_json, sync_path
from gpt_kit_hf.storage.digests import FileDigest, digest_of

MANIFEST = "manifest.json"
_FORMAT = 1
# What fills a stage folder; returns the digests of the files that are flushed to the disk already, {name: digest}.
Write: TypeAlias = Callable[[Path], Mapping[str, FileDigest] | None]

_log = logging.getLogger(__name__)


def save_checkpoint(
    run: Path,
    step: int,
    write: Write,
    *,
    keep_last: int,
    keep: Collection[int] = (),
    check: Callable[[], None] = lambda: None,
    required_bytes: int = 0,
    report: Report = _log.warning,
) -> Path:
    """Write the checkpoint of a step atomically, delete old ones, and return its folder.

    `write` fills the empty folder that it is given. It is not called if the step has an intact checkpoint; a damaged
    one is moved aside. Kept are the newest `keep_last` checkpoints up to this step, those of the steps in `keep`, and
    all newer ones. `check` is called before anything is changed, and again before the rename; if it raises, nothing is
    renamed. Save one checkpoint at a time, and hold the run's lock.

    Raises CheckpointError, and keeps all older checkpoints, if fewer than `required_bytes` are free or the folder
    cannot be written.
    """
    if step < 0 or keep_last < 1:
        raise UsageError(f"step={step}, keep_last={keep_last}: must be at least 0 and 1")
    final = checkpoint_folder(run, step)
    # Not only the step: a process that lost the run's lock may still write to its stage.
    stage = final.with_name(f".stage-{final.name}-{secrets.token_hex(4)}")
    check()
    try:
        try:
            staged = _fill_stage(stage, final, write, required_bytes, report)
        finally:
            check()
        if staged:
            stage.rename(final)
            sync_path(final.parent)
    except Exception as error:
        # The tokenizers library raises a bare Exception when the disk is full.
        if not isinstance(error, (OSError, SafetensorError, CheckpointError)) and type(error) is not Exception:
            raise
        raise CheckpointError(f"the checkpoint of step {step} was not saved: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    _rotate(run, step, keep_last, keep, report)
    return final


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint of a step, whether there is one or not."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder, as step-00000200; raise CheckpointError for another name."""
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    if match is None or folder.name != f"step-{int(match[1]):08d}":
        raise CheckpointError(f"{folder.name!r} is not the name of a checkpoint (step-00000200)")
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run in order of their steps, not verified; [] if there is no such run."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = [path for path in (run / "checkpoints").iterdir() if _is_checkpoint(path)]
        return sorted(found, key=checkpoint_step)
    return []


def superseded(steps: Iterable[int], step: int, keep_last: int, keep: Collection[int]) -> list[int]:
    """Return those of the `steps` whose checkpoints are deleted after that of `step`; see `save_checkpoint`."""
    # Newer checkpoints are damaged or abandoned. If they were counted, good ones would be deleted instead.
    old = sorted(each for each in steps if each <= step)
    return [each for each in old[:-keep_last] if each not in keep]


def verify_checkpoint(folder: Path) -> list[str]:
    """Return the problems of a checkpoint, one line each; [] if every byte is as it was written.

    Problems are a manifest that is missing, malformed or of another step; files that are missing, changed or not in
    the manifest; symbolic links; names that lead out of the folder. No file outside of the folder is opened.
    """
    try:
        found, problems = _scan(folder)
        if MANIFEST not in found:
            return [f"{MANIFEST} is missing", *problems]
        expected = read_manifest(folder)
        for name, entry in expected.items():
            problems += _compare(name, found.get(name), entry)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    return problems + [f"{name} is not in the manifest" for name in found.keys() - expected.keys() - {MANIFEST}]


def latest_checkpoint(run: Path, *, report: Report = _log.warning) -> Path | None:
    """Return the newest intact checkpoint, or None if the run has no checkpoint.

    Reports each newer, damaged one in a line. Raises CheckpointError if all are damaged.
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


def _fill_stage(stage: Path, final: Path, write: Write, required_bytes: int, report: Report) -> bool:
    """Fill the stage folder and write its manifest; return False if the final folder exists and is intact."""
    final.parent.mkdir(parents=True, exist_ok=True)
    sync_path(final.parent.parent)
    # The run's lock admits one writer, so these are leftovers of a killed one.
    for leftover in [*final.parent.glob(".stage-*"), *final.parent.glob(".trash-*")]:
        _discard(leftover, report)
    if final.is_dir():
        problems = verify_checkpoint(final)
        if not problems:
            return False
        aside = free_name(final.with_name(f"damaged-{final.name}"))
        final.rename(aside)
        report(f"{final.name} was damaged ({problems[0]}); moved to {aside.name} and written again")
    free = shutil.disk_usage(final.parent).free
    if free < required_bytes:
        raise CheckpointError(f"it needs {required_bytes:,} bytes, {final.parent} has {free:,} free")
    stage.mkdir()
    _write_manifest(stage, checkpoint_step(final), write(stage) or {})
    return True


def _write_manifest(stage: Path, step: int, known: Mapping[str, FileDigest]) -> None:
    """Give the staged files their ordinary mode, flush them to the disk and describe them in the manifest.

    The files in `known` are flushed and hashed already, perhaps by other processes.
    """
    found, problems = _scan(stage)
    if problems or MANIFEST in found or not found:
        raise CheckpointError(problems[0] if problems else f"only {MANIFEST}, or no file, was written")
    mode = _ordinary_mode(stage)
    for path in found.values():
        # safetensors creates files with mode 0600, which others could not read. Mounts with a fixed mode refuse
        # chmod, so it is called only for a change.
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
    wrong = [name for name, digest in known.items() if name not in found or found[name].stat().st_size != digest.size]
    if wrong:
        raise CheckpointError(f"{wrong[0]} is not as the process that wrote it left it")
    rest = [path for name, path in found.items() if name not in known]
    folders = {parent for path in found.values() for parent in path.parents if stage in parent.parents}
    # The disk is waited for while the files are hashed.
    with ThreadPoolExecutor() as pool:
        flushed = pool.map(sync_path, [*rest, *folders])
        hashed = dict(zip(rest, pool.map(digest_of, rest), strict=True))
        list(flushed)  # raises what a flush raised
    files = {name: asdict(known[name] if name in known else hashed[path]) for name, path in found.items()}
    # This flushes the stage folder, too.
    save_json(stage / MANIFEST, {"format": _FORMAT, "step": step, "files": files})


def _ordinary_mode(folder: Path) -> int:
    """Return the mode of a new file in the folder: reading the umask would change it for all threads meanwhile."""
    probe = folder / f".{secrets.token_hex(8)}"
    probe.touch(exist_ok=False)
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """Return {name: digest} of the files in a well-formed manifest that belongs to this folder."""
    manifest = load_json(folder / MANIFEST)
    files = manifest.get("files")
    step = manifest.get("step")
    if manifest.get("format") != _FORMAT or type(step) is not int or not isinstance(files, dict) or not files:
        raise CheckpointError(f"{MANIFEST} is not of format {_FORMAT}")
    if _is_checkpoint(folder) and checkpoint_step(folder) != step:
        raise CheckpointError(f"{MANIFEST} is of step {step}")
    expected: dict[str, FileDigest] = {}
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
            raise CheckpointError(f"{MANIFEST} names {name!r}, which leaves the folder or is not in canonical form")
        if not isinstance(entry, dict) or type(entry.get("size")) is not int:
            raise CheckpointError(f"{MANIFEST} has no size for {name}")
        expected[name] = FileDigest(size=entry["size"], sha256=str(entry.get("sha256")))
    return expected


def _scan(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return {relative name: path} of the regular files below a folder, and a problem for each other entry."""

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


def _compare(name: str, path: Path | None, expected: FileDigest) -> Iterator[str]:
    if path is None:
        yield f"{name} is missing"
    elif (size := path.stat().st_size) != expected.size:
        yield f"{name} has {size:,} bytes instead of {expected.size:,}"
    elif digest_of(path) != expected:
        yield f"{name} has changed: its SHA-256 differs"


def _rotate(run: Path, step: int, keep_last: int, keep: Collection[int], report: Report) -> None:
    folders = {checkpoint_step(folder): folder for folder in list_checkpoints(run)}
    for old in superseded(folders, step, keep_last, keep):
        _discard(folders[old], report)


def _discard(folder: Path, report: Report) -> None:
    """Rename a folder so that it is not taken for a checkpoint, and delete it; report an error."""
    trash = folder
    try:
        if not folder.name.startswith("."):
            trash = folder.with_name(f".trash-{folder.name}")
            folder.rename(trash)
        trash.unlink() if trash.is_symlink() else shutil.rmtree(trash)
    except OSError as error:
        report(f"could not delete {trash}: {error}")
