"""The checkpoints of a run: which one it resumes from, when one is written, and which are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.storage.checkpoints import checkpoint_step, latest_checkpoint, list_checkpoints
from gpt_kit_hf.training.log.run_log import RunRecord
from gpt_kit_hf.training.state.checkpoint_writer import CheckpointWriter
from gpt_kit_hf.training.state.sharded_state import full_state, write_sharded_state
from gpt_kit_hf.training.state.training_state import SHARDS, training_state, write_position
from gpt_kit_hf.training.steps import Steps
from gpt_kit_hf.training.task import RunContext, Task, decide_on_main


def checkpoint_to_resume(run: Path, accelerator: Accelerator, log: Report) -> Path | None:
    """Return the checkpoint to resume from, or None; the main process chooses it for all.

    Raises CheckpointError if all are damaged, or if the newest intact one could not be loaded safely.
    """
    checkpoint = decide_on_main(accelerator, lambda: latest_checkpoint(run, report=log))
    if checkpoint is not None:
        check_model_folder(checkpoint)
    return checkpoint


class RunCheckpoints:
    """Writes the checkpoints of a run and decides which are kept.

    `scores` holds the eval losses that the best ones are chosen by, {step: loss}, on the main process. `check` raises
    if this process may not write to the run any more.
    """

    def __init__(
        self, context: RunContext, task: Task, steps: Steps, record: RunRecord, check: Callable[[], None]
    ) -> None:
        self._folder, self._chosen, self._accelerator = context.folder, context.options, context.accelerator
        self._task, self._steps, self._record, self._log = task, steps, record, context.console.log
        self.writer = CheckpointWriter(
            context.folder,
            keep_last=context.options.save_total_limit,
            report=self._log,
            last=context.checkpoint,
            check=check,
        )
        self.scores: dict[int, float] = {}

    def describe_last(self) -> str:
        """Return which checkpoint is the newest, for the message of a run that fails."""
        last = self.writer.last
        return f"the last good checkpoint is {last.name}" if last else "there is no checkpoint yet"

    def save(self, *, must: bool) -> None:
        """Write the checkpoint of this step; every process calls.

        With `must` it is complete on return, or CheckpointError is raised. Without, it may be written in the
        background, and a failure is only logged.
        """
        position = self._steps.position()
        try:
            if self._accelerator.is_fsdp2:
                self._save_shards(position)
            elif self._accelerator.is_main_process:
                self._save_whole(position, in_background=self._chosen.async_save and not must)
        except CheckpointError as error:
            if must and self._accelerator.is_main_process:
                raise
            if must:
                raise SystemExit(1) from None  # the main process reports it
            self._log(f"{error}; training continues, and the older checkpoints are kept")

    def best_steps(self) -> list[int]:
        """Return the steps of the checkpoints that are kept for their eval loss, the best first."""
        present = {checkpoint_step(folder) for folder in list_checkpoints(self._folder)} | {self._steps.step}
        ranked = sorted((loss, step) for step, loss in self.scores.items() if step in present)
        return [step for _, step in ranked[: self._chosen.keep_best]]

    def _save_whole(self, position: Mapping[str, Any], *, in_background: bool) -> None:
        self.writer.wait()  # else there could be two copies of the state in memory
        state = training_state(self._task.model, self._steps.trainer, position, copied=in_background)

        def write(folder: Path) -> None:
            self._task.write_model(folder, state.weights)
            state.write(folder)

        self._write(write, required_bytes=state.required_bytes, in_background=in_background and state.own)

    def _save_shards(self, position: Mapping[str, Any]) -> None:
        """Save a sharded model: the main process announces the folder, and every process writes its shards there.

        Raises CheckpointError in all processes if the main one fails.
        """
        model, trainer = self._task.model, self._steps.trainer
        weights = full_state(model)

        def write(folder: Path) -> None:
            self._task.write_model(folder, weights)
            write_position(folder, trainer, position)
            broadcast_object_list([folder / SHARDS, None])
            write_sharded_state(folder / SHARDS, model, trainer.optimizer.optimizer)

        if not self._accelerator.is_main_process:
            while True:
                folder, failed = broadcast_object_list([None, None])
                if folder is None:
                    break
                with suppress(CheckpointError):  # the main process reports it
                    write_sharded_state(folder, model, trainer.optimizer.optimizer)
            if failed:
                raise CheckpointError("the main process did not write the checkpoint")
            return
        failure = None
        try:
            self._write(write, required_bytes=0, in_background=False)
        except CheckpointError as error:
            failure = error
        broadcast_object_list([None, failure is not None])
        if failure is not None:
            raise failure

    def _write(self, write: Callable[[Path], None], *, required_bytes: int, in_background: bool) -> None:
        self._record.flush()
        self.writer.save(
            self._steps.step, write, required_bytes=required_bytes, keep=self.best_steps(), in_background=in_background
        )
