"""The loop of a run: what it records, what it saves, and how it continues."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list

from gpt_kit_hf.errors import DataError, NonFiniteError, StoppedError, UsageError
from gpt_kit_hf.evaluation.metrics import Evaluation
from gpt_kit_hf.options.run import OptionsOfRun, changed_options, flat_options
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.checkpoints import checkpoint_step
from gpt_kit_hf.storage.lock import RunLock
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
from gpt_kit_hf.training.console import Console, Pace, trackers
from gpt_kit_hf.training.run_log import RunRecord, RunResult, finished_before
from gpt_kit_hf.training.runtime.compilation import compile_blocks
from gpt_kit_hf.training.runtime.launch import check_launch, end_processes, launcher_pid
from gpt_kit_hf.training.runtime.memory import reuse_freed_memory
from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED, StopSignals
from gpt_kit_hf.training.saving import RunCheckpoints, checkpoint_to_continue
from gpt_kit_hf.training.state.training_state import read_position
from gpt_kit_hf.training.steps import StepReport, Steps
from gpt_kit_hf.training.summary import explained, introduction, score_lines
from gpt_kit_hf.training.task import RunSetting, RunTask
from gpt_kit_hf.training.trainer import resolve_precision

Prepare = Callable[[RunSetting], RunTask]


def run_training(options: OptionsOfRun, prepare: Prepare, *, stream: TextIO | None) -> RunResult:
    """Begin a run, or continue it, in the folder that the options name; `prepare` reads the data and makes the model.

    Raises UsageError for options that do not fit each other, the data, the launch or the device, before anything is
    written; NonFiniteError if too many updates in a row could not be made; RunError if one of its processes ended or
    memory ran out; StoppedError when a signal asked it to stop, and it did so after saving.
    """
    try:
        return _begin_or_continue(options, prepare, stream)
    except RuntimeError as error:  # another process may end while all make ready
        state = PartialState._shared_state  # which does not know how many there are until all have met
        processes = state.get("num_processes", 2) if state else 1
        raise explained(error, processes, lambda: "its checkpoints are as they were") from error


def _begin_or_continue(options: OptionsOfRun, prepare: Prepare, stream: TextIO | None) -> RunResult:
    chosen = options.training
    tracked = trackers(chosen.report_to) or None
    # AMPTrainer does the mixed precision.
    accelerator = Accelerator(
        cpu=chosen.use_cpu, mixed_precision="no", log_with=tracked, project_dir=chosen.output_dir
    )
    check_launch(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UsageError(
            "DeepSpeed's engine is not driven by this loop: use examples/accelerate/fsdp2.yaml, or ddp.yaml"
        )
    if accelerator.device.type == "cpu":
        reuse_freed_memory()
    folder = Path(chosen.output_dir)
    console = Console(stream if accelerator.is_main_process else None)
    with ExitStack() as stack:
        stack.callback(end_processes, accelerator)
        stack.callback(console.close)
        stop = stack.enter_context(StopSignals(launcher_pid()))
        continues = _may_go_on(accelerator, folder, options)
        changes: dict[str, Any] = {}
        if continues:
            if accelerator.is_main_process:
                stack.enter_context(RunLock(folder))
            changes = changed_options(load_json(folder / OPTIONS_FILE), options, folder)
            longer = changes.keys() & {"training.max_steps", "training.num_train_epochs"}
            if not longer and (result := finished_before(folder)) is not None:
                console.say(
                    f"{folder} is complete: {result.steps} steps, {result.evaluation.bits_per_byte:.3f} bits per byte"
                )
                return result
        run = _Run(options, prepare, accelerator, console, stop, changes if continues else None)
        if not continues and accelerator.is_main_process:
            # Only now: options that do not fit have left everything as it was.
            moved = make_run_folder(folder, overwrite=chosen.overwrite)
            if moved is not None:
                console.say(f"the run that was in {folder} lies now in {moved}")
            stack.enter_context(RunLock(folder))
            if holds_run(folder):
                raise UsageError(f"another run began in output_dir {str(folder)!r} meanwhile: name another folder")
        return run.go()


def _may_go_on(accelerator: Accelerator, folder: Path, options: OptionsOfRun) -> bool:
    """Return whether the run continues one in the folder; one process looks, and all end where it may do neither."""
    chosen = options.training
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
    return bool(continues)


# So many steps show how long the rest will take.
_STEPS_TO_ESTIMATE = 10
# What a message names of a batch.
_IDS_SHOWN = 8


class _Run:
    """The parts of a run, made once in the order in which they depend on each other, and the loop over its steps."""

    def __init__(
        self,
        options: OptionsOfRun,
        prepare: Prepare,
        accelerator: Accelerator,
        console: Console,
        stop: StopSignals,
        changes: Mapping[str, Any] | None,
    ) -> None:
        self.options, self.accelerator, self.console, self.stop = options, accelerator, console, stop
        self.chosen = options.training
        self.folder = Path(self.chosen.output_dir)
        self.changes = changes or {}
        self.checkpoint = None
        if changes is not None:
            self.checkpoint = checkpoint_to_continue(self.folder, accelerator, console.say)
        self._check_precision()
        setting = RunSetting(
            options=self.chosen,
            accelerator=accelerator,
            console=console,
            folder=self.folder,
            checkpoint=self.checkpoint,
            stop=stop,
        )
        self.task = prepare(setting)
        self._check_data()
        self.steps = Steps(options, setting, self.task)
        self.record = RunRecord(self.folder, accelerator, console.say)
        self.checkpoints = RunCheckpoints(setting, self.task, self.steps, self.record)

    def go(self) -> RunResult:
        """Train from the first step, or the one after the checkpoint, to the last."""
        try:
            with self.stop.granted_between_steps():
                return self._train()
        except RuntimeError as error:
            raise explained(error, self.accelerator.num_processes, self.checkpoints.say_last) from error
        finally:
            self.checkpoints.wait()

    def _train(self) -> RunResult:
        steps = self.steps
        done = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        self.record.start(flat_options(self.options), self._facts(), self.changes, done=done, total=steps.total)
        if self.accelerator.is_main_process:
            self.checkpoints.scores = self.record.scores()
        if self.checkpoint is not None:
            steps.restore(self.checkpoint)
        self._introduce()
        compile_blocks(self.task.model, self.chosen.torch_compile, self.accelerator.device, self.console.say)
        steps.begin()
        self.console.start(steps.step, steps.total)
        self._loop()
        self.checkpoints.save(must=True)
        return self._finish()

    def _loop(self) -> None:
        steps, pace, first = self.steps, Pace(), self.steps.step
        if self.task.scored_first and first == 0:
            self._say_score(self._evaluate(None))
        while steps.step < steps.total:
            began = time.perf_counter()
            report = self._take()
            if report is None:
                self._stop()
            self._after_update(report)
            pace.add(time.perf_counter() - began)
            if steps.step == first + _STEPS_TO_ESTIMATE:
                left = pace.seconds_per_step * (steps.total - steps.step)
                self.console.say(f"expected {duration(left)}, and the evaluations")
            if steps.step % self.chosen.logging_steps == 0 or steps.step == steps.total:
                self._log(report, pace.seconds_per_step)
            if report.stop:
                self._stop()
            if steps.step < steps.total:
                self._now_and_then()

    def _take(self) -> StepReport | None:
        """Compute the next step; what of a batch cannot be read or computed is an error of one line."""
        try:
            return self.steps.take()
        except (ConnectionError, EOFError) as error:
            if not self.chosen.dataloader_num_workers or str(error).startswith(
                "Caught"
            ):  # which is of a loader that lives
                raise
            # The tensors of a loader that was killed cannot be fetched any more.
            ended = RuntimeError(f"DataLoader worker: {error}")
            raise explained(ended, self.accelerator.num_processes, self.checkpoints.say_last) from error
        except ValueError as error:
            if isinstance(error, UsageError) or "vocab_size" not in str(error):
                raise
            step = self.steps.step + 1
            raise DataError(
                f"step {step} cannot be computed: {error}; its samples are {self._samples(step)}; "
                f"{self.checkpoints.say_last()}"
            ) from error

    def _stop(self) -> NoReturn:
        """Save where the run is, and end it: somebody asked."""
        done, saved = self.steps.step, "nothing to save yet"
        if done:
            self.checkpoints.save(must=True)
            saved = f"saved in {self.folder}: continue with --resume"
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            raise SystemExit(EXIT_STOPPED)  # one process says it
        cause = self.stop.reason or "a signal to another of its processes"
        raise StoppedError(f"stopped by {cause} after step {done} of {self.steps.total}, {saved}")

    # --- preparation

    def _check_precision(self) -> None:
        """Refuse what can be refused before a large text is read."""
        precision = resolve_precision(self.chosen.mixed_precision, self.accelerator.device)
        before = load_json(self.folder / RECORD_FILE)["precision"] if self.checkpoint is not None else precision
        if before != precision and "mixed_precision" not in (self.chosen.allow_changes or ()):
            raise UsageError(
                f"cannot resume {str(self.folder)!r} in {precision}: it was begun in {before}; give --mixed_precision "
                f"{before}, or allow it by --allow_changes mixed_precision"
            )
        if self.chosen.batch_size % self.accelerator.num_processes:
            raise UsageError(
                f"batch_size={self.chosen.batch_size} must be divisible by the number of processes, "
                f"{self.accelerator.num_processes}"
            )

    def _check_data(self) -> None:
        """Refuse to continue with other data than before, and say what is other."""
        if self.checkpoint is None:
            return
        before = read_position(self.checkpoint)["corpus"]
        if before != self.task.fingerprint:
            record, now = load_json(self.folder / RECORD_FILE), self.task.facts()
            differ = [
                f"{name} was {record.get(name)}, is {now[name]}" for name in now if record.get(name) != now[name]
            ]
            listed = "; ".join(line for line in differ if len(line) < 200) or "as much, but other"
            raise UsageError(
                f"cannot resume {str(self.folder)!r} with other data ({listed}): its fingerprint was {before}, "
                f"that of the data now is {self.task.fingerprint}; bring it back, or name another output_dir"
            )

    # --- what is said and written

    def _facts(self) -> dict[str, Any]:
        return {
            "parameters": self.task.model.num_parameters(),
            **self.task.facts(),
            "data_fingerprint": self.task.fingerprint,
            "precision": self.steps.trainer.precision,
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
        }

    def _introduce(self) -> None:
        for line in introduction(self.task, self.steps, self.options, self.accelerator):
            self.console.say(line)
        if self.checkpoint is not None:
            self.console.say(f"resumed  after step {self.steps.step} ({self.checkpoint.name})")
        for note in self.record.notes:
            self.console.say(f"note     {note}")

    def _after_update(self, report: StepReport) -> None:
        """Record the step; stop the run if too many in a row left the weights as they were."""
        step, update = self.steps.step, report.update
        self.record.update(step, report)
        self.console.advance()
        if update.skipped is not None:
            self.console.say(f"step {step} left the weights as they were: {update.skipped}")
        if self.steps.skipped_in_a_row >= self.chosen.max_skipped_updates:
            raise NonFiniteError(
                f"{self.steps.skipped_in_a_row} updates in a row were skipped, the last at step {step}: "
                f"{update.skipped}; its batch is {report.batch}, samples {self._samples(step)}; "
                f"{self.checkpoints.say_last()}"
            )

    def _samples(self, step: int) -> str:
        ids = self.steps.plan.sample_ids(step - 1).tolist()
        return ", ".join(map(str, ids[:_IDS_SHOWN])) + (", ..." if len(ids) > _IDS_SHOWN else "")

    def _log(self, report: StepReport, seconds_per_step: float) -> None:
        step, total, update = self.steps.step, self.steps.total, report.update
        speed = self.steps.plan.batch_size * self.task.tokens_per_sample / seconds_per_step
        self.console.step(step, total, update.loss, speed, (total - step) * seconds_per_step)
        values = {"loss": update.loss, "learning_rate": report.learning_rate, "grad_norm": update.grad_norm}
        self.record.track("train", step, {**values, "tokens_per_second": speed})

    # --- now and then

    def _now_and_then(self) -> None:
        step, saves = self.steps.step, self.steps.step % self.chosen.save_steps == 0
        if step % self.chosen.eval_steps == 0 or (saves and self.chosen.keep_best):
            self._say_score(self._evaluate(self.chosen.max_eval_samples))
        if self.chosen.sample_steps and step % self.chosen.sample_steps == 0:
            self.console.say(self._sample())
        if saves:
            self.checkpoints.save(must=False)

    def _say_score(self, scored: Evaluation) -> None:
        self.console.say(
            f"step {self.steps.step}  held-out loss {scored.loss:.3f}, {scored.bits_per_byte:.3f} bits per byte"
        )

    def _evaluate(self, max_samples: int | None) -> Evaluation:
        """Score held-out samples; ends the run where it is asked to stop meanwhile."""
        # The score on all of them is that of the weights as they are saved, whatever the precision of the training.
        autocast = nullcontext if max_samples is None else self.steps.trainer.autocast
        try:
            scored = self.task.evaluate(max_samples, self.steps.plan.micro_batch_size, autocast)
        except StoppedError:
            self._stop()
        if not math.isfinite(scored.loss):
            raise NonFiniteError(
                f"the held-out loss is {scored.loss} at step {self.steps.step}: {self.checkpoints.say_last()}"
            )
        self.record.evaluation(self.steps.step, scored)
        if max_samples is not None:  # scores on all samples do not compare with these
            self.checkpoints.scores[self.steps.step] = scored.loss
        return scored

    def _sample(self) -> str:
        """Return lines that show what the model does; torch's random state does not move."""
        if not (self.accelerator.is_main_process or self.accelerator.is_fsdp2):
            return ""
        # A compiled model would be compiled anew for each length of the growing text.
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            self.steps.trainer.autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(self.chosen.seed)
            return "\n".join(f"  | {line}" for line in self.task.sample().splitlines())

    # --- the end

    def _finish(self) -> RunResult:
        """Score all held-out samples, put the model where the run is, and say what there is now."""
        scored = self._evaluate(None)
        sample = self._sample()  # of a model that is cut, by all processes
        if self.accelerator.is_main_process:
            checkpoint = self.checkpoints.last
            assert checkpoint is not None
            self.task.publish(self.folder, checkpoint)
            beside = self.task.baselines()
            self._conclude(scored, beside, sample, self.record.finish(self.steps.step, scored, beside))
        self.accelerator.wait_for_everyone()
        return RunResult(folder=self.folder, steps=self.steps.step, evaluation=scored)

    def _conclude(self, scored: Evaluation, beside: Mapping[str, float], sample: str, drawn: bool) -> None:
        self.console.close()
        best, scores = self.checkpoints.best_steps(), self.checkpoints.scores
        lines = [
            *score_lines(self.task.scored, scored, beside),
            sample,
            f"model    {self.folder} (from_pretrained loads it)",
            *(f"best     checkpoints/step-{s:08d}, held-out loss {scores[s]:.3f} in the run" for s in best[:1]),
            f"curve    {self.folder / CURVE_FILE if drawn else 'not drawn: pip install matplotlib'}",
            f"metrics  {self.folder / METRICS_FILE}",
            f"next     {shlex.join(self.task.next_command(self.folder))}",
        ]
        for line in lines:
            self.console.say(line)
