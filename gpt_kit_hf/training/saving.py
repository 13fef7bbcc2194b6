"""The checkpoints of a run: which one it resumes from, when one is written, and which are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.storage.checkpoints import checkpoint_folder, checkpoint_step, latest_checkpoint, list_checkpoints
from gpt_kit_hf.storage.digests import FileDigest
from gpt_kit_hf.training.log.run_log import RunRecord
from gpt_kit_hf.training.state.checkpoint_writer import CheckpointWriter
from gpt_kit_hf.training.state.host_copies import HostCopies
from gpt_kit_hf.training.state.sharded_saves import ShardedSaves
from gpt_kit_hf.training.state.sharded_state import full_state, sharded_optimizer
from gpt_kit_hf.training.state.training_state import SHARDS, position_and_scale, training_state, write_position
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

    `scores` holds what the best ones are chosen by, {step: score}, on the main process; lower is better. `check`
    raises if this process may not write to the run any more.
    """

    def __init__(
        self, context: RunContext, task: Task, steps: Steps, record: RunRecord, check: Callable[[], None]
    ) -> None:
        self._folder, self._chosen, self._accelerator = context.folder, context.options, context.accelerator
        self._task, self._steps, self._record, self._log = task, steps, record, context.console.log
        self._shards = ShardedSaves() if self._accelerator.is_fsdp2 else None
        sharing = 1 if self._shards is None else self._shards.on_this_host
        self._copies = HostCopies(self._accelerator.device, self._log, sharing=sharing)
        self.writer = CheckpointWriter(
            context.folder,
            keep_last=context.options.save_total_limit,
            report=self._log,
            last=context.checkpoint,
            check=check,
            copy=self._copy,
        )
        self._remote, self._check = context.remote, check
        self.scores: dict[int, float] = {}

    def describe_last(self) -> str:
        """Return which checkpoint is the newest, for the message of a run that fails."""
        last = self.writer.last
        return f"the last good checkpoint is {last.name}" if last else "there is no checkpoint yet"

    def save(self, *, must: bool) -> None:
        """Write the checkpoint of this step, unless it was written already; every process calls.

        With `must` it is complete on return, or CheckpointError is raised. Without, it may be written in the
        background, and a failure is only logged.
        """
        position = self._steps.position()
        if self.writer.written == self._steps.step:
            return
        in_background = self._chosen.async_save and not must
        try:
            with self._steps.average.in_model():
                if self._shards is not None:
                    self._save_sharded(self._shards, position, in_background=in_background)
                elif self._accelerator.is_main_process:
                    self._save_whole(position, in_background=in_background)
        except CheckpointError as error:
            if must and self._accelerator.is_main_process:
                raise
            if must:
                raise SystemExit(1) from None  # the main process reports it
            self._log(f"{error}; training continues, and the older checkpoints are kept")

    def best_steps(self) -> list[int]:
        """Return the steps of the checkpoints that are kept for their score, the best first."""
        present = {checkpoint_step(folder) for folder in list_checkpoints(self._folder)} | {self._steps.step}
        if self._remote is not None:
            present |= self._remote.steps
        ranked = sorted((score, step) for step, score in self.scores.items() if step in present)
        return [step for _, step in ranked[: self._chosen.best_kept]]

    def evaluations_since_best(self, threshold: float = 0.0) -> int:
        """Return how many evaluations in a row have not been lower than the best before them by over a threshold."""
        best, count = math.inf, 0
        for step in sorted(self.scores.keys() - {0}):  # the one before training scores all samples
            if self.scores[step] < best - threshold:
                best, count = self.scores[step], 0
            else:
                count += 1
        return count

    def to_publish(self) -> int:
        """Return the step whose checkpoint is published, and fetch that from remote_dir if it is there only."""
        best = self.best_steps() if self._chosen.load_best_model_at_end else []
        step = best[0] if best else self._steps.step
        if self._remote is not None and not checkpoint_folder(self._folder, step).is_dir():
            self._remote.fetch(step)
        return step

    def finish_copy(self) -> None:
        """Upload what remote_dir lacks of the finished run; on the main process. Raises CheckpointError."""
        if self._remote is not None:
            self._check()
            self._remote.finish(self._steps.step)

    def _copy(self, step: int, keep: Collection[int]) -> None:
        if self._remote is not None:
            self._check()
            self._remote.update(step, keep_last=self._chosen.save_total_limit, keep=keep)

    def _save_whole(self, position: Mapping[str, Any], *, in_background: bool) -> None:
        copies = self._copies if in_background else None
        state = training_state(self._task.model, self._steps.trainer, position, copies)

        def write(folder: Path) -> None:
            self._task.write_model(folder, state.weights)
            state.write(folder)

        self._record.flush()
        self.writer.save(
            self._steps.step,
            write,
            required_bytes=state.required_bytes,
            keep=self.best_steps(),
            in_background=state.own,
        )

    def _save_sharded(self, shards: ShardedSaves, position: Mapping[str, Any], *, in_background: bool) -> None:
        """Save a sharded model: the main process writes the model, and every process its part of the optimizer."""
        trainer, step = self._steps.trainer, self._steps.step
        self._flush_together(shards)
        weights = full_state(self._task.model, trained_only=self._task.saves_trained_only)
        state = sharded_optimizer(self._task.model, trainer.optimizer.optimizer)
        copied = self._copies.copied(state.tensors) if in_background else None
        in_background = shards.all_agree(copied is not None)
        if copied is not None and in_background:
            state = replace(state, tensors=copied)
        if not self._accelerator.is_main_process:
            self.writer.help(step, lambda: shards.follow(state), in_background=in_background)
            return
        values = position_and_scale(trainer, position)

        def write(folder: Path) -> dict[str, FileDigest]:
            digests = shards.lead(folder / SHARDS, state)
            self._task.write_model(folder, weights)
            write_position(folder, values)
            return {f"{SHARDS}/{name}": digest for name, digest in digests.items()}

        self.writer.save(
            step, write, required_bytes=0, keep=self.best_steps(), in_background=in_background, after=shards.end
        )

    def _flush_together(self, shards: ShardedSaves) -> None:
        """Flush the record; raise CheckpointError in all processes if that fails in the main one."""
        failure = None
        if self._accelerator.is_main_process:
            try:
                self._record.flush()
            except CheckpointError as error:
                failure = error
        if not shards.all_agree(failure is None):
            raise failure or CheckpointError("the main process did not write its metrics")
