"""What a run says of itself, in lines: what it begins with, what it came to, and why it could not go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator

from gpt_kit_hf.errors import RunError
from gpt_kit_hf.evaluation.metrics import Evaluation
from gpt_kit_hf.options.run import OptionsOfRun
from gpt_kit_hf.training.steps import Steps
from gpt_kit_hf.training.task import RunTask


def introduction(task: RunTask, steps: Steps, options: OptionsOfRun, accelerator: Accelerator) -> list[str]:
    """Return what is trained, on what, for how long and where."""
    device, plan, samples = accelerator.device, steps.plan, task.order.samples
    where = {"cpu": "the CPU", "cuda": "the GPU"}.get(device.type, device.type)
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    epochs = f"{steps.total * plan.batch_size / samples:.2f} epochs, " if samples else ""
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    lines = [
        *task.describe(),
        f"training {steps.total:,} steps of {plan.batch_size} x {task.tokens_per_sample:.0f} tokens, {epochs}"
        f"{steps.trainer.precision} on {where}, {processes}",
    ]
    if options.optimizer.warmup_steps >= steps.total:
        warmup = options.optimizer.warmup_steps
        lines.append(f"note     warmup_steps={warmup} is not below the {steps.total} steps: the rate only rises")
    return lines


def score_lines(scored_what: str, scored: Evaluation, beside: Mapping[str, float]) -> list[str]:
    """Return the score on all held-out samples, beside what is easily reached."""
    others = "".join(f"; {name} {value:.3f}" for name, value in beside.items())
    return [
        f"\n{scored_what} ({scored.text_bytes:,} bytes): {scored.bits_per_byte:.3f} bits per byte{others}",
        f"loss {scored.loss:.4f} nats per token, perplexity {scored.perplexity:.1f}",
    ]


def explained(error: RuntimeError, processes: int, last_checkpoint: Callable[[], str]) -> Exception:
    """Return what to raise for an error that the end of another process causes, in one line; any other as it is."""
    text = str(error).strip()
    first = text.splitlines()[0][:160] if text else ""
    if first.startswith("DataLoader worker"):
        return RunError(f"a process that loads batches ended ({first}); {last_checkpoint()}: continue with --resume")
    named = any(word in text.lower() for word in ("gloo", "nccl", "connection closed", "connection reset"))
    if isinstance(error, torch.distributed.DistError) or (processes > 1 and named):
        return RunError(f"another process of the run does not answer ({first}); {last_checkpoint()}: use --resume")
    return error
