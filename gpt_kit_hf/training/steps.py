"""The steps of a run: the same batches, the same dropout and the same updates, wherever and whenever computed."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from gpt_kit_hf.data.order import BatchPlan
from gpt_kit_hf.errors import RunError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.run import OptionsOfRun
from gpt_kit_hf.training.optim.optimizer import create_optimizer, learning_rate_at, set_learning_rate
from gpt_kit_hf.training.state.batch_digests import batch_digest, chained, content_digest, halves, joined
from gpt_kit_hf.training.state.training_state import restore_training_state
from gpt_kit_hf.training.task import RunSetting, RunTask
from gpt_kit_hf.training.trainer import AMPTrainer, UpdateReport

# The spike guard compares with the median of so many norms, and is silent before it has seen a tenth of them.
_NORMS = 100
# A step that takes longer is given up where the run is asked to stop: schedulers kill after a while.
_SECONDS_TO_FINISH = 2.0


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step did: the update, at which learning rate, on which batch, and whether the run shall stop now.

    `batch` is the digest of the global batch, `chain` that of all batches so far (see `receipt`).
    """

    update: UpdateReport
    learning_rate: float
    batch: str
    chain: str
    stop: bool


class _GivenUpError(Exception):
    """The run is asked to stop, and the step would take long."""


class Steps:
    """Computes the steps of a run one by one, and knows where it is."""

    def __init__(self, options: OptionsOfRun, setting: RunSetting, task: RunTask) -> None:
        self.task, self._setting = task, setting
        self._options, self._chosen, self._accelerator = options, options.training, setting.accelerator
        share = -(-self._chosen.batch_size // self._accelerator.num_processes)
        self.plan = BatchPlan(
            order=task.order,
            batch_size=self._chosen.batch_size,
            micro_batch_size=self._chosen.per_device_train_batch_size or share,
            num_processes=self._accelerator.num_processes,
            process_index=self._accelerator.process_index,
        )
        if self._chosen.gradient_checkpointing:
            # Its name before transformers had the other.
            named = "activation" if hasattr(task.model, "activation_checkpointing_enable") else "gradient"
            getattr(task.model, f"{named}_checkpointing_enable")()
        epochs = self._chosen.num_train_epochs or 1.0
        self.total = self._chosen.max_steps or max(1, math.ceil(epochs * task.order.samples / self.plan.batch_size))
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
        self._pieces = 1
        self._batches: Iterator[Batch] = iter(())

    def restore(self, checkpoint: Path) -> None:
        """Take up where a checkpoint ended; the weights are in the model already."""
        position = restore_training_state(checkpoint, self.task.model, self.trainer)
        self.step, self.skipped_in_a_row = position["step"], position["skipped_in_a_row"]
        self._chain, self._norms = position["chain"], list(position["recent_norms"])
        self._data_position = position["data_position"]

    def begin(self, last: int | None = None) -> None:
        """Make ready for the steps up to `last`, or all."""
        self._batches = self.task.batches(self.plan, self.step, last or self.total, self._data_position)

    def position(self) -> dict[str, Any]:
        """Return where the run is, for `restore`; every process calls, between two steps."""
        if self._accelerator.num_processes > 1:
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
        """Compute the next step, or return None where the run shall stop instead.

        Raises RunError if it needs more memory than there is, and what reading its batch raises.
        """
        began = time.perf_counter()
        if self._accelerator.num_processes == 1 and self._setting.stop.asked():
            return None
        micro_batches = [next(self._batches) for _ in range(self.plan.micro_steps)]
        rate = learning_rate_at(self.step, self.total, self._options.optimizer)
        set_learning_rate(self.trainer.optimizer, rate)
        try:
            update = self._update(micro_batches, began)
        except _GivenUpError:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            return None
        content, stop = self._agreed(content_digest(micro_batches))
        batch = batch_digest(self.plan.sample_ids(self.step), content)
        self._chain = chained(self._chain, batch)
        self.step += 1
        self.skipped_in_a_row = 0 if update.skipped is None else self.skipped_in_a_row + 1
        if math.isfinite(update.grad_norm):
            self._norms = [*self._norms, update.grad_norm][-_NORMS:]
        if self._accelerator.num_processes == 1:  # else it costs a word between the processes: when it is saved
            self._data_position = self.task.position()
        return StepReport(update=update, learning_rate=rate, batch=batch, chain=self._chain, stop=stop)

    # --- the parts of a step

    def _update(self, micro_batches: Sequence[Batch], began: float) -> UpdateReport:
        """Update the weights; where memory runs out, once more in micro-batches half as large."""
        while True:
            parts = [part for batch in micro_batches for part in _cut(batch, self._pieces)]

            def before(index: int, parts: Sequence[Batch] = parts) -> None:
                self._before_part(index, len(parts), began)

            try:
                return self.trainer.update(parts, before_micro_batch=before, spike_limit=self._spike_limit())
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                    raise
                self._refuse_halving(max(len(part.input_ids) for part in parts))
            # Behind the handler: the error holds on to all that was computed.
            self.trainer.optimizer.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            self._pieces *= 2
            self._setting.console.say(
                f"step {self.step + 1} ran out of memory: from here in micro-batches 1/{self._pieces} as large"
            )

    def _refuse_halving(self, size: int) -> None:
        """Raise RunError where micro-batches cannot or shall not be halved."""
        what = f"step {self.step + 1} ran out of memory with micro-batches of {size}"
        if size == 1:
            raise RunError(f"{what}: lower max_length or the size of the model")
        if self._chosen.out_of_memory == "stop" or self._accelerator.num_processes > 1:
            # Processes wait for each other inside of a backward pass: one alone cannot do it again.
            raise RunError(f"{what}: continue with --resume --per_device_train_batch_size {max(1, size // 2)}")

    def _before_part(self, index: int, parts: int, began: float) -> None:
        """Make dropout a function of (seed, step, part of the batch): a resumed run needs no random state."""
        alone, late = self._accelerator.num_processes == 1, time.perf_counter() - began > _SECONDS_TO_FINISH
        if alone and late and self._setting.stop.asked():
            raise _GivenUpError
        part = self._accelerator.process_index * parts + index
        digest = hashlib.sha256(f"{self._chosen.seed} {self.step} {part}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        if self._accelerator.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed walks the stack for each other device
        else:
            torch.manual_seed(seed)

    def _spike_limit(self) -> float:
        if not self._chosen.spike_factor or len(self._norms) < _NORMS // 10:
            return math.inf
        return self._chosen.spike_factor * statistics.median(self._norms)

    def _agreed(self, content: int) -> tuple[int, bool]:
        """Return the sum of the processes' contents, and whether any of them was asked to stop."""
        stop = self._setting.stop.asked()
        if self._accelerator.num_processes == 1:
            return content, stop
        own = torch.tensor([*halves(content), int(stop)], device=self._accelerator.device)
        low, high, stops = self._accelerator.reduce(own, reduction="sum").tolist()
        return joined(low, high), stops > 0


def _cut(batch: Batch, pieces: int) -> list[Batch]:
    """Return the batch in so many parts, or in single rows where it has fewer."""
    count = min(pieces, len(batch.input_ids))
    columns = [[None] * count if part is None else part.tensor_split(count) for part in batch]
    return [Batch(*parts) for parts in zip(*columns, strict=True)]
