"""Saves checkpoints in a background thread, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.storage.checkpoints import save_checkpoint


class CheckpointWriter:
    """Saves the checkpoints of a run, in a background thread or in the calling one.

    The state must not change while it is written. A failed save is reported; the older checkpoints stay, and the run
    continues and saves again at its next save.
    """

    def __init__(
        self, run: Path, *, keep_last: int, report: Report, last: Path | None, check: Callable[[], None]
    ) -> None:
        self._run, self._keep_last, self._report, self._check = run, keep_last, report, check
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last = last

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint; waits for one that is being written."""
        self.wait()
        return self._last

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        required_bytes: int,
        keep: Collection[int],
        in_background: bool,
    ) -> None:
        """Start to write the checkpoint of a step, after the previous one; see `save_checkpoint`.

        If not `in_background`, the checkpoint is complete on return, or CheckpointError is raised.
        """
        self.wait()

        def run() -> None:
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
            except BaseException as error:
                self._failure = error

        if in_background:
            self._thread = threading.Thread(target=run, name=f"checkpoint-{step}")
            self._thread.start()
            return
        run()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

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
