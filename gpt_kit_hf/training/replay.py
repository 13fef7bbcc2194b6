"""Replay: compute some steps of a run again from a checkpoint, and compare them with what the run recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gpt_kit_hf.data.instructions.formats import FormatFn
from gpt_kit_hf.options.run import FinetuneOptions, RunOptions, stored_options
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.checkpoints import checkpoint_step, list_checkpoints, verify_checkpoint
from gpt_kit_hf.storage.run_folder import OPTIONS_FILE, RECORD_FILE, recorded_steps
from gpt_kit_hf.training.data_changes import check_replayed_data
from gpt_kit_hf.training.finetune import InstructionTask
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.pretrain import text_task
from gpt_kit_hf.training.runtime.compilation import compile_blocks
from gpt_kit_hf.training.runtime.launch import create_accelerator
from gpt_kit_hf.training.runtime.signals import StopSignals
from gpt_kit_hf.training.steps import StepReport, Steps
from gpt_kit_hf.training.task import RunContext, Task

# How much losses may differ where another number of processes, or another device, rounds differently.
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result: the steps compared, the first difference or "", and whether equality to the bit was required."""

    first: int
    last: int
    difference: str
    exact: bool

    def text(self) -> str:
        """Return the result as one line."""
        if self.difference:
            return self.difference
        how = "identical" if self.exact else f"the same batches, losses within {_TOLERANCE:g}"
        return f"steps {self.first} to {self.last}: {how}"


def replay_steps(
    run: Path, first: int, last: int, *, format_fn: FormatFn | None = None, log: Callable[[str], None]
) -> Replay:
    """Compute the steps first..last of a run again, from the newest intact checkpoint before them.

    Batches must be equal. Losses and gradient norms must be equal to the bit on as many processes, the same kind of
    device and the same version of torch, else nearly. Nothing is written. Raises UsageError for steps that the run
    does not have, and for data that has changed.
    """
    lines = recorded_steps(run, first, last)
    options = _options(run)
    accelerator = create_accelerator(use_cpu=options.training.use_cpu, timeout=options.training.ddp_timeout)
    with StopSignals() as stop:
        context = RunContext(
            options=options.training,
            accelerator=accelerator,
            console=Console(None),
            folder=run,
            checkpoint=_checkpoint_before(run, first, log),
            stop=stop,
        )
        exact = _computes_alike(load_json(run / RECORD_FILE).get("sessions", []), first, last, accelerator, log)
        steps = _prepared_steps(options, context, format_fn)
        steps.begin(last)
        difference = ""
        while steps.step < last and not difference:
            report = steps.take()
            assert report is not None  # a signal raises KeyboardInterrupt here
            if steps.step >= first:
                difference = _difference(steps.step, report, lines[steps.step], exact)
    return Replay(first=first, last=last, difference=difference, exact=exact)


def _options(run: Path) -> RunOptions | FinetuneOptions:
    stored = load_json(run / OPTIONS_FILE)
    kind: type[RunOptions] | type[FinetuneOptions] = (
        FinetuneOptions if "base.model_name_or_path" in stored else RunOptions
    )
    options: RunOptions | FinetuneOptions = stored_options(kind, stored)
    return replace(options, training=replace(options.training, output_dir=str(run), report_to=["none"]))


def _checkpoint_before(run: Path, first: int, log: Callable[[str], None]) -> Path | None:
    for folder in reversed(list_checkpoints(run)):
        if checkpoint_step(folder) < first:
            if not (problems := verify_checkpoint(folder)):
                log(f"from {folder.name}")
                return folder
            log(f"{folder.name} is damaged and not used: {problems[0]}")
    log(f"from the beginning: there is no checkpoint before step {first}")
    return None


def _computes_alike(
    sessions: Sequence[Mapping[str, Any]], first: int, last: int, accelerator: Accelerator, log: Callable[[str], None]
) -> bool:
    """Use as many threads as the run did; return whether the results must be equal to the bit."""
    # A session that resumed after a kill rewrote the steps after its checkpoint: the last one before a step counts.
    wrote = {max(n for n, s in enumerate(sessions) if s["after_step"] < step) for step in (first, last)}
    now = {"processes": accelerator.num_processes, "device": str(accelerator.device), "torch": torch.__version__}
    exact = True
    for session in (sessions[number] for number in sorted(wrote)):
        torch.set_num_threads(session["threads"])
        then = {**session, "torch": session["versions"]["torch"]}
        for name in [name for name in now if now[name] != then[name]]:
            log(f"note: {name} was {then[name]}, is {now[name]}: losses may differ by rounding")
            exact = False
    return exact


def _prepared_steps(options: RunOptions | FinetuneOptions, context: RunContext, format_fn: FormatFn | None) -> Steps:
    task: Task
    if isinstance(options, FinetuneOptions):
        task = InstructionTask(options, context, format_fn)
    else:
        task = text_task(options, context)
    check_replayed_data(task, context.checkpoint, context.folder)
    steps = Steps(options, context, task)
    if context.checkpoint is not None:
        steps.restore(context.checkpoint)
    compile_blocks(task.model, options.training.torch_compile, context.accelerator.device, context.console.log)
    return steps


def _difference(step: int, report: StepReport, line: Mapping[str, Any], exact: bool) -> str:
    """Return how a step differs from its line in metrics.jsonl, or ""."""
    if (report.batch, report.chain) != (line["batch"], line["chain"]):
        return f"step {step} differs: its batch is {report.batch}, was {line['batch']}"
    tolerance = 0.0 if exact else _TOLERANCE
    for name, now in (("loss", report.update.loss), ("grad_norm", report.update.grad_norm)):
        then = line[name]  # null if it was not finite
        if then is None:
            same = not math.isfinite(now)
        else:
            same = math.isclose(now, then, rel_tol=tolerance, abs_tol=tolerance)
        if not same:
            return f"step {step} differs: {name} is {now!r}, was {then!r}"
    return ""
