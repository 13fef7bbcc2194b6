"""The training loop: begins a run or resumes it, and evaluates, samples, logs and saves between the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from gpt_kit_hf.errors import DataError, NonFiniteError, StoppedError, UsageError
from gpt_kit_hf.evaluation.metrics import Evaluation
from gpt_kit_hf.options.run import CHANGED_TEXT, OptionsOfRun, as_begun, changed_options, flat_options
from gpt_kit_hf.options.training import steps_of
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.checkpoints import checkpoint_folder, checkpoint_step
from gpt_kit_hf.storage.lock import RunLock
from gpt_kit_hf.storage.remote_run import RemoteRun
from gpt_kit_hf.storage.run_folder import OPTIONS_FILE, holds_run
from gpt_kit_hf.training.data_changes import data_change
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.log.live import LiveView, Progress
from gpt_kit_hf.training.log.messages import Ending, introduction, run_facts
from gpt_kit_hf.training.log.pace import Pace
from gpt_kit_hf.training.log.run_log import RunRecord, RunResult, finished_before
from gpt_kit_hf.training.log.trackers import Trackers
from gpt_kit_hf.training.needs.due import due_in
from gpt_kit_hf.training.needs.run_needs import measure_needs
from gpt_kit_hf.training.runtime.attention import set_attention
from gpt_kit_hf.training.runtime.compilation import blocks_to_compile, compile_block
from gpt_kit_hf.training.runtime.determinism import deterministic_algorithms
from gpt_kit_hf.training.runtime.launch import end_processes, launcher_pid
from gpt_kit_hf.training.runtime.lost_processes import lost_process, lost_run
from gpt_kit_hf.training.runtime.memory import frozen_objects
from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED, StopSignals
from gpt_kit_hf.training.saving import RunCheckpoints, checkpoint_to_resume
from gpt_kit_hf.training.start import check_fit, continues_run, make_folders, run_accelerator
from gpt_kit_hf.training.steps import BatchError, StepReport, Steps
from gpt_kit_hf.training.task import RunContext, Task, decide_on_main

_STEPS_TO_ESTIMATE = 10  # after which the remaining time is estimated


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
        accelerator = run_accelerator(options)
        console = Console(stream if accelerator.is_main_process else None, chosen.log_format)
        stack.callback(end_processes, accelerator)
        stack.callback(console.close)
        stop = stack.enter_context(StopSignals(launcher_pid()))
        main = accelerator.is_main_process
        remote = RemoteRun(chosen.remote_dir, folder, console.log) if main and chosen.remote_dir is not None else None
        resumes = decide_on_main(accelerator, lambda: continues_run(chosen, folder, remote))
        changes: dict[str, Any] = {}
        lock = RunLock(folder, report=console.log)
        if resumes:
            decide_on_main(accelerator, lambda: _take_lock(stack, lock))
            stored = load_json(folder / OPTIONS_FILE)
            options = as_begun(options, stored)
            changes = changed_options(stored, options, folder)
            longer = changes.keys() & {"training.max_steps", "training.num_train_epochs"}
            other_text = CHANGED_TEXT in (chosen.allow_changes or ())
            if not longer and not other_text and (result := finished_before(folder)) is not None:
                bits = result.evaluation.bits_per_byte
                console.log(f"{folder} is complete: {result.steps} steps, {bits:.3f} bits per byte")
                if remote is not None:
                    remote.finish(result.steps)
                return result
        checkpoint = checkpoint_to_resume(folder, accelerator, console.log) if resumes else None
        check_fit(options, accelerator, folder, checkpoint)
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
        options = options if resumes else task.with_recipe(options)
        set_attention(task.model, chosen.attn_implementation)
        new_data = None if checkpoint is None else data_change(task, checkpoint, folder, chosen.allow_changes)
        loop = _Loop(options, context, task, changes, new_data, lock)
        if not resumes and main:
            # Only now, as options that do not fit must leave everything as it was.
            make_folders(chosen, folder, remote, console.log)
            _take_lock(stack, lock)
            if holds_run(folder):
                raise UsageError(f"output_dir {str(folder)!r}: another run began there meanwhile; name another folder")
        return loop.run()


def _take_lock(stack: ExitStack, lock: RunLock) -> None:
    stack.enter_context(lock)


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
        self.context, self.pace = context, Pace()
        self.steps = Steps(options, context, task)
        self.due = due_in(self.chosen, self.steps.total, eval_before_training=task.eval_before_training)
        self._evaluated: int | None = None  # the step of the last evaluation in the run
        self._check_steps_left()
        self.needs = measure_needs(options, context, task, self.steps, self.due)
        trackers = Trackers(self.chosen, self.console.log, main=self.accelerator.is_main_process)
        self.record = RunRecord(self.folder, self.accelerator, self.console.log, lock.check, trackers)
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
                with frozen_objects():
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
            self.record.close()

    def _prepare(self) -> None:
        steps = self.steps
        done = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        options, facts = flat_options(self.options), run_facts(self.context, self.task, steps, self.needs)
        device, model = self.accelerator.device, self.task.model
        self.to_compile = blocks_to_compile(model, self.chosen.torch_compile, device, self.console.log)
        computing = steps.computing_facts(compiled=bool(self.to_compile))
        self.record.start(
            options, facts, self.changes, self.new_data, computing=computing, done=done, total=steps.total
        )
        if self.accelerator.is_main_process:
            self.checkpoints.scores = self.record.scores(self.chosen.metric_for_best_model)
        if self.checkpoint is not None:
            steps.restore(self.checkpoint)
        steps.splits = self.needs.splits
        warmup = steps_of(self.options.optimizer.warmup_steps, steps.total)
        for line in introduction(self.context, self.task, steps, warmup, self.record.notes):
            self.console.log(line)
        self.console.event("needs", "\n".join(self.needs.lines()), **self.needs.facts())
        self.console.event("begin", None, run=str(self.folder), step=steps.step, steps=steps.total, **facts)
        steps.begin()
        progress = Progress(step=steps.step, steps=steps.total, save_steps=self.due.every.saving)
        if scores := self.checkpoints.scores:
            progress.score = f"eval loss {scores[max(scores)]:.3f} (step {max(scores):,})"
        self.console.show(LiveView(progress, self.pace, device))

    def _train(self) -> None:
        steps, pace, first = self.steps, self.pace, self.steps.step
        # A run that stops on request leaves evaluation and sample of its last step to the one that continues.
        done = decide_on_main(self.accelerator, lambda: self.record.kinds_at(first))
        if self.due.evaluation(first) and "eval" not in done:
            self._evaluate_and_log(self.chosen.max_eval_samples if first else None)
        if first and "eval" in done:
            self._evaluated = first
        if first < steps.total and self.due.sample(first) and "sample" not in done:
            self._sample()
        # Only now: the compiler takes every size that it has seen to change for one that changes, also in training.
        for block in self.to_compile:
            compile_block(block, self.accelerator.device)
        while steps.step < steps.total and not self._stops_early():
            began = time.perf_counter()
            report = self._take_step()
            self._record_update(report)
            pace.add(time.perf_counter() - began, report.update.trained_tokens)
            due = steps.step % self.due.every.logging == 0 or steps.step == steps.total
            if self.needs.seconds is None and steps.step == first + _STEPS_TO_ESTIMATE and not due:
                self.console.estimate(steps.step, steps.total, report.update.loss, pace.seconds_per_step)
            if due:
                self._log_step(report)
            if report.stop:
                self._save_and_stop()
            if steps.step < steps.total:
                self._evaluate_sample_save()
        if self.chosen.best_kept and self._evaluated != steps.step:
            self._evaluate_and_log(self.chosen.max_eval_samples)  # the last checkpoint is compared with the others

    def _take_step(self) -> StepReport:
        """Compute the next step, or save and stop; add step and checkpoint to the message of an error."""
        try:
            report = self.steps.take()
        except BatchError as error:
            step = self.steps.step + 1
            raise DataError(
                f"step {step} cannot be computed: {error}; its samples are {self.steps.samples(step)}; "
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

    def _stops_early(self) -> bool:
        """Return whether the score has not become better for as many evaluations as the options allow."""
        patience, threshold = self.chosen.early_stopping_patience, self.chosen.early_stopping_threshold
        if patience is None or self._evaluated != self.steps.step:
            return False
        return decide_on_main(self.accelerator, lambda: self.checkpoints.evaluations_since_best(threshold) >= patience)

    def _is_to_publish(self) -> bool:
        """Return whether this step has the best score so far, in a run that publishes the best one."""
        if not self.chosen.load_best_model_at_end:
            return False
        return decide_on_main(self.accelerator, lambda: self.checkpoints.evaluations_since_best() == 0)

    def _evaluate_sample_save(self) -> None:
        """Do what is due after this step."""
        step, saves = self.steps.step, self.due.saving(self.steps.step)
        if self.due.evaluation(step):
            self._evaluate_and_log(self.chosen.max_eval_samples)
            saves = saves or self._is_to_publish()
        if self.due.sample(step):
            self._sample()
        if saves:
            with self.console.activity("saving a checkpoint"):
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
        step, values = self.steps.step, {"loss": score.loss, "bits_per_byte": score.bits_per_byte}
        self._evaluated = step
        shown = f"eval loss {score.loss:.3f}, {score.bits_per_byte:.3f} bits per byte"
        self.console.event("eval", f"step {step:,}  {shown}", step=step, **values)
        self.console.score(f"{shown} (step {step:,})")

    def _evaluate(self, max_samples: int | None, *, last: bool = False) -> Evaluation:
        """Score evaluation samples, all of them for None; save and stop if asked to meanwhile."""
        # The score on all of them is that of the saved weights, so in fp32, whatever the precision of training. FSDP2
        # gathers the weights in the precision of training, always.
        in_fp32 = max_samples is None and not self.accelerator.is_fsdp2
        autocast = nullcontext if in_fp32 else self.steps.trainer.autocast
        try:
            with self.console.activity("evaluating"), self.steps.average.in_model():
                score = self.task.evaluate(max_samples, self.steps.micro_batch_size, autocast)
        except StoppedError:
            self._save_and_stop()
        if not math.isfinite(score.loss):
            newest = self.checkpoints.describe_last()
            raise NonFiniteError(f"the eval loss is {score.loss} at step {self.steps.step}: {newest}")
        self.record.evaluation(self.steps.step, score, last=last)
        values = {"loss": score.loss, "bits_per_byte": score.bits_per_byte}
        if max_samples is not None:  # scores on all samples are not comparable with these
            self.checkpoints.scores[self.steps.step] = values[self.chosen.metric_for_best_model]
        return score

    def _sample(self) -> None:
        """Write a text sample; torch's random state stays; every process calls."""
        if not (self.accelerator.is_main_process or self.accelerator.is_fsdp2):
            return
        with (
            self.console.activity("writing a sample"),
            torch.no_grad(),
            torch.random.fork_rng(),
            self.steps.trainer.autocast(),
            self.steps.average.in_model(),
            # A compiled model would be recompiled for each length of the growing text.
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(self.chosen.seed)
            sample = self.task.sample()
        step, facts = self.steps.step, {"prompt": sample.prompt, "text": sample.text}
        self.record.sample(step, **facts)
        lines = "\n".join(f"  | {line}" for line in sample.text.splitlines())
        self.console.event("sample", f"step {step:,}  a sample of what the model writes:\n{lines}", step=step, **facts)

    def _finish(self) -> RunResult:
        """Score all evaluation data, publish the model in the run's root folder, and log the results."""
        self.steps.average.stay_in_model()
        published = decide_on_main(self.accelerator, self.checkpoints.to_publish)
        if published != self.steps.step:
            self.task.load_weights(checkpoint_folder(self.folder, published))
        score = self._evaluate(None, last=True)
        self._sample()
        facts = self.task.final_facts()
        if self.accelerator.is_main_process:
            self.lock.check()
            self.task.publish(self.folder, checkpoint_folder(self.folder, published))
            baselines = self.task.baselines()
            drawn = self.record.finish(self.steps.step, published, score, baselines, facts)
            self.console.close()
            ending = self._ending(score, baselines, drawn, published)
            self.console.event("finish", "\n".join(ending.lines()), step=self.steps.step, **ending.facts())
        decide_on_main(self.accelerator, self.checkpoints.finish_copy)  # and all wait for it
        return RunResult(folder=self.folder, steps=self.steps.step, evaluation=score)

    def _ending(self, score: Evaluation, baselines: Mapping[str, float], drawn: bool, published: int) -> Ending:
        best, scores = self.checkpoints.best_steps(), self.checkpoints.scores
        return Ending(
            folder=self.folder,
            eval_name=self.task.eval_name,
            score=score,
            baselines=baselines,
            # On all of it, as the last.
            before=self.record.scores().get(0) if self.task.eval_before_training else None,
            metric=self.chosen.metric_for_best_model,
            scores=scores,
            best=best[0] if best else None,
            published=published,
            steps=(self.steps.step, self.steps.total),
            curve=drawn,
            next_command=self.task.next_command(self.folder),
        )

    # --- what is logged

    def _record_update(self, report: StepReport) -> None:
        """Record the step; stop the run after too many skipped updates in a row."""
        step, skipped, in_a_row = self.steps.step, report.update.skipped, self.steps.skipped_in_a_row
        self.record.split(step, self.steps.splits)
        self.record.update(step, report)
        self.console.advance(step, report.update.loss)
        if skipped is not None:
            line = f"step {step} skipped, weights unchanged: {skipped}"
            self.console.event("skipped", line, step=step, reason=skipped)
        if in_a_row >= self.chosen.max_skipped_updates:
            raise NonFiniteError(
                f"{in_a_row} updates in a row were skipped, the last at step {step}: {skipped}; its batch is "
                f"{report.batch}, samples {self.steps.samples(step)}; {self.checkpoints.describe_last()}"
            )

    def _log_step(self, report: StepReport) -> None:
        step, total, update = self.steps.step, self.steps.total, report.update
        speed, left = self.pace.measure(self.accelerator.device), (total - step) * self.pace.seconds_per_step
        values = {"loss": update.loss, "learning_rate": report.learning_rate, "grad_norm": update.grad_norm}
        self.record.speed(step, speed, values)
        self.console.step(step, total, left, **values, **asdict(speed))
