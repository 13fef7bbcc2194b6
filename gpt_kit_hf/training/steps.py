"""The steps of a run: the same batches, dropout and updates, however often the run is interrupted and resumed."""

from __future__ import annotations

import hashlib
import itertools
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
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.training.optim.optimizer import create_optimizer, learning_rate_at, set_learning_rate
from gpt_kit_hf.training.optim.weight_average import WeightAverage
from gpt_kit_hf.training.runtime.available_memory import out_of_memory
from gpt_kit_hf.training.runtime.determinism import computing_facts
from gpt_kit_hf.training.state.batch_digests import batch_digest, chained, content_digest, halves, joined
from gpt_kit_hf.training.state.training_state import restore_training_state
from gpt_kit_hf.training.task import RunContext, Task, joined_position
from gpt_kit_hf.training.trainer import AMPTrainer, UpdateReport

# The spike limit is a multiple of the median of the last so many gradient norms; a tenth of them must be known.
_NORMS = 100
_IDS_SHOWN = 8  # sample ids in the message about a batch
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


@dataclass(kw_only=True)
class _Fetched:
    """The batches of a process for a step and the position after them, or the error that reading them raised.

    `trained_tokens` is their number in the batches of all processes, None if not known yet.
    """

    micro_batches: Sequence[Batch] = ()
    own_tokens: int = 0
    trained_tokens: int | None = None
    position: Any = None
    error: Exception | None = None


def total_steps(options: TrainingOptions, samples: int) -> int:
    """Return the length of a run on so many samples."""
    epochs = options.num_train_epochs or 1.0
    return options.max_steps or max(1, math.ceil(epochs * samples / options.batch_size))


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
        self.total = total_steps(self._chosen, task.order.samples)
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
        decay = options.optimizer.ema_decay
        self.average = WeightAverage(task.model, self.trainer.optimizer.optimizer, decay)
        self.step = 0
        self.skipped_in_a_row = 0
        self._chain = ""
        self._norms: list[float] = []
        self._data_position: Any = None
        # Into how many parts each micro-batch is cut, after running out of memory: it changes rounding and dropout.
        self.splits = 1
        self._batches: Iterator[Batch] = iter(())
        self._next: _Fetched | None = None  # the batches of the next step
        self._loaders: list[Any] = []  # the DataLoader's processes

    def restore(self, checkpoint: Path) -> None:
        """Restore optimizer and position from a checkpoint; the model has its weights already."""
        position = restore_training_state(checkpoint, self.task.model, self.trainer)
        self.average.exchange()
        self.step, self.skipped_in_a_row = position["step"], position["skipped_in_a_row"]
        self._chain, self._norms = position["chain"], list(position["recent_norms"])
        self._data_position = position["data_position"]
        size, splits = position["micro_batch"]
        # Else the run was asked to go on with micro-batches of another size.
        self.splits = splits if size == self.plan.micro_batch_size else 1

    @property
    def micro_batch_size(self) -> int:
        """The largest number of rows that are computed at once, after the cuts."""
        return -(-self.plan.micro_batch_size // self.splits)

    def begin(self, last: int | None = None) -> None:
        """Start reading the batches of the steps up to `last`, by default all."""
        self._batches = self.task.batches(self.plan, self.step, last or self.total, self._data_position)
        self._next = None

    def computing_facts(self, *, compiled: bool) -> dict[str, Any]:
        """Return what the bits of the steps depend on, for run.json."""
        return computing_facts(
            self.task.model,
            self._accelerator.device,
            processes=self._accelerator.num_processes,
            micro_batch_size=self.plan.micro_batch_size,
            precision=self.trainer.precision,
            compiled=compiled,
        )

    def position(self) -> dict[str, Any]:
        """Return the position for `restore`; every process calls, between two steps."""
        return {
            "step": self.step,
            "corpus": self.task.fingerprint,
            "data_position": joined_position(self._data_position),
            "skipped_in_a_row": self.skipped_in_a_row,
            "recent_norms": list(self._norms),
            "chain": self._chain,
            "micro_batch": [self.plan.micro_batch_size, self.splits],
        }

    def take(self) -> StepReport | None:
        """Compute the next step; return None if the run is asked to stop before the weights are updated.

        Raises RunError if the step runs out of memory, BatchError for token ids outside the vocabulary, and what
        reading the batch raises.
        """
        began = time.perf_counter()
        if self._alone and self._context.stop.asked():
            return None
        fetched = self._fetch() if self._next is None else self._next
        if fetched.error is not None:
            raise fetched.error
        self._next = None
        rate = learning_rate_at(self.step, self.total, self._options.optimizer)
        set_learning_rate(self.trainer.optimizer, rate)
        try:
            update = self._update(fetched, began)
        except _AbandonedError:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            return None
        if update.skipped is None:
            self.average.update(self.step)
        assert self._next is not None  # fetched by _meanwhile
        low, high, stops, self._next.trained_tokens = update.sums
        batch = batch_digest(self.plan.sample_ids(self.step), joined(low, high))
        self._chain = chained(self._chain, batch)
        self.step += 1
        self.skipped_in_a_row = 0 if update.skipped is None else self.skipped_in_a_row + 1
        if math.isfinite(update.grad_norm):
            self._norms = [*self._norms, update.grad_norm][-_NORMS:]
        self._data_position = fetched.position
        return StepReport(update=update, learning_rate=rate, batch=batch, chain=self._chain, stop=stops > 0)

    def samples(self, step: int) -> str:
        """Return the sample ids of a step, counted from 1, for a message."""
        ids = self.plan.sample_ids(step - 1).tolist()
        return ", ".join(map(str, ids[:_IDS_SHOWN])) + (", ..." if len(ids) > _IDS_SHOWN else "")

    def loader_ended(self) -> bool:
        """Return whether a DataLoader process has ended since the step began, or ends within a second."""
        return bool(multiprocessing.connection.wait([loader.sentinel for loader in self._loaders], timeout=1.0))

    # --- inside a step

    def _fetch(self) -> _Fetched:
        """Read this process's batches of the next step, none after the last; an error is kept for that step."""
        if self._chosen.dataloader_num_workers:
            self._loaders = multiprocessing.active_children()
        try:
            micro_batches = list(itertools.islice(self._batches, self.plan.micro_steps))
            self._check_ids(micro_batches)
        except Exception as error:
            return _Fetched(error=error)
        own = self.trainer.count_trained_tokens(micro_batches)
        return _Fetched(
            micro_batches=micro_batches,
            own_tokens=own,
            trained_tokens=own if self._alone else None,
            position=self.task.position(),
        )

    def _meanwhile(self, micro_batches: Sequence[Batch]) -> tuple[int, ...]:
        """Fetch the next step's batches, while a GPU computes this step's; return what is summed over processes.

        These are the content digest in halves, whether to stop, and the trained tokens of the next step.
        """
        if self._next is None:  # else the step is repeated
            self._next = self._fetch()
        return *halves(content_digest(micro_batches)), int(self._context.stop.asked()), self._next.own_tokens

    def _check_ids(self, micro_batches: Sequence[Batch]) -> None:
        """Raise BatchError for ids outside the vocabulary, which on a GPU end in a device-side assert."""
        size = self.task.model.config.get_text_config().vocab_size
        for batch in micro_batches:
            outside = batch.input_ids[(batch.input_ids < 0) | (batch.input_ids >= size)]
            if len(outside):
                raise BatchError(f"input_ids must lie between 0 and {size - 1} (vocab_size={size}), got {outside[0]}")

    def _update(self, fetched: _Fetched, began: float) -> UpdateReport:
        """Update the weights; after running out of memory again, with micro-batches half as large."""
        while True:
            chunks = [chunk for batch in fetched.micro_batches for chunk in _split(batch, self.splits)]

            def before(index: int, count: int = len(chunks)) -> None:
                self._before_micro_batch(index, count, began)

            try:
                return self.trainer.update(
                    chunks,
                    trained_tokens=fetched.trained_tokens,
                    before_micro_batch=before,
                    meanwhile=lambda: self._meanwhile(fetched.micro_batches),
                    spike_limit=self._spike_limit(),
                )
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._refuse_halving(max(len(chunk.input_ids) for chunk in chunks))
            # Outside of the handler, where the error no longer holds the tensors of the failed attempt.
            self.trainer.optimizer.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            self.splits *= 2
            self._context.console.log(
                f"step {self.step + 1} ran out of memory: continuing with micro-batches 1/{self.splits} as large"
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


def _split(batch: Batch, count: int) -> list[Batch]:
    """Return the batch in `count` chunks, or in single rows if it has fewer."""
    count = min(count, len(batch.input_ids))
    columns = [[None] * count if column is None else column.tensor_split(count) for column in batch]
    return [Batch(*chunk) for chunk in zip(*columns, strict=True)]
