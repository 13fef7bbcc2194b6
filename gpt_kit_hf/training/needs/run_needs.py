"""What the rest of a run takes, said before its first step: time, memory and disk; refuses what cannot fit."""

from __future__ import annotations

import math
import platform
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.fast_decoder import why_not
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.run import OptionsOfRun
from gpt_kit_hf.storage.checkpoints import checkpoint_step, list_checkpoints
from gpt_kit_hf.text import duration, file_size
from gpt_kit_hf.training.log.pace import peak_memory
from gpt_kit_hf.training.needs.cost import Autocast, Probe, StepMemory, StepSeconds, weight_bytes
from gpt_kit_hf.training.needs.due import Due, disk_bytes
from gpt_kit_hf.training.runtime.available_memory import memory_left
from gpt_kit_hf.training.runtime.compilation import is_compiled
from gpt_kit_hf.training.state.host_copies import WRITING
from gpt_kit_hf.training.state.sharded_state import local_part
from gpt_kit_hf.training.state.training_state import SMALL_FILES_BYTES, read_position
from gpt_kit_hf.training.steps import Steps
from gpt_kit_hf.training.task import RunContext, Task, decide_on_main

# A run of fewer steps is over before it is worth knowing how long it takes.
_FEW_STEPS = 20
# Rows of a pass without gradients that is timed.
_ROWS_EVALUATED = 4
# Bytes of a checkpoint that are written, flushed and hashed in a second.
_SAVED_PER_SECOND = 2e8
# On a CPU: how much more the allocator takes for the passes after a while than for the first ones, and the code and
# data that evaluations, samples, checkpoints and the curve load (benchmarks/README.md).
_HEAP_GROWTH, _LOADED_LATER = 0.1, 36_000_000
# And what a kernel of oneDNN takes in bfloat16, with the gaps that it leaves.
_KERNEL = 800_000
# After the last step: the baselines, the curve, and the files of the model.
_END_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class RunNeeds:
    """What the rest of a run takes.

    `seconds`, and those of a step, are None if they are not known before the first steps. `memory_bytes` is the most
    that this process, or its tensors on a device, will hold, `free_memory_bytes` how much that may be, None if it is
    unknown. `disk_bytes` is what output_dir grows by, of which `checkpoint_bytes` are one checkpoint. Micro-batches
    are cut into `splits` parts.
    """

    seconds: float | None
    step_seconds: float | None
    memory_bytes: int
    free_memory_bytes: int | None
    processes: int
    disk_bytes: int
    checkpoint_bytes: int
    free_disk_bytes: int
    splits: int
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the needs as a log line, and a line for each note."""
        each = "" if self.processes == 1 else f" in each of {self.processes} processes"
        free = "" if self.free_memory_bytes is None else f" (of {file_size(self.free_memory_bytes)} free)"
        takes = [
            *([] if self.seconds is None else [f"about {duration(self.seconds)}"]),
            f"{file_size(self.memory_bytes)} of memory{each}{free}",
            f"{file_size(self.disk_bytes)} of disk",
        ]
        notes = list(self.notes)
        if self.disk_bytes > self.free_disk_bytes:
            notes.append(
                f"{file_size(self.free_disk_bytes)} of disk are free: keep fewer checkpoints, save_total_limit"
            )
        return [f"needs    {', '.join(takes)}", *(f"note     {note}" for note in notes)]

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON."""
        return {name: value for name, value in asdict(self).items() if name != "notes"}


def measure_needs(options: OptionsOfRun, context: RunContext, task: Task, steps: Steps, due: Due) -> RunNeeds:
    """Return what the steps left take, by computing a few micro-batches; every process calls; nothing changes.

    Micro-batches that do not fit in memory are cut, if out_of_memory=halve allows it. Raises UsageError if not even
    one row fits, or no checkpoint on the disk.
    """
    return _Measurement(options, context, task, steps, due).needs()


class _Measurement:
    """A run that is measured."""

    def __init__(self, options: OptionsOfRun, context: RunContext, task: Task, steps: Steps, due: Due) -> None:
        self._chosen, self._accelerator, self._folder = options.training, context.accelerator, context.folder
        self._task, self._steps, self._due, self._checkpoint = task, steps, due, context.checkpoint
        self._alone = self._accelerator.num_processes == 1
        self._done = 0 if context.checkpoint is None else checkpoint_step(context.checkpoint)
        self._left = steps.total - self._done
        self._model: Any = self._accelerator.unwrap_model(steps.trainer.model)
        self._probe = Probe(
            self._model,
            steps.trainer.optimizer.optimizer,
            task.longest_rows,
            steps.trainer.autocast,
            accumulates=steps.plan.micro_steps > 1,
        )
        self._trained = sum(local_part(p).nbytes for p in self._model.parameters() if p.requires_grad)
        self._weights = weight_bytes(self._model)
        self._average = 0 if options.optimizer.ema_decay is None else self._trained
        has_kernels = steps.trainer.precision == "bf16" and self._accelerator.device.type == "cpu"
        self._kernels = task.more_kernels(steps.plan) if has_kernels else 0

    def needs(self) -> RunNeeds:
        """Measure and check."""
        splits = self._splits_before()
        wanted = -(-self._steps.plan.micro_batch_size // splits)
        available = memory_left(self._accelerator.device)
        usable = self._for_steps(available)
        memory, seconds = self._measured(wanted, usable)
        added = memory.added + self._average
        on_cpu = self._accelerator.device.type == "cpu"
        self._check_together(added + on_cpu * self._beside(memory.passes), available)
        size = wanted
        while size > memory.micro_batch_size:
            size, splits = -(-size // 2), splits * 2
        on_top = self._meanwhile(memory, seconds, None if available is None else available - added)
        checkpoint, disk = self._disk_bytes(memory)
        needs = RunNeeds(
            seconds=None if seconds is None else self._seconds(size, self._step(size, seconds), checkpoint),
            step_seconds=None if seconds is None else self._step(size, seconds),
            # What came before, such as the larger shapes of a plan, may have taken more.
            memory_bytes=max(self._probe.before + added + on_top, peak_memory(self._accelerator.device)),
            free_memory_bytes=None if available is None else self._probe.before + available,
            processes=self._accelerator.num_processes,
            disk_bytes=disk,
            checkpoint_bytes=checkpoint,
            free_disk_bytes=disk_left(self._folder),
            splits=splits,
            notes=self._notes(wanted, memory, usable),
        )
        decide_on_main(self._accelerator, lambda: self._check_disk(needs))
        return needs

    def _splits_before(self) -> int:
        """Return into how many parts the checkpoint's micro-batches were cut."""
        if self._checkpoint is None:
            return 1
        size, splits = read_position(self._checkpoint)["micro_batch"]
        return int(splits) if size == self._steps.plan.micro_batch_size else 1

    # --- memory

    def _for_steps(self, available: int | None) -> int | None:
        """Return what is left for steps: on a CPU, without what the run takes beside them."""
        if available is None or self._accelerator.device.type != "cpu":
            return available
        beside = self._average + self._beside(passes=0)
        return max(0, round((available - beside) / (1 + _HEAP_GROWTH)))

    def _beside(self, passes: int) -> int:
        """Return the bytes that the run takes on a CPU beside its steps, without copies of its state."""
        return self._kernels * _KERNEL + beside_steps(weights=self._weights, passes=passes, packed=self._packed())

    def _packed(self) -> int:
        """Return how many copies of the weights decoding takes: one of a sample, which stays, and one at the end."""
        return 0 if why_not(self._model) is not None else 1 + (self._due.samples_after(self._done) > 0)

    def _measured(self, wanted: int, available: int | None) -> tuple[StepMemory, StepSeconds | None]:
        """Return memory and time of a step with micro-batches of `wanted` rows, or of fewer that fit."""
        if not self._left:  # the run only ends
            return StepMemory(micro_batch_size=wanted, asked=0, weights=0, passes=0, state=0), None
        memory = self._probe.memory(wanted, math.inf if available is None or not self._alone else available)
        self._check_size(wanted, memory, available)
        if self._left < _FEW_STEPS or is_compiled(self._chosen.torch_compile, self._accelerator.device):
            return memory, None
        step, size = self._done, memory.micro_batch_size
        rows = self._task.typical_rows(self._steps.plan, step, size)
        # Several processes measure together, so each as often.
        seconds = self._probe.typical_seconds(rows) if self._alone else self._probe.seconds(rows)
        return self._probe.measured(memory), seconds

    def _check_size(self, wanted: int, memory: StepMemory, available: int | None) -> None:
        """Refuse a step that does not fit, or that does only with smaller micro-batches and may not have them."""
        size, left = memory.micro_batch_size, "less" if available is None else file_size(available)
        if size == 0:
            raise UsageError(
                f"a step with one sequence takes more memory than the {left} that are left for steps; gradients "
                f"and the state of the optimizer alone take {file_size(self._trained + memory.state)}: lower "
                "max_length or the model's size"
            )
        if size < wanted and not (self._alone and self._chosen.out_of_memory == "halve"):
            raise UsageError(
                f"a step with micro-batches of {wanted} sequences takes {file_size(memory.asked)} of memory, and "
                f"{left} are left for steps: give --per_device_train_batch_size {size}, or lower max_length or the "
                "model's size"
            )

    def _check_together(self, added: int, available: int | None) -> None:
        """Refuse what the processes do not have together: on a CPU, those of a machine share its memory."""
        if self._alone or available is None:
            return
        on_cpu, here = self._accelerator.device.type == "cpu", platform.node()
        each = gather_object([(here, added, available)])
        peers = [(takes, has) for name, takes, has in each if name == here] if on_cpu else [(added, available)]
        takes, has = sum(takes for takes, _ in peers), min(has for _, has in peers)
        failed = gather_object([takes > has])
        if any(failed):
            # One process reports it.
            raise (
                UsageError(
                    f"a step takes {file_size(takes)} of memory in the {len(peers)} processes of {here}, and "
                    f"{file_size(has)} are left: lower per_device_train_batch_size, max_length or the model's size"
                )
                if self._accelerator.process_index == failed.index(True)
                else SystemExit(1)
            )

    def _meanwhile(self, memory: StepMemory, seconds: StepSeconds | None, left: int | None) -> int:
        """Return the bytes that the run takes beside its steps: copies of the weights and of its state."""
        if self._accelerator.device.type != "cpu":
            return self._packed() * self._weights
        on_top = self._beside(memory.passes)
        state = self._trained + memory.state + self._average
        enough = left is None or left >= (1 + WRITING) * state
        saves = self._chosen.async_save and self._due.saves_after(self._done) > 1
        if not saves or not enough or self._accelerator.is_fsdp2:
            return on_top
        # What the last step has freed holds the copies first, until the next forward pass needs it.
        soon = seconds is not None and state / _SAVED_PER_SECOND < seconds.micro_batch / 3
        return on_top + (max(0, state - memory.passes) if soon else state)

    def _notes(self, wanted: int, memory: StepMemory, available: int | None) -> tuple[str, ...]:
        size = memory.micro_batch_size
        if size == wanted or available is None:
            return ()
        return (
            f"micro-batches of {size} sequences instead of {wanted}, which take {file_size(memory.asked)} of memory: "
            f"{file_size(available)} are left for steps",
        )

    # --- time

    def _step(self, size: int, seconds: StepSeconds) -> float:
        """Return the time of a step."""
        plan = self._steps.plan
        passes = plan.micro_steps * -(-plan.micro_batch_size // size)
        return float(passes * seconds.micro_batch + seconds.update)

    def _seconds(self, size: int, step: float, checkpoint: int) -> float:
        """Return the time of the steps left and of what is between and behind them."""
        plan, chosen, due, done = self._steps.plan, self._chosen, self._due, self._done
        few = self._task.typical_rows(plan, done, min(size, _ROWS_EVALUATED))
        ids = few.input_ids.numel() * self._accelerator.num_processes
        times = due.evaluations_after(done)
        evaluated = times * self._task.ids_evaluated(chosen.max_eval_samples, size)
        at_last = self._task.ids_evaluated(None, size) * (1 + (done == 0 and due.eval_before_training))
        one = Batch(few.input_ids[:1, :1], few.targets[:1, :1])
        tokens = (due.samples_after(done) + 1) * chosen.sample_max_new_tokens
        return float(
            self._left * step
            + evaluated / ids * self._forward(few, self._steps.trainer.autocast)
            + at_last / ids * self._forward(few, nullcontext)
            + tokens * self._forward(one, self._steps.trainer.autocast)
            + (checkpoint + self._published_bytes()) / _SAVED_PER_SECOND
            + _END_SECONDS
        )

    def _forward(self, batch: Batch, autocast: Autocast) -> float:
        first, second = (self._probe.forward_seconds(batch, autocast) for _ in range(2))
        return min(first, second)

    # --- disk

    def _disk_bytes(self, memory: StepMemory) -> tuple[int, int]:
        """Return the bytes of a checkpoint, and those by which output_dir grows at most."""
        parts = self._accelerator.num_processes if self._accelerator.is_fsdp2 else 1
        weights = self._trained if self._task.saves_trained_only else self._weights
        checkpoint = parts * (weights + memory.state + self._average)
        there = len(list_checkpoints(self._folder)) if self._checkpoint is not None else 0
        grows = disk_bytes(
            self._chosen,
            self._due,
            checkpoint=checkpoint,
            published=self._published_bytes(),
            done=self._done,
            there=there,
        )
        return checkpoint, grows

    def _published_bytes(self) -> int:
        whole = 4 * int(self._model.num_parameters())
        return 2 * whole if self._task.saves_trained_only else whole  # merged, and copied into the run's root

    def _check_disk(self, needs: RunNeeds) -> None:
        if self._left and needs.free_disk_bytes < needs.checkpoint_bytes + SMALL_FILES_BYTES:
            raise UsageError(
                f"output_dir {str(self._folder)!r}: a checkpoint takes {file_size(needs.checkpoint_bytes)}, and "
                f"{file_size(needs.free_disk_bytes)} are free there: name another folder, or lower the model's size"
            )


def beside_steps(*, weights: int, passes: int, packed: int = 2) -> int:
    """Return the bytes that a run on a CPU takes beside its steps; `packed` copies of the weights are for decoding."""
    return packed * weights + round(_HEAP_GROWTH * passes) + _LOADED_LATER


def disk_left(folder: Path) -> int:
    """Return the free bytes where a folder is or will be made."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free
