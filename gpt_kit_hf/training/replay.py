"""Some steps of a run computed again from its checkpoint, and compared with what it wrote down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gpt_kit_hf.data.instructions.dataset import FormatFn
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.run import FinetuneOptions, RunOptions, stored_options
from gpt_kit_hf.storage.atomic_files import load_json, read_jsonl
from gpt_kit_hf.storage.checkpoints import checkpoint_step, list_checkpoints, verify_checkpoint
from gpt_kit_hf.storage.run_folder import METRICS_FILE, OPTIONS_FILE, RECORD_FILE
from gpt_kit_hf.training.console import Console
from gpt_kit_hf.training.finetune import InstructionTask
from gpt_kit_hf.training.pretrain import PretrainingTask, StreamingTask
from gpt_kit_hf.training.runtime.compilation import compile_blocks
from gpt_kit_hf.training.runtime.signals import StopSignals
from gpt_kit_hf.training.state.training_state import read_position
from gpt_kit_hf.training.steps import StepReport, Steps
from gpt_kit_hf.training.task import RunSetting, RunTask

# How far losses may lie apart where another number of processes, or another device, rounds otherwise.
_ROUNDING = 1e-4


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of it: the steps compared, the first one that differs and in what, and how strict it was."""

    first: int
    last: int
    difference: str
    exact: bool

    def text(self) -> str:
        """Return it in a line."""
        if self.difference:
            return self.difference
        how = "identical" if self.exact else f"the same batches, losses within {_ROUNDING:g}"
        return f"steps {self.first} to {self.last}: {how}"


def replay_steps(
    run: Path, first: int, last: int, *, format_fn: FormatFn | None = None, say: Callable[[str], None]
) -> Replay:
    """Compute the steps first..last of a run again, from the newest intact checkpoint before them.

    Batches must be equal, losses and gradient norms too, to the bit where the run computed on as many processes and
    such a device. Nothing is written. Raises UsageError for steps that the run does not have, and for changed data.
    """
    lines = {line["step"]: line for line in read_jsonl(run / METRICS_FILE) if line["kind"] == "train"}
    if not 1 <= first <= last or last not in lines:
        raise UsageError(f"replay {first}:{last}: the run has the steps 1 to {max(lines, default=0)}")
    options = _options(run)
    checkpoint = _checkpoint_before(run, first, say)
    accelerator = Accelerator(cpu=options.training.use_cpu, mixed_precision="no")
    exact = _as_then(load_json(run / RECORD_FILE).get("sessions", []), first, last, accelerator, say)
    with StopSignals() as stop:
        setting = RunSetting(
            options=options.training,
            accelerator=accelerator,
            console=Console(None),
            folder=run,
            checkpoint=checkpoint,
            stop=stop,
        )
        steps = _steps(options, setting, format_fn)
        steps.begin(last)
        while steps.step < last:
            report = steps.take()
            assert report is not None  # a signal raises KeyboardInterrupt here
            if steps.step >= first and (difference := _difference(steps.step, report, lines[steps.step], exact)):
                return Replay(first=first, last=last, difference=difference, exact=exact)
    return Replay(first=first, last=last, difference="", exact=exact)


def _options(run: Path) -> RunOptions | FinetuneOptions:
    stored = load_json(run / OPTIONS_FILE)
    kind: type[RunOptions] | type[FinetuneOptions] = (
        FinetuneOptions if "base.model_name_or_path" in stored else RunOptions
    )
    options: RunOptions | FinetuneOptions = stored_options(kind, stored)
    return replace(options, training=replace(options.training, output_dir=str(run), report_to=["none"]))


def _checkpoint_before(run: Path, first: int, say: Callable[[str], None]) -> Path | None:
    for folder in reversed(list_checkpoints(run)):
        if checkpoint_step(folder) < first:
            if not (problems := verify_checkpoint(folder)):
                say(f"from {folder.name}")
                return folder
            say(f"{folder.name} is damaged and not used: {problems[0]}")
    say(f"from the beginning: there is no checkpoint before step {first}")
    return None


def _as_then(
    sessions: Sequence[Mapping[str, Any]], first: int, last: int, accelerator: Accelerator, say: Callable[[str], None]
) -> bool:
    """Compute with as many threads as the run did; return whether the result must be the same to the bit."""
    # A session that continued after a kill wrote the steps behind its checkpoint anew.
    wrote = {max(n for n, s in enumerate(sessions) if s["after_step"] < step): step for step in (first, last)}
    exact = True
    for number in wrote:
        session = sessions[number]
        torch.set_num_threads(session["threads"])
        now = {"processes": accelerator.num_processes, "device": str(accelerator.device), "torch": torch.__version__}
        then = {**session, "torch": session["versions"]["torch"]}
        for name in [name for name in now if now[name] != then[name]]:
            say(f"note: {name} was {then[name]}, is {now[name]}: losses may differ by rounding")
            exact = False
    return exact


def _steps(options: RunOptions | FinetuneOptions, setting: RunSetting, format_fn: FormatFn | None) -> Steps:
    task: RunTask
    if isinstance(options, FinetuneOptions):
        task = InstructionTask(options, setting, format_fn)
    else:
        task = StreamingTask(options, setting) if options.text.streaming else PretrainingTask(options, setting)
    if setting.checkpoint is not None:
        before = read_position(setting.checkpoint)["corpus"]
        if before != task.fingerprint:
            raise UsageError(f"the data has changed: its fingerprint was {before}, is {task.fingerprint}")
    steps = Steps(options, setting, task)
    if setting.checkpoint is not None:
        steps.restore(setting.checkpoint)
    compile_blocks(task.model, options.training.torch_compile, setting.accelerator.device, setting.console.say)
    return steps


def _difference(step: int, report: StepReport, line: Mapping[str, Any], exact: bool) -> str:
    """Return in what a step differs from its line, or nothing."""
    if (report.batch, report.chain) != (line["batch"], line["chain"]):
        return f"step {step} differs: its batch is {report.batch}, was {line['batch']}"
    for name in ("loss", "grad_norm"):
        now, then = getattr(report.update, name), line[name]
        if then is None:
            same = not math.isfinite(now)
        else:
            same = now == then if exact else math.isclose(now, then, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
        if not same:
            return f"step {step} differs: {name} is {now!r}, was {then!r}"
    return ""
