"""The checkpoints of a run: which it goes on from, when it writes another, and which it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.storage.checkpoints import checkpoint_step, latest_checkpoint, list_checkpoints
from gpt_kit_hf.training.run_log import RunRecord
from gpt_kit_hf.training.state.checkpoint_writer import CheckpointWriter
from gpt_kit_hf.training.state.sharded_state import full_state, write_sharded_state
from gpt_kit_hf.training.state.training_state import SHARDS, training_state, write_position
from gpt_kit_hf.training.steps import Steps
from gpt_kit_hf.training.task import RunSetting, RunTask


def checkpoint_to_continue(run: Path, accelerator: Accelerator, report: Report) -> Path | None:
    """Return the checkpoint to go on from, or None; one process looks, so that all go on from the same.

    Raises CheckpointError if all are damaged, or the one could not be loaded safely.
    """
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found = [latest_checkpoint(run, report=report), None]
        except CheckpointError as error:
            found = [None, error]
    checkpoint, damaged = broadcast_object_list(found)
    if damaged is not None:
        raise damaged if accelerator.is_main_process else SystemExit(1)
    if checkpoint is None:
        return None
    check_model_folder(Path(checkpoint))
    return Path(checkpoint)


class RunCheckpoints:
    """Writes the checkpoints of a run, and knows those that are there.

    `scores` are the held-out losses that they are kept by, {step: loss}, in the main process.
    """

    def __init__(self, setting: RunSetting, task: RunTask, steps: Steps, record: RunRecord) -> None:
        self._folder, self._chosen, self._accelerator = setting.folder, setting.options, setting.accelerator
        self._task, self._steps, self._record, self._report = task, steps, record, setting.console.say
        self._writer = CheckpointWriter(
            setting.folder, keep_last=setting.options.save_total_limit, report=self._report, last=setting.checkpoint
        )
        self.scores: dict[int, float] = {}

    @property
    def last(self) -> Path | None:
        """The newest one that is whole; waits for one that is being written."""
        return self._writer.last

    def say_last(self) -> str:
        """Return which one is the newest, for the message of a run that ends early."""
        last = self.last
        return f"the last good checkpoint is {last.name}" if last else "there is no checkpoint yet"

    def wait(self) -> None:
        """Return when none is being written."""
        self._writer.wait()

    def save(self, *, must: bool) -> None:
        """Write that of this step; every process calls, the main one writes.

        If it `must` be, it is there on return, or CheckpointError raised. Else it may still be written then, and a
        failure is only said.
        """
        position = self._steps.position()
        if self._accelerator.is_fsdp2:
            self._save_shards(position, must=must)
        elif self._accelerator.is_main_process:
            try:
                self._save_whole(position, in_background=self._chosen.async_save and not must)
            except CheckpointError as error:
                if must:
                    raise
                self._say_failure(error)

    def best_steps(self) -> list[int]:
        """Return the steps whose checkpoints are kept for their held-out loss, the best first."""
        there = {checkpoint_step(folder) for folder in list_checkpoints(self._folder)} | {self._steps.step}
        ranked = sorted((loss, step) for step, loss in self.scores.items() if step in there)
        return [step for _, step in ranked[: self._chosen.keep_best]]

    def _save_whole(self, position: Mapping[str, Any], *, in_background: bool) -> None:
        self._writer.wait()  # or there would be two copies of everything
        state = training_state(self._task.model, self._steps.trainer, position, copied=in_background)

        def write(folder: Path) -> None:
            self._task.write_model(folder, state.weights)
            state.write(folder)

        self._record.flush()
        self._writer.save(
            self._steps.step,
            write,
            required_bytes=state.required_bytes,
            keep=self.best_steps(),
            in_background=in_background and state.own,
        )

    def _save_shards(self, position: dict[str, Any], *, must: bool) -> None:
        """Save a model that is cut: the main process says to which folder, all write their shards."""
        model, trainer = self._task.model, self._steps.trainer
        weights = full_state(model)
        failure: CheckpointError | None = None

        def write(folder: Path) -> None:
            self._task.write_model(folder, weights)
            write_position(folder, trainer, position)
            broadcast_object_list([folder / SHARDS, None])
            write_sharded_state(folder / SHARDS, model, trainer.optimizer.optimizer)

        if self._accelerator.is_main_process:
            try:
                self._record.flush()
                self._writer.save(
                    self._steps.step, write, required_bytes=0, keep=self.best_steps(), in_background=False
                )
            except CheckpointError as error:
                failure = error
            failed = broadcast_object_list([None, failure is not None])[1]
        else:
            while True:
                folder, failed = broadcast_object_list([None, None])
                if folder is None:
                    break
                with suppress(CheckpointError):  # the main process says it
                    write_sharded_state(folder, model, trainer.optimizer.optimizer)
        if failed and must:
            raise failure or SystemExit(1)
        if failure is not None:
            self._say_failure(failure)

    def _say_failure(self, error: CheckpointError) -> None:
        self._report(f"{error}; the run goes on, and keeps the checkpoints that it has")
