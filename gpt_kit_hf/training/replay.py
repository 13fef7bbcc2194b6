"""Replay: compute some steps of a run again from a checkpoint, and compare them with what the run recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt_kit_hf.data.instructions.formats import FormatFn
from gpt_kit_hf.options.run import FinetuneOptions, RunOptions, stored_options
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.checkpoints import checkpoint_step, list_checkpoints, verify_checkpoint
from gpt_kit_hf.storage.run_folder import OPTIONS_FILE, RECORD_FILE, recorded_steps
from gpt_kit_hf.training.data_changes import check_replayed_data
from gpt_kit_hf.training.finetune import InstructionTask
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.pretrain import text_task
from gpt_kit_hf.training.runtime.attention import set_attention
from gpt_kit_hf.training.runtime.compilation import compile_blocks
from gpt_kit_hf.training.runtime.determinism import deterministic_algorithms, differing_facts, why_not_exact
from gpt_kit_hf.training.runtime.launch import create_accelerator
from gpt_kit_hf.training.runtime.signals import StopSignals
from gpt_kit_hf.training.steps import StepReport, Steps
from gpt_kit_hf.training.task import RunContext, Task

# By precision: how much losses may differ, relatively and absolutely, where equality to the bit is not promised, and
# gradient norms ten times as much. Another kernel of attention changed 30 steps in bf16 by 2e-4, their norms by 6e-3.
_TOLERANCES = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 5e-3}
_NORM_FACTOR = 10


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result: the steps compared, the first difference or "", and the tolerance, 0 for equality to the bit."""

    first: int
    last: int
    difference: str
    tolerance: float

    def text(self) -> str:
        """Return the result as one line."""
        if self.difference:
            return self.difference
        how = f"the same batches, losses within {self.tolerance:g}" if self.tolerance else "identical"
        return f"steps {self.first} to {self.last}: {how}"


def replay_steps(
    run: Path, first: int, last: int, *, format_fn: FormatFn | None = None, log: Callable[[str], None]
) -> Replay:
    """Compute the steps first..last of a run again, from the newest intact checkpoint before them.

    Batches must be equal. Losses and gradient norms must be equal to the bit if all facts that bits depend on are
    known and equal, and the run was computed on a CPU, or on CUDA with deterministic algorithms; else nearly, and
    `log` is told why. Nothing is written. Raises UsageError for steps that the run does not have, and for data that
    has changed.
    """
    lines = recorded_steps(run, first, last)
    options = _options(run)
    with deterministic_algorithms(options.training.deterministic), StopSignals() as stop:
        context = RunContext(
            options=options.training,
            accelerator=create_accelerator(use_cpu=options.training.use_cpu, timeout=options.training.ddp_timeout),
            console=Console(None),
            folder=run,
            checkpoint=_checkpoint_before(run, first, log),
            stop=stop,
        )
        sessions = _sessions(run, context.checkpoint, last)
        torch.set_num_threads(sessions[-1]["threads"])
        steps, compiled = _prepared_steps(options, context, format_fn)
        tolerance = _tolerance(sessions, steps.computing_facts(compiled=compiled), log)
        steps.begin(last)
        difference = ""
        while steps.step < last and not difference:
            steps.splits = splits = _splits_at(sessions, steps.step + 1)
            report = steps.take()
            assert report is not None  # a signal raises KeyboardInterrupt here
            if steps.splits != splits and not tolerance:
                log(f"note: step {steps.step} ran out of memory: losses may differ by rounding")
                tolerance = _TOLERANCES[steps.trainer.precision]
            if steps.step >= first:
                difference = _difference(steps.step, report, lines[steps.step], tolerance)
    return Replay(first=first, last=last, difference=difference, tolerance=tolerance)


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


def _sessions(run: Path, checkpoint: Path | None, last: int) -> list[dict[str, Any]]:
    """Return the sessions that have computed the steps after a checkpoint, or after the beginning, up to `last`."""
    sessions: list[dict[str, Any]] = load_json(run / RECORD_FILE).get("sessions", [])
    done = 0 if checkpoint is None else checkpoint_step(checkpoint)
    # A session that resumed after a kill rewrote the steps after its checkpoint: the last one before a step counts.
    wrote = {max(n for n, s in enumerate(sessions) if s["after_step"] < step) for step in range(done + 1, last + 1)}
    return [sessions[number] for number in sorted(wrote)]


def _splits_at(sessions: Sequence[Mapping[str, Any]], step: int) -> int:
    """Return into how many parts the micro-batches of a step were cut, as memory had run out."""
    (*_, session) = (session for session in sessions if session["after_step"] < step)
    splits: dict[str, int] = session.get("micro_batch_splits", {})
    return max([1, *(n for since, n in splits.items() if int(since) <= step)])


def _tolerance(sessions: Sequence[Mapping[str, Any]], now: Mapping[str, Any], log: Callable[[str], None]) -> float:
    """Return by how much the results may differ from those of the sessions; log why, if by anything."""
    reasons = dict.fromkeys(line for session in sessions for line in differing_facts(session, now))
    reasons |= dict.fromkeys(why_not_exact(now))
    for reason in reasons:
        log(f"note: {reason}: losses may differ by rounding")
    precisions = {now["precision"], *(session.get("precision", now["precision"]) for session in sessions)}
    return max(_TOLERANCES[name] for name in precisions) if reasons else 0.0


def _prepared_steps(
    options: RunOptions | FinetuneOptions, context: RunContext, format_fn: FormatFn | None
) -> tuple[Steps, bool]:
    """Return the steps, restored to the checkpoint, and whether the model is compiled."""
    task: Task
    if isinstance(options, FinetuneOptions):
        task = InstructionTask(options, context, format_fn)
    else:
        task = text_task(options, context)
    set_attention(task.model, options.training.attn_implementation)
    check_replayed_data(task, context.checkpoint, context.folder)
    steps = Steps(options, context, task)
    if context.checkpoint is not None:
        steps.restore(context.checkpoint)
    device, log = context.accelerator.device, context.console.log
    return steps, compile_blocks(task.model, options.training.torch_compile, device, log)


def _difference(step: int, report: StepReport, line: Mapping[str, Any], tolerance: float) -> str:
    """Return how a step differs from its line in metrics.jsonl, or ""."""
    if (report.batch, report.chain) != (line["batch"], line["chain"]):
        return f"step {step} differs: its batch is {report.batch}, was {line['batch']}"
    for name, now, allowed in (
        ("loss", report.update.loss, tolerance),
        ("grad_norm", report.update.grad_norm, _NORM_FACTOR * tolerance),
    ):
        then = line[name]  # null if it was not finite
        same = not math.isfinite(now) if then is None else math.isclose(now, then, rel_tol=allowed, abs_tol=allowed)
        if not same:
            return f"step {step} differs: {name} is {now!r}, was {then!r}"
    return ""
