"""Saves checkpoints in a background thread, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.storage.checkpoints import Write, save_checkpoint


class CheckpointWriter:
    """Saves the checkpoints of a run, in a background thread or in the calling one.

    The state must not change while it is written. A failed save is reported; the older checkpoints stay, and the run
    continues and saves again at its next save. Of several processes one calls `save`, the others `help`. `copy` is
    called after each checkpoint, in the thread that wrote it, with its step and the steps in `keep`.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep_last: int,
        report: Report,
        last: Path | None,
        check: Callable[[], None],
        copy: Callable[[int, Collection[int]], None],
    ) -> None:
        self._copy = copy
        self._run, self._keep_last, self._report, self._check = run, keep_last, report, check
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last = last
        self._written: int | None = None

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint; waits for one that is being written."""
        self.wait()
        return self._last

    @property
    def written(self) -> int | None:
        """The step of the last checkpoint that was written here; waits for one that is being written."""
        self.wait()
        return self._written

    def save(
        self,
        step: int,
        write: Write,
        *,
        required_bytes: int,
        keep: Collection[int],
        in_background: bool,
        after: Callable[[bool], None] = lambda written: None,
    ) -> None:
        """Start to write the checkpoint of a step, after the previous one; see `save_checkpoint`.

        If not `in_background`, the checkpoint is complete on return, or CheckpointError is raised. `after` is called
        at the end, with whether it was written.
        """

        def run() -> None:
            written = False
            try:
                self._last = save_checkpoint(
                    self._run,
                    step,
                    write,
                    keep_last=self._keep_last,
                    keep=keep,
                    check=self._check,
                    required_bytes=required_bytes,
                    report=self._report,
                )
                written = True
            finally:
                after(written)
            self._copy(step, keep)

        self._do(step, run, in_background)

    def help(self, step: int, run: Callable[[], None], *, in_background: bool) -> None:
        """Take part in a save of the main process, likewise; `run` raises CheckpointError if that fails."""
        self._do(step, run, in_background)

    def wait(self) -> None:
        """Wait for the background thread; report a CheckpointError of it, raise any other exception."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if isinstance(failure, CheckpointError):
            self._report(f"{failure}; training continues, and the older checkpoints are kept")
        elif failure is not None:
            raise failure

    def _do(self, step: int, run: Callable[[], None], in_background: bool) -> None:
        self.wait()

        def attempt() -> None:
            try:
                run()
                self._written = step
            except BaseException as error:
                self._failure = error

        if in_background:
            self._thread = threading.Thread(target=attempt, name=f"checkpoint-{step}")
            self._thread.start()
            return
        attempt()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
