"""The copy of a run below a URL, on an object store or any other file system of fsspec.

    URL/options.json, metrics.jsonl, run.json, and the published model when the run is finished
    URL/checkpoints/step-00000200/      as in the run folder

The record of a run is uploaded before a checkpoint that it covers, and a checkpoint's manifest as its last file: a
checkpoint with a manifest is complete, and the run can continue from it. No lock reaches other machines through an
object store, so a URL is for one run at a time.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import Report, load_json, parse_object, replace_file, sync_path
from gpt_kit_hf.storage.checkpoints import (
    MANIFEST,
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    read_manifest,
    save_checkpoint,
    superseded,
)
from gpt_kit_hf.storage.digests import FileDigest, digest_of
from gpt_kit_hf.storage.file_systems import file_system_errors, file_system_of
from gpt_kit_hf.storage.lock import RunLock
from gpt_kit_hf.storage.run_folder import ADAPTER_FOLDER, LOCK_FILE, METRICS_FILE, OPTIONS_FILE, RECORD_FILE

# run.json is the last: with its results, it says that the rest of a finished run is there.
_RECORD = (OPTIONS_FILE, METRICS_FILE, RECORD_FILE)
_ALL = 10**9  # checkpoints: none is deleted


class _DamagedError(Exception):
    """A remote checkpoint that is not as it was uploaded."""


class RemoteRun:
    """Uploads the run in a folder to a URL, and fetches it from there; on the main process, one call at a time.

    `prepare` comes first. `report` gets a line for what was fetched, what was not used, and each failed upload.
    """

    def __init__(self, url: str, run: Path, report: Report) -> None:
        self._url, self._run, self._report = url.rstrip("/"), run, report
        self.steps: set[int] = set()  # of the complete checkpoints below the URL
        self._uploaded: set[int] = set()  # of those that are equal to the ones in the run folder
        self._damaged: set[int] = set()

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Look at what is below the URL; with `resume`, fetch the run if the folder is missing or older.

        Raises UsageError if another run is there, and if a new one would begin where one is, except with `overwrite`;
        CheckpointError if the file system fails, or has complete checkpoints of which none is intact.
        """
        with self._errors("read"):
            self.steps = self._complete_steps()
            record = self._content(RECORD_FILE)
        if (self.steps or record is not None) and not (resume or overwrite):
            raise UsageError(f"remote_dir {self._url!r} already holds a run: use resume, overwrite or another URL")
        if resume:
            self._check_same_run(record)
            self._fetch()

    def move_aside(self) -> str | None:
        """Move what is below the URL to URL.replaced-1, or the next free number, and return that; None if it is empty.

        Raises CheckpointError if the file system fails.
        """
        with self._errors("moved"):
            if not self._names(self._root):
                return None
            endings = (f".replaced-{number}" for number in itertools.count(1))
            ending = next(ending for ending in endings if not self._names(self._root + ending))
            self._system.mv(self._root, self._root + ending, recursive=True)
        self.steps = set()
        return self._url + ending

    def update(self, step: int, *, keep_last: int, keep: Collection[int]) -> None:
        """Upload the checkpoints up to this step, then delete old ones as `save_checkpoint` does; report a failure."""
        try:
            with self._errors("written"):
                self._upload_record()
                self._upload_checkpoints(step)
                for old in superseded(self.steps, step, keep_last, keep):
                    self._remove(old)
        except CheckpointError as error:
            self._report(f"{error}; it is tried again at the next checkpoint, and nothing in {self._run} is lost")

    def finish(self, step: int) -> None:
        """Upload the model of the finished run, and what is missing; nothing if all is there.

        Raises CheckpointError if that fails.
        """
        with file_system_errors(
            f"{self._run} is complete, but remote_dir {self._url!r} cannot be written (resume to try it again)",
            CheckpointError,
        ):
            if self._content(RECORD_FILE) == (self._run / RECORD_FILE).read_bytes():
                return
            self._upload_checkpoints(step)
            files = [*self._run.iterdir(), *(self._run / ADAPTER_FOLDER).rglob("*")]
            for file in sorted(files):
                if file.is_file() and not file.name.startswith(".") and file.name not in (LOCK_FILE, *_RECORD):
                    self._put(file, f"{self._root}/{file.relative_to(self._run).as_posix()}")
            self._upload_record()

    # --- the file system

    @cached_property
    def _system(self) -> Any:
        return file_system_of(self._url, "remote_dir")[0]

    @cached_property
    def _root(self) -> str:
        return file_system_of(self._url, "remote_dir")[1].rstrip("/")

    def _errors(self, done: str) -> AbstractContextManager[None]:
        return file_system_errors(f"remote_dir {self._url!r} cannot be {done}", CheckpointError)

    def _folder(self, step: int) -> str:
        return f"{self._root}/checkpoints/step-{step:08d}"

    def _names(self, folder: str) -> set[str]:
        """Return the names in a folder; none if it is missing. `exists` and `isdir` take any error for that."""
        self._system.invalidate_cache()
        try:
            return {posixpath.basename(path.rstrip("/")) for path in self._system.ls(folder, detail=False)}
        except FileNotFoundError:
            return set()

    def _content(self, name: str) -> bytes | None:
        try:
            return bytes(self._system.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def _complete_steps(self) -> set[int]:
        steps = set()
        for name in sorted(self._names(f"{self._root}/checkpoints")):
            with suppress(CheckpointError):  # another name
                step = checkpoint_step(Path(name))
                if MANIFEST in self._names(self._folder(step)):
                    steps.add(step)
                else:
                    self._report(f"{name} in {self._url} was not uploaded completely and is not used")
        return steps

    # --- fetching

    def _check_same_run(self, record: bytes | None) -> None:
        local = self._run / RECORD_FILE
        if record is None or not local.is_file():
            return
        if parse_object(record, f"{self._url}/{RECORD_FILE}").get("run_id") != load_json(local).get("run_id"):
            raise UsageError(
                f"remote_dir {self._url!r} holds another run than output_dir {str(self._run)!r}: name another URL, or "
                "resume that run in a new output_dir"
            )

    def _fetch(self) -> None:
        """Fetch the record and the newest intact checkpoint, if it is newer than those of the run folder."""
        here = None
        with suppress(CheckpointError):  # all are damaged
            here = latest_checkpoint(self._run, report=lambda line: None)
        newer = sorted((step for step in self.steps if here is None or step > checkpoint_step(here)), reverse=True)
        if not newer:
            return
        with RunLock(self._run, report=self._report):
            for name in _RECORD:
                with self._errors("read"):
                    content = self._content(name)
                if content is not None:
                    replace_file(self._run / name, content)
            for step in newer:
                try:
                    self._fetch_checkpoint(step)
                except _DamagedError as error:
                    self._damaged.add(step)
                    self.steps.discard(step)
                    self._report(f"step-{step:08d} in {self._url} is damaged and not used: {error}")
                else:
                    self._report(f"fetched step-{step:08d} from {self._url}")
                    return
        if here is None:
            raise CheckpointError(f"none of the {len(newer)} complete checkpoints in {self._url} is intact")

    def fetch(self, step: int) -> None:
        """Fetch a checkpoint that the run folder lacks. Raises CheckpointError if it is damaged."""
        try:
            self._fetch_checkpoint(step)
        except _DamagedError as error:
            raise CheckpointError(f"step-{step:08d} in {self._url} is damaged: {error}") from error

    def _fetch_checkpoint(self, step: int) -> None:
        expected = self._remote_files(step)

        def write(stage: Path) -> Mapping[str, FileDigest]:
            for name, digest in expected.items():
                target = stage / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._get(f"{self._folder(step)}/{name}", target)
                if digest_of(target) != digest:
                    raise _DamagedError(f"{name} has changed: its size or SHA-256 differs")
                sync_path(target)
            return expected

        size = sum(digest.size for digest in expected.values())
        save_checkpoint(self._run, step, write, keep_last=_ALL, required_bytes=size, report=self._report)

    def _remote_files(self, step: int) -> dict[str, FileDigest]:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / f"step-{step:08d}"
            folder.mkdir()
            self._get(f"{self._folder(step)}/{MANIFEST}", folder / MANIFEST)
            try:
                return read_manifest(folder)
            except CheckpointError as error:
                raise _DamagedError(f"{MANIFEST}: {error}") from None

    def _get(self, path: str, target: Path) -> None:
        with self._errors("read"):
            try:
                self._system.get_file(path, str(target))
                return
            except FileNotFoundError:
                pass
        raise _DamagedError(f"{target.name} is missing")

    # --- uploading

    def _upload_record(self) -> None:
        for name in _RECORD:
            if (self._run / name).is_file():
                # On a file system that is no object store, a file could be cut off in its upload.
                part = f"{self._root}/{name}.part"
                self._put(self._run / name, part)
                self._system.mv(part, f"{self._root}/{name}")

    def _upload_checkpoints(self, step: int) -> None:
        for folder in reversed(list_checkpoints(self._run)):
            if checkpoint_step(folder) <= step and not self._is_there(folder):
                self._upload(folder)

    def _is_there(self, folder: Path) -> bool:
        step = checkpoint_step(folder)
        if step in self.steps - self._uploaded:
            with suppress(CheckpointError):  # an invalid manifest
                content = self._content(f"checkpoints/{folder.name}/{MANIFEST}")
                if content is not None and parse_object(content, folder.name) == load_json(folder / MANIFEST):
                    self._uploaded.add(step)
        return step in self._uploaded

    def _upload(self, folder: Path) -> None:
        step = checkpoint_step(folder)
        if step in self.steps | self._damaged or self._names(self._folder(step)):
            self._remove(step)
        for name in (*read_manifest(folder), MANIFEST):
            self._put(folder / name, f"{self._folder(step)}/{name}")
        self.steps.add(step)
        self._uploaded.add(step)

    def _put(self, file: Path, path: str) -> None:
        try:
            self._system.put_file(str(file), path)
        except FileNotFoundError:
            # A file system with folders. An object store has none, and may not allow to look for the bucket.
            self._system.makedirs(posixpath.dirname(path), exist_ok=True)
            self._system.put_file(str(file), path)

    def _remove(self, step: int) -> None:
        """Delete a checkpoint, its manifest first, so that what is left of it is not taken for one."""
        folder = self._folder(step)
        if MANIFEST in self._names(folder):
            self._system.rm(f"{folder}/{MANIFEST}")
        for steps in (self.steps, self._uploaded, self._damaged):
            steps.discard(step)
        if self._names(folder):
            self._system.rm(folder, recursive=True)
