"""The training loop: begins a run or resumes it, and evaluates, samples, logs and saves between the steps."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from accelerate import Accelerator

from gpt_kit_hf.errors import DataError, NonFiniteError, StoppedError, UsageError
from gpt_kit_hf.evaluation.metrics import Evaluation
from gpt_kit_hf.options.run import CHANGED_TEXT, OptionsOfRun, changed_options, flat_options
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.storage.atomic_files import Report, load_json
from gpt_kit_hf.storage.checkpoints import checkpoint_step
from gpt_kit_hf.storage.lock import RunLock
from gpt_kit_hf.storage.remote_run import RemoteRun
from gpt_kit_hf.storage.run_folder import (
    CURVE_FILE,
    METRICS_FILE,
    OPTIONS_FILE,
    RECORD_FILE,
    check_run_folder,
    holds_run,
    make_run_folder,
)
from gpt_kit_hf.text import duration
from gpt_kit_hf.training.data_changes import data_change
from gpt_kit_hf.training.log.console import Console, trackers
from gpt_kit_hf.training.log.pace import Pace
from gpt_kit_hf.training.log.run_log import RunRecord, RunResult, finished_before
from gpt_kit_hf.training.runtime.attention import check_attention, set_attention
from gpt_kit_hf.training.runtime.compilation import blocks_to_compile
from gpt_kit_hf.training.runtime.determinism import deterministic_algorithms
from gpt_kit_hf.training.runtime.launch import check_launch, create_accelerator, end_processes, launcher_pid
from gpt_kit_hf.training.runtime.lost_processes import lost_process, lost_run
from gpt_kit_hf.training.runtime.memory import reuse_freed_memory
from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED, StopSignals
from gpt_kit_hf.training.saving import RunCheckpoints, checkpoint_to_resume
from gpt_kit_hf.training.steps import BatchError, StepReport, Steps
from gpt_kit_hf.training.task import RunContext, Task, decide_on_main
from gpt_kit_hf.training.trainer import resolve_precision

_STEPS_TO_ESTIMATE = 10  # after which the remaining time is estimated
_IDS_SHOWN = 8  # sample ids in the message about a batch


def run_training(
    options: OptionsOfRun, build_task: Callable[[RunContext], Task], *, stream: TextIO | None
) -> RunResult:
    """Begin or resume the run in `output_dir`; `build_task` reads the data and builds the model.

    Raises UsageError, before anything is written, for options that do not fit each other, the data, the launch or the
    device; NonFiniteError after too many skipped updates in a row; RunError if a process of the run ended or memory
    ran out; StoppedError after saving, when a signal asked to stop.
    """
    try:
        return _begin_or_resume(options, build_task, stream)
    except RuntimeError as error:
        reason = lost_process(error)
        if reason is None:
            raise
        raise lost_run(reason, Path(options.training.output_dir)) from error


def _begin_or_resume(
    options: OptionsOfRun, build_task: Callable[[RunContext], Task], stream: TextIO | None
) -> RunResult:
    chosen, folder = options.training, Path(options.training.output_dir)
    with ExitStack() as stack:
        stack.enter_context(deterministic_algorithms(chosen.deterministic))
        accelerator = _accelerator(options)
        console = Console(stream if accelerator.is_main_process else None)
        stack.callback(end_processes, accelerator)
        stack.callback(console.close)
        stop = stack.enter_context(StopSignals(launcher_pid()))
        main = accelerator.is_main_process
        remote = RemoteRun(chosen.remote_dir, folder, console.log) if main and chosen.remote_dir is not None else None
        resumes = decide_on_main(accelerator, lambda: _resumes(chosen, folder, remote))
        changes: dict[str, Any] = {}
        lock = RunLock(folder, report=console.log)
        if resumes:
            decide_on_main(accelerator, lambda: _take_lock(stack, lock))
            changes = changed_options(load_json(folder / OPTIONS_FILE), options, folder)
            longer = changes.keys() & {"training.max_steps", "training.num_train_epochs"}
            other_text = CHANGED_TEXT in (chosen.allow_changes or ())
            if not longer and not other_text and (result := finished_before(folder)) is not None:
                bits = result.evaluation.bits_per_byte
                console.log(f"{folder} is complete: {result.steps} steps, {bits:.3f} bits per byte")
                if remote is not None:
                    remote.finish(result.steps)
                return result
        checkpoint = checkpoint_to_resume(folder, accelerator, console.log) if resumes else None
        _check_options(options, accelerator, folder, checkpoint)
        context = RunContext(
            options=chosen,
            accelerator=accelerator,
            console=console,
            folder=folder,
            checkpoint=checkpoint,
            stop=stop,
            remote=remote,
        )
        task = build_task(context)
        set_attention(task.model, chosen.attn_implementation)
        new_data = None if checkpoint is None else data_change(task, checkpoint, folder, chosen.allow_changes)
        loop = _Loop(options, context, task, changes, new_data, lock)
        if not resumes and main:
            # Only now, as options that do not fit must leave everything as it was.
            _make_folders(chosen, folder, remote, console.log)
            _take_lock(stack, lock)
            if holds_run(folder):
                raise UsageError(f"output_dir {str(folder)!r}: another run began there meanwhile; name another folder")
        return loop.run()


def _accelerator(options: OptionsOfRun) -> Accelerator:
    chosen = options.training
    accelerator = create_accelerator(
        use_cpu=chosen.use_cpu,
        timeout=chosen.ddp_timeout,
        trackers=trackers(chosen.report_to),
        folder=chosen.output_dir,
    )
    check_launch(accelerator)
    if accelerator.device.type == "cpu":
        reuse_freed_memory()
    return accelerator


def _make_folders(chosen: TrainingOptions, folder: Path, remote: RemoteRun | None, log: Report) -> None:
    moved = make_run_folder(folder, overwrite=chosen.overwrite)
    if moved is not None:
        log(f"moved the previous run from {folder} to {moved}")
    replaced = remote.move_aside() if remote is not None and chosen.overwrite else None
    if replaced is not None:
        log(f"moved the previous run from {chosen.remote_dir} to {replaced}")


def _take_lock(stack: ExitStack, lock: RunLock) -> None:
    stack.enter_context(lock)


def _resumes(chosen: TrainingOptions, folder: Path, remote: RemoteRun | None) -> bool:
    check_run_folder(folder, resume=chosen.resume, overwrite=chosen.overwrite)
    if remote is not None:
        remote.prepare(resume=chosen.resume, overwrite=chosen.overwrite)
    return chosen.resume and holds_run(folder)


def _check_options(options: OptionsOfRun, accelerator: Accelerator, folder: Path, checkpoint: Path | None) -> None:
    """Refuse precision and batch size before a large text is read."""
    chosen, processes = options.training, accelerator.num_processes
    precision = resolve_precision(chosen.mixed_precision, accelerator.device)
    check_attention(chosen.attn_implementation, accelerator.device, precision)
    before = load_json(folder / RECORD_FILE)["precision"] if checkpoint is not None else precision
    if before != precision and "mixed_precision" not in (chosen.allow_changes or ()):
        raise UsageError(
            f"cannot resume {str(folder)!r} in {precision}: it was begun in {before}; give --mixed_precision "
            f"{before}, or allow it by --allow_changes mixed_precision"
        )
    if chosen.batch_size % processes:
        raise UsageError(f"batch_size={chosen.batch_size} must be divisible by the number of processes, {processes}")


class _Loop:
    """The loop over the steps, with what they need: trainer, record and checkpoints."""

    def __init__(
        self,
        options: OptionsOfRun,
        context: RunContext,
        task: Task,
        changes: Mapping[str, Any],
        new_data: Mapping[str, Any] | None,
        lock: RunLock,
    ) -> None:
        self.options, self.chosen, self.task = options, options.training, task
        self.changes, self.new_data = changes, new_data
        self.accelerator, self.console, self.stop = context.accelerator, context.console, context.stop
        self.folder, self.checkpoint, self.lock = context.folder, context.checkpoint, lock
        self.steps = Steps(options, context, task)
        self._check_steps_left()
        self.record = RunRecord(self.folder, self.accelerator, self.console.log, lock.check)
        self.checkpoints = RunCheckpoints(context, task, self.steps, self.record, lock.check)

    def _check_steps_left(self) -> None:
        """Refuse new data for a run that has no step left to train on it."""
        if self.new_data is not None and self.checkpoint is not None:
            done, total = checkpoint_step(self.checkpoint), self.steps.total
            if done >= total:
                raise UsageError(
                    f"{str(self.folder)!r} has done all its {total} steps, so nothing would be trained on the new "
                    "text: give more steps, such as --max_steps STEPS --allow_changes text max_steps"
                )

    def run(self) -> RunResult:
        """Train from the first step, or from the checkpoint, to the last."""
        try:
            with self.stop.stop_between_steps():
                self._prepare()
                self._train()
                self.checkpoints.save(must=True)
                return self._finish()
        except StoppedError:
            raise
        except Exception as error:
            self.record.fail(error)
            raise
        finally:
            self.checkpoints.writer.wait()

    def _prepare(self) -> None:
        steps = self.steps
        done = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        options, facts = flat_options(self.options), self._facts()
        device, model = self.accelerator.device, self.task.model
        self.to_compile = blocks_to_compile(model, self.chosen.torch_compile, device, self.console.log)
        computing = steps.computing_facts(compiled=bool(self.to_compile))
        self.record.start(
            options, facts, self.changes, self.new_data, computing=computing, done=done, total=steps.total
        )
        if self.accelerator.is_main_process:
            self.checkpoints.scores = self.record.scores()
        if self.checkpoint is not None:
            steps.restore(self.checkpoint)
        self._introduce()
        steps.begin()
        self.console.start(steps.step, steps.total)

    def _train(self) -> None:
        steps, pace, first = self.steps, Pace(), self.steps.step
        # A run that stops on request leaves evaluation and sample of its last step to the one that continues.
        done = decide_on_main(self.accelerator, lambda: self.record.kinds_at(first))
        if self._evaluation_due(first) and "eval" not in done:
            self._evaluate_and_log(self.chosen.max_eval_samples if first else None)
        if first < steps.total and self._sample_due(first) and "sample" not in done:
            self.console.log(self._sample())
        # Only now: the compiler takes every size that it has seen to change for one that changes, also in training.
        for block in self.to_compile:
            block.compile()
        while steps.step < steps.total:
            began = time.perf_counter()
            report = self._take_step()
            self._record_update(report)
            pace.add(time.perf_counter() - began, report.update.trained_tokens)
            if steps.step == first + _STEPS_TO_ESTIMATE:
                left = duration(pace.seconds_per_step * (steps.total - steps.step))
                self.console.log(f"about {left} left, without evaluations")
            if steps.step % self.chosen.logging_steps == 0 or steps.step == steps.total:
                self._log_step(report, pace)
            if report.stop:
                self._save_and_stop()
            if steps.step < steps.total:
                self._evaluate_sample_save()

    def _take_step(self) -> StepReport:
        """Compute the next step, or save and stop; add step and checkpoint to the message of an error."""
        try:
            report = self.steps.take()
        except BatchError as error:
            step = self.steps.step + 1
            raise DataError(
                f"step {step} cannot be computed: {error}; its samples are {self._samples(step)}; "
                f"{self.checkpoints.describe_last()}"
            ) from error
        except (ConnectionError, EOFError) as error:
            # Fetching tensors from a DataLoader process that was killed ends so, but so may reading a remote dataset.
            if not self.steps.loader_ended():
                raise
            raise lost_run(f"a process that loads batches ended (DataLoader worker: {error})", self.folder) from error
        if report is None:
            self._save_and_stop()
        return report

    def _evaluation_due(self, step: int) -> bool:
        """Return whether there is an evaluation between this step and the next."""
        if step == 0:
            return self.task.eval_before_training
        saved_as_best = self.chosen.keep_best > 0 and step % self.chosen.save_steps == 0
        return step < self.steps.total and (step % self.chosen.eval_steps == 0 or saved_as_best)

    def _sample_due(self, step: int) -> bool:
        """Return whether there is a text sample between this step and the next."""
        return step > 0 and self.chosen.sample_steps > 0 and step % self.chosen.sample_steps == 0

    def _evaluate_sample_save(self) -> None:
        """Do what is due after this step."""
        step, saves = self.steps.step, self.steps.step % self.chosen.save_steps == 0
        if self._evaluation_due(step):
            self._evaluate_and_log(self.chosen.max_eval_samples)
        if self._sample_due(step):
            self.console.log(self._sample())
        if saves:
            self.checkpoints.save(must=False)

    def _save_and_stop(self) -> NoReturn:
        """Save a checkpoint and end the run, as a signal asked."""
        done, saved = self.steps.step, "nothing to save yet"
        if done:
            self.checkpoints.save(must=True)
            saved = f"saved in {self.folder}: continue with --resume"
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            raise SystemExit(EXIT_STOPPED)  # one process reports it
        cause = self.stop.reason or "a signal to another of its processes"
        raise StoppedError(f"stopped by {cause} after step {done} of {self.steps.total}, {saved}")

    # --- evaluation and samples

    def _evaluate_and_log(self, max_samples: int | None) -> None:
        score = self._evaluate(max_samples)
        bits = f"{score.bits_per_byte:.3f} bits per byte"
        self.console.log(f"step {self.steps.step}  eval loss {score.loss:.3f}, {bits}")

    def _evaluate(self, max_samples: int | None) -> Evaluation:
        """Score evaluation samples, all of them for None; save and stop if asked to meanwhile."""
        # The score on all of them is that of the saved weights, so in fp32, whatever the precision of training. FSDP2
        # gathers the weights in the precision of training, always.
        in_fp32 = max_samples is None and not self.accelerator.is_fsdp2
        autocast = nullcontext if in_fp32 else self.steps.trainer.autocast
        try:
            score = self.task.evaluate(max_samples, self.steps.plan.micro_batch_size, autocast)
        except StoppedError:
            self._save_and_stop()
        if not math.isfinite(score.loss):
            last = self.checkpoints.describe_last()
            raise NonFiniteError(f"the eval loss is {score.loss} at step {self.steps.step}: {last}")
        self.record.evaluation(self.steps.step, score)
        if max_samples is not None:  # scores on all samples are not comparable with these
            self.checkpoints.scores[self.steps.step] = score.loss
        return score

    def _sample(self) -> str:
        """Record a sample and return it as indented lines; torch's random state stays; every process calls."""
        if not (self.accelerator.is_main_process or self.accelerator.is_fsdp2):
            return ""
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            self.steps.trainer.autocast(),
            # A compiled model would be recompiled for each length of the growing text.
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(self.chosen.seed)
            sample = self.task.sample()
        self.record.sample(self.steps.step, sample.prompt, sample.text)
        return "\n".join(f"  | {line}" for line in sample.text.splitlines())

    def _finish(self) -> RunResult:
        """Score all evaluation data, publish the model in the run's root folder, and log the results."""
        score = self._evaluate(None)
        sample, facts = self._sample(), self.task.final_facts()
        if self.accelerator.is_main_process:
            checkpoint = self.checkpoints.writer.last
            assert checkpoint is not None
            self.lock.check()
            self.task.publish(self.folder, checkpoint)
            baselines = self.task.baselines()
            drawn = self.record.finish(self.steps.step, score, baselines, facts)
            self.console.close()
            for line in self._results(score, baselines, sample, drawn):
                self.console.log(line)
        decide_on_main(self.accelerator, self.checkpoints.finish_copy)  # and all wait for it
        return RunResult(folder=self.folder, steps=self.steps.step, evaluation=score)

    # --- what is logged

    def _facts(self) -> dict[str, Any]:
        return {
            "parameters": self.task.model.num_parameters(),
            **self.task.facts(),
            "data_fingerprint": self.task.fingerprint,
            "precision": self.steps.trainer.precision,
            "attn_implementation": self.task.model.config._attn_implementation,
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
        }

    def _introduce(self) -> None:
        """Log what is trained, on what, for how long and where."""
        steps, plan, samples = self.steps, self.steps.plan, self.task.order.samples
        device, processes = self.accelerator.device, self.accelerator.num_processes
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else {"cpu": "the CPU"}.get(device.type)
        epochs = f"{steps.total * plan.batch_size / samples:.2f} epochs, " if samples else ""
        lines = [
            *self.task.describe(),
            f"training {steps.total:,} steps of {plan.batch_size} x {self.task.tokens_per_sample:.0f} tokens, {epochs}"
            f"{steps.trainer.precision} on {where or device.type}, {processes} process{'es' if processes > 1 else ''}",
        ]
        if (warmup := self.options.optimizer.warmup_steps) >= steps.total:
            lines.append(f"note     warmup_steps={warmup} is not below the {steps.total} steps: the rate only rises")
        if self.checkpoint is not None:
            lines.append(f"resumed  after step {steps.step} ({self.checkpoint.name})")
        for line in (*lines, *(f"note     {note}" for note in self.record.notes)):
            self.console.log(line)

    def _record_update(self, report: StepReport) -> None:
        """Record the step; stop the run after too many skipped updates in a row."""
        step, skipped, in_a_row = self.steps.step, report.update.skipped, self.steps.skipped_in_a_row
        self.record.split(step, self.steps.splits)
        self.record.update(step, report)
        self.console.advance()
        if skipped is not None:
            self.console.log(f"step {step} skipped, weights unchanged: {skipped}")
        if in_a_row >= self.chosen.max_skipped_updates:
            raise NonFiniteError(
                f"{in_a_row} updates in a row were skipped, the last at step {step}: {skipped}; its batch is "
                f"{report.batch}, samples {self._samples(step)}; {self.checkpoints.describe_last()}"
            )

    def _samples(self, step: int) -> str:
        ids = self.steps.plan.sample_ids(step - 1).tolist()
        return ", ".join(map(str, ids[:_IDS_SHOWN])) + (", ..." if len(ids) > _IDS_SHOWN else "")

    def _log_step(self, report: StepReport, pace: Pace) -> None:
        step, total, update = self.steps.step, self.steps.total, report.update
        speed = pace.measure(self.accelerator.device)
        self.record.speed(step, speed)
        self.console.step(step, total, update.loss, speed.tokens_per_second, (total - step) * pace.seconds_per_step)
        values = {"loss": update.loss, "learning_rate": report.learning_rate, "grad_norm": update.grad_norm}
        self.record.track("train", step, {**values, **asdict(speed)})

    def _results(self, score: Evaluation, baselines: Mapping[str, float], sample: str, drawn: bool) -> list[str]:
        """Return log lines with the final score, the files that the run wrote, and the command to try next."""
        best, scores = self.checkpoints.best_steps(), self.checkpoints.scores
        bits = [
            f"{score.bits_per_byte:.3f} bits per byte",
            *(f"{name} {bits:.3f}" for name, bits in baselines.items()),
        ]
        before = self.record.scores().get(0)  # on all of it, as the last
        shown = before is not None and self.task.eval_before_training
        brought = f"; it was {before:.4f} before training" if shown else ""
        return [
            f"\n{self.task.eval_name} ({score.text_bytes:,} bytes): {'; '.join(bits)}",
            f"loss {score.loss:.4f} nats per token, perplexity {score.perplexity:.1f}{brought}",
            sample,
            f"model    {self.folder} (from_pretrained loads it)",
            *(f"best     checkpoints/step-{step:08d}, eval loss {scores[step]:.3f} in the run" for step in best[:1]),
            f"curve    {self.folder / CURVE_FILE if drawn else 'not drawn: pip install matplotlib'}",
            f"metrics  {self.folder / METRICS_FILE}",
            f"next     {shlex.join(self.task.next_command(self.folder))}",
        ]
