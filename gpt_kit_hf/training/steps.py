"""The steps of a run: the same batches, dropout and updates, however often the run is interrupted and resumed."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import multiprocessing.connection
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from gpt_kit_hf.data.order import BatchPlan
from gpt_kit_hf.errors import DataError, RunError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.run import OptionsOfRun
from gpt_kit_hf.training.optim.optimizer import create_optimizer, learning_rate_at, set_learning_rate
from gpt_kit_hf.training.runtime.available_memory import out_of_memory
from gpt_kit_hf.training.state.batch_digests import batch_digest, chained, content_digest, halves, joined
from gpt_kit_hf.training.state.training_state import restore_training_state
from gpt_kit_hf.training.task import RunContext, Task
from gpt_kit_hf.training.trainer import AMPTrainer, UpdateReport

# The spike limit is a multiple of the median of the last so many gradient norms; a tenth of them must be known.
_NORMS = 100
# A step that has taken longer is abandoned when the run is asked to stop: schedulers kill a job after a grace period.
_SECONDS_TO_FINISH = 2.0


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step did, and whether a process was asked to stop meanwhile.

    `batch` is the digest of the global batch, `chain` that of all batches up to it (`state.batch_digests`).
    """

    update: UpdateReport
    learning_rate: float
    batch: str
    chain: str
    stop: bool


class BatchError(DataError):
    """A batch that the model cannot compute; the message says why."""


class _AbandonedError(Exception):
    """The run is asked to stop, and the step would take long."""


class Steps:
    """Computes the steps of a run one by one and holds its position: the number of steps done, `step`."""

    def __init__(self, options: OptionsOfRun, context: RunContext, task: Task) -> None:
        self.task, self._context = task, context
        self._options, self._chosen, self._accelerator = options, options.training, context.accelerator
        self._alone = self._accelerator.num_processes == 1
        batch_size, processes = self._chosen.batch_size, self._accelerator.num_processes
        self.plan = BatchPlan(
            order=task.order,
            batch_size=batch_size,
            micro_batch_size=self._chosen.per_device_train_batch_size or -(-batch_size // processes),
            num_processes=processes,
            process_index=self._accelerator.process_index,
        )
        epochs = self._chosen.num_train_epochs or 1.0
        self.total = self._chosen.max_steps or max(1, math.ceil(epochs * task.order.samples / self.plan.batch_size))
        if self._chosen.gradient_checkpointing:
            # Newer versions of transformers renamed the method, and warn under the old name.
            renamed = hasattr(task.model, "activation_checkpointing_enable")
            (task.model.activation_checkpointing_enable if renamed else task.model.gradient_checkpointing_enable)()
        self.trainer = AMPTrainer(
            task.model,
            create_optimizer(task.model, options.optimizer),
            mixed_precision=self._chosen.mixed_precision,
            max_grad_norm=options.optimizer.max_grad_norm or None,
            accelerator=self._accelerator,
        )
        self.step = 0
        self.skipped_in_a_row = 0
        self._chain = ""
        self._norms: list[float] = []
        self._data_position: Any = None
        self._splits = 1  # into which each micro-batch is cut, after running out of memory
        self._batches: Iterator[Batch] = iter(())
        self._loaders: list[Any] = []  # the DataLoader's processes

    def restore(self, checkpoint: Path) -> None:
        """Restore optimizer and position from a checkpoint; the model has its weights already."""
        position = restore_training_state(checkpoint, self.task.model, self.trainer)
        self.step, self.skipped_in_a_row = position["step"], position["skipped_in_a_row"]
        self._chain, self._norms = position["chain"], list(position["recent_norms"])
        self._data_position = position["data_position"]

    def begin(self, last: int | None = None) -> None:
        """Start reading the batches of the steps up to `last`, by default all."""
        self._batches = self.task.batches(self.plan, self.step, last or self.total, self._data_position)

    def position(self) -> dict[str, Any]:
        """Return the position for `restore`; every process calls, between two steps."""
        if not self._alone:
            self._data_position = self.task.position()
        return {
            "step": self.step,
            "corpus": self.task.fingerprint,
            "data_position": self._data_position,
            "skipped_in_a_row": self.skipped_in_a_row,
            "recent_norms": list(self._norms),
            "chain": self._chain,
        }

    def take(self) -> StepReport | None:
        """Compute the next step; return None if the run is asked to stop before the weights are updated.

        Raises RunError if the step runs out of memory, BatchError for token ids outside the vocabulary, and what
        reading the batch raises.
        """
        began = time.perf_counter()
        if self._alone and self._context.stop.asked():
            return None
        if self._chosen.dataloader_num_workers:
            self._loaders = multiprocessing.active_children()
        micro_batches = [next(self._batches) for _ in range(self.plan.micro_steps)]
        self._check_ids(micro_batches)
        rate = learning_rate_at(self.step, self.total, self._options.optimizer)
        set_learning_rate(self.trainer.optimizer, rate)
        try:
            update = self._update(micro_batches, began)
        except _AbandonedError:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            return None
        content, stop = self._sum_over_processes(content_digest(micro_batches))
        batch = batch_digest(self.plan.sample_ids(self.step), content)
        self._chain = chained(self._chain, batch)
        self.step += 1
        self.skipped_in_a_row = 0 if update.skipped is None else self.skipped_in_a_row + 1
        if math.isfinite(update.grad_norm):
            self._norms = [*self._norms, update.grad_norm][-_NORMS:]
        if self._alone:  # several processes would have to communicate: they do so when the position is saved
            self._data_position = self.task.position()
        return StepReport(update=update, learning_rate=rate, batch=batch, chain=self._chain, stop=stop)

    def loader_ended(self) -> bool:
        """Return whether a DataLoader process has ended since the step began, or ends within a second."""
        return bool(multiprocessing.connection.wait([loader.sentinel for loader in self._loaders], timeout=1.0))

    # --- inside a step

    def _check_ids(self, micro_batches: Sequence[Batch]) -> None:
        """Raise BatchError for ids outside the vocabulary, which on a GPU end in a device-side assert."""
        size = self.task.model.config.get_text_config().vocab_size
        for batch in micro_batches:
            outside = batch.input_ids[(batch.input_ids < 0) | (batch.input_ids >= size)]
            if len(outside):
                raise BatchError(f"input_ids must lie between 0 and {size - 1} (vocab_size={size}), got {outside[0]}")

    def _update(self, micro_batches: Sequence[Batch], began: float) -> UpdateReport:
        """Update the weights; after running out of memory again, with micro-batches half as large."""
        while True:
            chunks = [chunk for batch in micro_batches for chunk in _split(batch, self._splits)]

            def before(index: int, count: int = len(chunks)) -> None:
                self._before_micro_batch(index, count, began)

            try:
                return self.trainer.update(chunks, before_micro_batch=before, spike_limit=self._spike_limit())
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._refuse_halving(max(len(chunk.input_ids) for chunk in chunks))
            # Outside of the handler, where the error no longer holds the tensors of the failed attempt.
            self.trainer.optimizer.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            self._splits *= 2
            self._context.console.log(
                f"step {self.step + 1} ran out of memory: continuing with micro-batches 1/{self._splits} as large"
            )

    def _refuse_halving(self, size: int) -> None:
        """Raise RunError if micro-batches of this size cannot, or by the options must not, be halved."""
        what = f"step {self.step + 1} ran out of memory with micro-batches of {size}"
        if size == 1:
            raise RunError(f"{what}: lower max_length or the size of the model")
        if self._chosen.out_of_memory == "stop" or not self._alone:
            # Processes wait for each other in a backward pass: one alone cannot repeat it.
            raise RunError(f"{what}: continue with --resume --per_device_train_batch_size {max(1, size // 2)}")

    def _before_micro_batch(self, index: int, count: int, began: float) -> None:
        """Seed dropout by (seed, step, micro-batch), so that a checkpoint needs no random state."""
        late = time.perf_counter() - began > _SECONDS_TO_FINISH
        if self._alone and late and self._context.stop.asked():
            raise _AbandonedError
        place = self._accelerator.process_index * count + index
        digest = hashlib.sha256(f"{self._chosen.seed} {self.step} {place}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        if self._accelerator.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed walks the stack for each other device
        else:
            torch.manual_seed(seed)

    def _spike_limit(self) -> float:
        if not self._chosen.spike_factor or len(self._norms) < _NORMS // 10:
            return math.inf
        return self._chosen.spike_factor * statistics.median(self._norms)

    def _sum_over_processes(self, content: int) -> tuple[int, bool]:
        """Return the content digest of the global batch, and whether any process was asked to stop."""
        stop = self._context.stop.asked()
        if self._alone:
            return content, stop
        own = torch.tensor([*halves(content), int(stop)], device=self._accelerator.device)
        low, high, stops = self._accelerator.reduce(own, reduction="sum").tolist()
        return joined(low, high), stops > 0


def _split(batch: Batch, count: int) -> list[Batch]:
    """Return the batch in `count` chunks, or in single rows if it has fewer."""
    count = min(count, len(batch.input_ids))
    columns = [[None] * count if column is None else column.tensor_split(count) for column in batch]
    return [Batch(*chunk) for chunk in zip(*columns, strict=True)]
