"""Run folders without a run: what a run would have written, by formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

TOKENS_PER_STEP = 512


def metric_lines(steps: int, *, first: int = 1, eval_steps: int = 10) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of the steps first..steps: a loss that falls, and every kind of line."""
    lines: list[dict[str, Any]] = []
    for step in range(first, steps + 1):
        loss = 1.5 + 4 / (1 + step / 20) + 0.1 * math.sin(step * 12.9898)
        update = {"loss": loss, "grad_norm": 1 + 1 / step, "trained_tokens": TOKENS_PER_STEP}
        lines.append(
            {"kind": "train", "step": step, **update, "learning_rate": 1e-3 / step, "batch": "b", "chain": "c"}
        )
        if step % eval_steps == 0:
            speed = {"tokens_per_second": 1000.0 + step, "seconds": 0.5 * eval_steps, "memory_bytes": 10**8 + step}
            lines.append({"kind": "speed", "step": step, **speed})
            score = {"loss": loss + 0.1, "bits_per_byte": (loss + 0.1) / math.log(2) / 2.5}
            lines.append({"kind": "eval", "step": step, **score, "tokens": 4096})
            lines.append({"kind": "sample", "step": step, "prompt": "The", "text": f" text of step {step}"})
    return lines


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to the metrics of a run."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write_run(
    folder: Path,
    steps: int = 40,
    *,
    planned: int | None = None,
    checkpoints: tuple[int, ...] = (20, 40),
    options: dict[str, Any] | None = None,
) -> Path:
    """Write the folder of a run that has done `steps` of `planned` steps; it is finished if they are equal."""
    planned = steps if planned is None else planned
    folder.mkdir(parents=True)
    chosen = {"training.batch_size": 8, "training.seed": 0, "optimizer.learning_rate": 1e-3} | (options or {})
    lines = metric_lines(steps)
    record: dict[str, Any] = {"options": chosen, "steps": planned, "parameters": 1000, "sessions": [{"after_step": 0}]}
    if steps == planned:
        last = next((line for line in reversed(lines) if line["kind"] == "eval"), {"loss": 2.0, "bits_per_byte": 1.0})
        score = {"loss": last["loss"], "bits_per_byte": last["bits_per_byte"], "tokens": 4000, "text_bytes": 10000}
        record["results"] = {**score, "steps": steps, "beside_bits_per_byte": {"gzip -9": 3.2, "byte unigram": 4.8}}
    (folder / "options.json").write_text(json.dumps(chosen))
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").touch()
    write_lines(folder, lines)
    for step in checkpoints:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder
