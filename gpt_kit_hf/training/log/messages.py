"""What is said of a run at its beginning and at its end, as lines for people and as facts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt_kit_hf.evaluation.metrics import Evaluation
from gpt_kit_hf.storage.run_folder import CURVE_FILE, METRICS_FILE
from gpt_kit_hf.training.needs.run_needs import RunNeeds
from gpt_kit_hf.training.steps import Steps
from gpt_kit_hf.training.task import RunContext, Task

_OVERFITTED = 0.01  # by which share the score rises above the lowest before a run is said to overfit


def run_facts(context: RunContext, task: Task, steps: Steps, needs: RunNeeds) -> dict[str, Any]:
    """Return what a run trains, on what, and where, and what it takes, for run.json."""
    return {
        "parameters": task.model.num_parameters(),
        **task.facts(),
        "data_fingerprint": task.fingerprint,
        "precision": steps.trainer.precision,
        "attn_implementation": task.model.config._attn_implementation,
        "device": str(context.accelerator.device),
        "processes": context.accelerator.num_processes,
        "needs": needs.facts(),
    }


def introduction(context: RunContext, task: Task, steps: Steps, warmup_steps: int, notes: Sequence[str]) -> list[str]:
    """Return lines on what a run trains, on what, for how long and where."""
    plan, samples, total = steps.plan, task.order.samples, steps.total
    device, processes = context.accelerator.device, context.accelerator.num_processes
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else {"cpu": "the CPU"}.get(device.type)
    epochs = f"{total * plan.batch_size / samples:.2f} epochs, " if samples else ""
    lines = [
        *task.describe(),
        f"training {total:,} steps of {plan.batch_size} x {task.tokens_per_sample:.0f} tokens, {epochs}"
        f"{steps.trainer.precision} on {where or device.type}, {processes} process{'es' if processes > 1 else ''}",
    ]
    if warmup_steps >= total:
        lines.append(
            f"note     warmup_steps={warmup_steps} is not below the {total} steps: the learning rate only rises"
        )
    if context.checkpoint is not None:
        lines.append(f"resumed  after step {steps.step} ({context.checkpoint.name})")
    return [*lines, *(f"note     {note}" for note in notes)]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The results of a run.

    `before` is the loss before the first step, on the same text, None if it is unknown; `scores` are those in the run,
    {step: `metric`}; `best` is the step of the best kept checkpoint, if one is kept for its score, and `published`
    that of the model; `steps` are those done and those planned.
    """

    folder: Path
    eval_name: str
    score: Evaluation
    baselines: Mapping[str, float]
    before: float | None
    metric: str
    scores: Mapping[int, float]
    best: int | None
    published: int
    steps: tuple[int, int]
    curve: bool
    next_command: Sequence[str]

    def lines(self) -> list[str]:
        """Return lines with the score, the files that the run wrote, and the command to try next."""
        score, bits = self.score, [f"{self.score.bits_per_byte:.3f} bits per byte"]
        bits += [f"{name} {value:.3f}" for name, value in self.baselines.items()]
        brought = "" if self.before is None else f"; it was {self.before:.4f} before training"
        return [
            f"\n{self.eval_name} ({score.text_bytes:,} bytes): {'; '.join(bits)}",
            f"loss {score.loss:.4f} nats per token, perplexity {score.perplexity:.1f}{brought}",
            f"model    {self.folder} (from_pretrained loads it)",
            *self._course(),
            f"curve    {self.folder / CURVE_FILE if self.curve else 'not drawn: pip install matplotlib'}",
            f"metrics  {self.folder / METRICS_FILE}",
            f"next     {shlex.join(self.next_command)}",
        ]

    def _course(self) -> list[str]:
        """Return lines on the best checkpoint, an early stop, and a score that has become worse."""
        done, planned = self.steps
        lines, shown = [], {step: f"eval {self.metric.replace('_', ' ')} {x:.3f}" for step, x in self.scores.items()}
        if self.best is not None:
            is_model = " in the run: the published model" if self.best == self.published else " in the run"
            lines.append(f"best     checkpoints/step-{self.best:08d}, {shown[self.best]}{is_model}")
        if done < planned:
            lines.append(f"note     stopped after step {done} of {planned}: the evaluation did not become better")
        within = sorted(step for step in self.scores if step > 0)
        lowest = min(within, key=self.scores.__getitem__, default=0)
        if within and self.scores[within[-1]] > self.scores[lowest] * (1 + _OVERFITTED):
            lines.append(
                f"note     the model overfits: {shown[lowest]} at step {lowest} rose to "
                f"{self.scores[within[-1]]:.3f} at step {within[-1]}; train for fewer steps, add dropout, or publish "
                "the best checkpoint with --load_best_model_at_end true"
                if self.published == done
                else f"note     {shown[lowest]} at step {lowest} rose to {self.scores[within[-1]]:.3f} at step "
                f"{within[-1]}: the model overfits from there on"
            )
        return lines

    def facts(self) -> dict[str, Any]:
        """Return the same as facts."""
        score = self.score
        return {
            "loss": score.loss,
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
            "text_bytes": score.text_bytes,
            "loss_before_training": self.before,
            "beside_bits_per_byte": dict(self.baselines),
            "model": str(self.folder),
            "best_step": self.best,
            "published_step": self.published,
            "planned_steps": self.steps[1],
            "next": list(self.next_command),
        }
