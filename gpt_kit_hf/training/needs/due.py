"""What a run does between its steps besides training, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt_kit_hf.options.training import Intervals, TrainingOptions

_LOGGED_BYTES = 500  # of the lines of metrics.jsonl of a step


@dataclass(frozen=True, kw_only=True)
class Due:
    """Which evaluations, samples and checkpoints are due after which of `total` steps.

    `evaluates_saved` says whether each checkpoint is evaluated, as the best ones are kept.
    """

    every: Intervals
    total: int
    eval_before_training: bool
    evaluates_saved: bool

    def evaluation(self, step: int) -> bool:
        """Return whether there is an evaluation between this step and the next."""
        if step == 0:
            return self.eval_before_training
        saved_as_best = self.evaluates_saved and self.saving(step)
        return step < self.total and (step % self.every.evaluation == 0 or saved_as_best)

    def sample(self, step: int) -> bool:
        """Return whether there is a text sample between this step and the next."""
        return step > 0 and self.every.sample > 0 and step % self.every.sample == 0

    def saving(self, step: int) -> bool:
        """Return whether a checkpoint is written between this step and the next."""
        return step % self.every.saving == 0

    def evaluations_after(self, step: int) -> int:
        """Return the number of evaluations after this step and before the last one."""
        evaluation, saving = self.every.evaluation, self.every.saving
        found = len(_multiples(evaluation, step, self.total))
        if self.evaluates_saved:  # those of checkpoints, too, but for steps that are among both
            both = math.lcm(evaluation, saving)
            found += len(_multiples(saving, step, self.total)) - len(_multiples(both, step, self.total))
        return found

    def samples_after(self, step: int) -> int:
        """Return the number of samples after this step and before the last one."""
        return len(_multiples(self.every.sample, step, self.total)) if self.every.sample else 0

    def saves_after(self, step: int) -> int:
        """Return the number of checkpoints after this step, with that of the last one."""
        return len(_multiples(self.every.saving, step, self.total)) + (step < self.total)


def due_in(chosen: TrainingOptions, total: int, *, eval_before_training: bool) -> Due:
    """Return what is due in a run of so many steps with these options."""
    return Due(
        every=chosen.intervals(total),
        total=total,
        eval_before_training=eval_before_training,
        evaluates_saved=chosen.best_kept > 0,
    )


def disk_bytes(
    chosen: TrainingOptions, due: Due, *, checkpoint: int, published: int, done: int = 0, there: int = 0
) -> int:
    """Return by how many bytes the files of a run grow at most after `done` steps.

    `checkpoint` are the bytes of a checkpoint, of which `there` exist, and `published` those of the model.
    """
    most = chosen.save_total_limit + chosen.best_kept + 1  # one more while it is written
    new = max(0, min(there + due.saves_after(done), most) - there)
    return new * checkpoint + published + (due.total - done) * _LOGGED_BYTES


def _multiples(interval: int, after: int, before: int) -> range:
    return range((after // interval + 1) * interval, before, interval)
