"""The loop of a run: what it records, what it saves, and how it continues."""

from __future__ import annotations

import hashlib
import math
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gpt_kit_hf.amp import AMPTrainer, UpdateReport, resolve_precision
from gpt_kit_hf.checkpointing import checkpoint_step, latest_checkpoint, save_checkpoint
from gpt_kit_hf.durable_files import load_json
from gpt_kit_hf.errors import NonFiniteError, UsageError
from gpt_kit_hf.evaluation import Evaluation
from gpt_kit_hf.optimization import OptimizerOptions, create_optimizer, learning_rate_at, set_learning_rate
from gpt_kit_hf.progress import Console, Pace, duration, trackers
from gpt_kit_hf.run_folder import (
    CURVE_FILE,
    METRICS_FILE,
    OPTIONS_FILE,
    RECORD_FILE,
    check_run_folder,
    holds_run,
    make_run_folder,
    refuse_changes,
)
from gpt_kit_hf.run_lock import RunLock
from gpt_kit_hf.run_options import FREE_ON_RESUME, TrainingOptions, flat_options
from gpt_kit_hf.run_record import RunRecord, RunResult, finished_before
from gpt_kit_hf.run_task import RunSetting, RunTask
from gpt_kit_hf.sample_order import BatchPlan
from gpt_kit_hf.training_state import read_position, restore_training_state, write_training_state


class OptionsOfRun(Protocol):
    """What every kind of run is asked for, among other things."""

    @property
    def training(self) -> TrainingOptions:
        """How the run goes."""

    @property
    def optimizer(self) -> OptimizerOptions:
        """How the weights move."""


def run_training(
    options: OptionsOfRun, prepare: Callable[[RunSetting], RunTask], *, stream: TextIO | None
) -> RunResult:
    """Begin a run, or continue it, in the folder that the options name; `prepare` reads the data and makes the model.

    Raises UsageError for options that do not fit each other, the data or the device, before anything is written;
    NonFiniteError if too many updates in a row could not be made.
    """
    chosen = options.training
    accelerator = Accelerator(
        cpu=chosen.cpu,
        mixed_precision="no",  # AMPTrainer does it
        log_with=trackers(chosen.report_to) or None,
        project_dir=chosen.output_dir,
    )
    folder = Path(chosen.output_dir)
    console = Console(stream if accelerator.is_main_process else None)
    facts: list[Any] = [None, False]
    if accelerator.is_main_process:
        try:
            check_run_folder(folder, resume=chosen.resume, overwrite=chosen.overwrite)
            facts = [None, chosen.resume and holds_run(folder)]
        except UsageError as error:
            facts = [error, False]
    refused, continues = broadcast_object_list(facts)
    if refused is not None:
        # One process says why; the others end with it.
        raise refused if accelerator.is_main_process else SystemExit(2)
    with ExitStack() as stack:
        stack.callback(accelerator.end_training)
        stack.callback(console.close)
        if continues and accelerator.is_main_process:
            stack.enter_context(RunLock(folder))
        if continues:
            refuse_changes(load_json(folder / OPTIONS_FILE), flat_options(options), folder, FREE_ON_RESUME)
            if (result := finished_before(folder)) is not None:
                console.say(
                    f"{folder} is complete: {result.steps} steps, {result.evaluation.bits_per_byte:.3f} bits per byte"
                )
                return result
        run = _Run(options, prepare, accelerator, console, continues=continues)
        if not continues and accelerator.is_main_process:
            # Only now: options that do not fit have left everything as it was.
            moved = make_run_folder(folder, overwrite=chosen.overwrite)
            if moved is not None:
                console.say(f"the run that was in {folder} lies now in {moved}")
            stack.enter_context(RunLock(folder))
            if holds_run(folder):
                raise UsageError(f"another run began in output_dir {str(folder)!r} meanwhile: name another folder")
        return run.go()


# So many steps show how long the rest will take.
_STEPS_TO_ESTIMATE = 10


class _Run:
    """The parts of a run, made once in the order in which they depend on each other, and the loop over its steps."""

    def __init__(
        self,
        options: OptionsOfRun,
        prepare: Callable[[RunSetting], RunTask],
        accelerator: Accelerator,
        console: Console,
        *,
        continues: bool,
    ) -> None:
        self.options, self.accelerator, self.console = options, accelerator, console
        self.chosen = options.training
        self.folder = Path(self.chosen.output_dir)
        self.checkpoint = latest_checkpoint(self.folder, report=console.say) if continues else None
        self._check_before_reading()
        setting = RunSetting(
            options=self.chosen,
            accelerator=accelerator,
            console=console,
            folder=self.folder,
            checkpoint=self.checkpoint,
        )
        self.task = prepare(setting)
        self._check_data()
        share = -(-self.chosen.batch_size // accelerator.num_processes)
        self.plan = BatchPlan(
            order=self.task.order,
            batch_size=self.chosen.batch_size,
            micro_batch_size=self.chosen.micro_batch_size or share,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )
        epochs = self.chosen.epochs or 1.0
        self.total_steps = self.chosen.max_steps or max(
            1, math.ceil(epochs * self.task.order.samples / self.plan.batch_size)
        )
        self.model = self.task.model
        self.trainer = AMPTrainer(
            self.model,
            create_optimizer(self.model, options.optimizer),
            mixed_precision=self.chosen.mixed_precision,
            max_grad_norm=options.optimizer.grad_clip or None,
            accelerator=accelerator,
        )
        self.record = RunRecord(self.folder, accelerator)
        self.step = 0
        self.skipped_in_a_row = 0
        self.data_position: Any = None

    def go(self) -> RunResult:
        """Train from the first step, or the one after the checkpoint, to the last."""
        done = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        self.record.start(flat_options(self.options), self._facts(), done=done, total=self.total_steps)
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        self._introduce()
        if self.chosen.compile:
            self.model.compile()
        batches = self.task.batches(self.plan, self.step, self.total_steps, self.data_position)
        self.console.start(self.step, self.total_steps)
        if self.task.scored_first and self.step == 0:
            self._say_score(self._evaluate(None))
        pace, first = Pace(), self.step
        while self.step < self.total_steps:
            began = time.perf_counter()
            micro_batches = [next(batches) for _ in range(self.plan.micro_steps)]
            rate = learning_rate_at(self.step, self.total_steps, self.options.optimizer)
            set_learning_rate(self.trainer.optimizer, rate)
            report = self.trainer.update(micro_batches, before_micro_batch=self._seed_micro_batch)
            self.step += 1
            self._after_update(report, rate)
            pace.add(time.perf_counter() - began)
            if self.step == first + _STEPS_TO_ESTIMATE:
                left = pace.seconds_per_step * (self.total_steps - self.step)
                self.console.say(f"expected {duration(left)}, and the evaluations")
            if self.step % self.chosen.log_every == 0 or self.step == self.total_steps:
                self._log(report, rate, pace.seconds_per_step)
            if self.step < self.total_steps:
                self._now_and_then()
        self._save()
        return self._finish()

    # --- preparation

    def _check_before_reading(self) -> None:
        """Refuse what can be refused before a large text is read."""
        precision = resolve_precision(self.chosen.mixed_precision, self.accelerator.device)
        before = load_json(self.folder / RECORD_FILE)["precision"] if self.checkpoint is not None else precision
        if before != precision:
            raise UsageError(f"cannot resume {str(self.folder)!r} in {precision}: it was begun in {before}")
        if self.chosen.batch_size % self.accelerator.num_processes:
            raise UsageError(
                f"batch_size={self.chosen.batch_size} must be divisible by the number of processes, "
                f"{self.accelerator.num_processes}"
            )

    def _check_data(self) -> None:
        """Refuse to continue with other data than before."""
        if self.checkpoint is not None:
            before = read_position(self.checkpoint)["corpus"]
            if before != self.task.fingerprint:
                raise UsageError(
                    f"cannot resume {str(self.folder)!r}: its data had the fingerprint {before}, "
                    f"the data named now has {self.task.fingerprint}"
                )

    def _seed_micro_batch(self, index: int) -> None:
        """Make dropout a function of (seed, step, part of the batch): a resumed run needs no random state."""
        part = self.accelerator.process_index * self.plan.micro_steps + index
        digest = hashlib.sha256(f"{self.chosen.seed} {self.step} {part}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    # --- what is said and written

    def _facts(self) -> dict[str, Any]:
        return {
            "parameters": self.model.num_parameters(),
            **self.task.facts(),
            "data_fingerprint": self.task.fingerprint,
            "precision": self.trainer.precision,
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
        }

    def _introduce(self) -> None:
        device, say = self.accelerator.device, self.console.say
        where = {"cpu": "the CPU", "cuda": "the GPU"}.get(device.type, device.type)
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        for line in self.task.describe():
            say(line)
        samples, processes = self.task.order.samples, self.accelerator.num_processes
        epochs = f"{self.total_steps * self.plan.batch_size / samples:.2f} epochs, " if samples else ""
        say(
            f"training {self.total_steps:,} steps of {self.plan.batch_size} x {self.task.tokens_per_sample:.0f} "
            f"tokens, {epochs}{self.trainer.precision} on {where}, {processes} process{'es' if processes > 1 else ''}"
        )
        if self.options.optimizer.warmup_steps >= self.total_steps:
            warmup = self.options.optimizer.warmup_steps
            say(f"note     warmup_steps={warmup} is not below the {self.total_steps} steps: the rate only rises")
        if self.checkpoint is not None:
            say(f"resumed  after step {self.step} ({self.checkpoint.name})")

    def _after_update(self, report: UpdateReport, rate: float) -> None:
        """Record the step; stop the run if too many in a row left the weights as they were."""
        self.record.update(self.step, report, rate)
        self.console.advance()
        self.skipped_in_a_row = 0 if report.skipped is None else self.skipped_in_a_row + 1
        if report.skipped is not None:
            self.console.say(f"step {self.step} left the weights as they were: {report.skipped}")
        if self.skipped_in_a_row >= self.chosen.max_skipped:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} updates in a row were skipped, the last at step {self.step}: "
                f"{report.skipped}; {self._last_checkpoint()}"
            )

    def _last_checkpoint(self) -> str:
        last = latest_checkpoint(self.folder, report=self.console.say)
        return f"the last checkpoint is {last.name}" if last else "there is no checkpoint yet"

    def _log(self, report: UpdateReport, rate: float, seconds_per_step: float) -> None:
        speed = self.plan.batch_size * self.task.tokens_per_sample / seconds_per_step
        left = (self.total_steps - self.step) * seconds_per_step
        self.console.step(self.step, self.total_steps, report.loss, speed, left)
        values = {"loss": report.loss, "learning_rate": rate, "grad_norm": report.grad_norm}
        self.record.track("train", self.step, {**values, "tokens_per_second": speed})

    # --- now and then

    def _now_and_then(self) -> None:
        if self.step % self.chosen.eval_every == 0:
            self._say_score(self._evaluate(self.chosen.eval_windows))
        if self.chosen.sample_every and self.step % self.chosen.sample_every == 0:
            self.console.say(self._sample())
        if self.step % self.chosen.save_every == 0:
            self._save()

    def _say_score(self, scored: Evaluation) -> None:
        self.console.say(
            f"step {self.step}  held-out loss {scored.loss:.3f}, {scored.bits_per_byte:.3f} bits per byte"
        )

    def _evaluate(self, max_samples: int | None) -> Evaluation:
        scored = self.task.evaluate(max_samples, self.plan.micro_batch_size, self.trainer.autocast)
        if not math.isfinite(scored.loss):
            raise NonFiniteError(f"the held-out loss is {scored.loss} at step {self.step}: {self._last_checkpoint()}")
        self.record.evaluation(self.step, scored)
        return scored

    def _sample(self) -> str:
        """Return lines that show what the model does; torch's random state does not move."""
        if not self.accelerator.is_main_process:
            return ""
        # A compiled model would be compiled anew for each length of the growing text.
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            self.trainer.autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(self.chosen.seed)
            return "\n".join(f"  | {line}" for line in self.task.sample().splitlines())

    # --- checkpoints

    def _save(self) -> None:
        """Write the checkpoint of this step; the other processes wait until it has its name."""
        self.data_position = self.task.position()
        if self.accelerator.is_main_process:
            self.checkpoint = save_checkpoint(
                self.folder,
                self.step,
                self._write_checkpoint,
                keep_last=self.chosen.keep_last,
                report=self.console.say,
            )
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path) -> None:
        self.task.write_model(folder)
        position = {
            "step": self.step,
            "corpus": self.task.fingerprint,
            "data_position": self.data_position,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        write_training_state(folder, self.model, self.trainer, position)

    def _restore(self, folder: Path) -> None:
        """Take up where a checkpoint ended; the weights are in the model already."""
        position = restore_training_state(folder, self.model, self.trainer)
        self.step, self.skipped_in_a_row = position["step"], position["skipped_in_a_row"]
        self.data_position = position["data_position"]

    # --- the end

    def _finish(self) -> RunResult:
        """Score all held-out samples, put the model where the run is, and say what there is now."""
        scored = self._evaluate(None)
        if self.accelerator.is_main_process:
            assert self.checkpoint is not None
            self.task.publish(self.folder, self.checkpoint)
            beside = self.task.baselines()
            self._conclude(scored, beside, self.record.finish(self.step, scored, beside))
        self.accelerator.wait_for_everyone()
        return RunResult(folder=self.folder, steps=self.step, evaluation=scored)

    def _conclude(self, scored: Evaluation, beside: Mapping[str, float], drawn: bool) -> None:
        say = self.console.say
        self.console.close()
        others = ", ".join(f"{name} {value:.3f}" for name, value in beside.items())
        say(
            f"\n{self.task.scored} ({scored.text_bytes:,} bytes): {scored.bits_per_byte:.3f} bits per byte"
            + (f"; {others}" if others else "")
        )
        say(f"loss {scored.loss:.4f} nats per token, perplexity {scored.perplexity:.1f}")
        say(self._sample())
        say(f"model    {self.folder} (from_pretrained loads it)")
        say(f"curve    {self.folder / CURVE_FILE if drawn else 'not drawn: pip install matplotlib'}")
        say(f"metrics  {self.folder / METRICS_FILE}")
        say(f"next     {shlex.join(self.task.next_command(self.folder))}")
