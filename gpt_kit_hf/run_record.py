"""What a run writes down about itself: its options and facts, a line for each step, its results, and trackers."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gpt_kit_hf.amp import UpdateReport
from gpt_kit_hf.durable_files import append_jsonl, cut_jsonl, load_json, read_jsonl, save_json
from gpt_kit_hf.evaluation import Evaluation
from gpt_kit_hf.progress import draw_curve
from gpt_kit_hf.run_folder import CURVE_FILE, METRICS_FILE, OPTIONS_FILE, RECORD_FILE


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to: its folder, the steps done, and the score on all of the held-out text."""

    folder: Path
    steps: int
    evaluation: Evaluation


class RunRecord:
    """The written record of a run; only the main process writes, all call."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self._accelerator = folder, accelerator
        self._facts: dict[str, Any] = {}

    def start(self, options: Mapping[str, Any], facts: Mapping[str, Any], *, done: int, total: int) -> None:
        """Write what the run is; of the metrics keep what the first `done` of `total` steps wrote."""
        packages = ("gpt-kit-hf", "torch", "transformers", "accelerate", "datasets", "tiktoken")
        versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
        self._facts = {"options": dict(options), "steps": total, "versions": versions, **facts}
        if self._accelerator.is_main_process:
            save_json(self.folder / OPTIONS_FILE, options)
            save_json(self.folder / RECORD_FILE, self._facts)
            if (self.folder / METRICS_FILE).exists():
                # The last evaluation comes after the last checkpoint: it is about to be written again.
                cut_jsonl(
                    self.folder / METRICS_FILE,
                    lambda line: (
                        line["step"] < done
                        or (line["step"] == done and not (done == total and line["kind"] == "evaluation"))
                    ),
                )
        self._accelerator.init_trackers("tensorboard")

    def update(self, step: int, report: UpdateReport, learning_rate: float) -> None:
        """Write the line of a step."""
        line = {"kind": "train", "step": step, "loss": report.loss, "grad_norm": report.grad_norm}
        line |= {"learning_rate": learning_rate, "trained_tokens": report.trained_tokens}
        if report.loss_scale is not None:
            line["loss_scale"] = report.loss_scale
        if report.skipped is not None:
            line["skipped"] = report.skipped
        self._write(line)

    def evaluation(self, step: int, scored: Evaluation) -> None:
        """Write the line of an evaluation, and tell the trackers."""
        values = {"loss": scored.loss, "bits_per_byte": scored.bits_per_byte}
        self._write({"kind": "evaluation", "step": step, **values, "tokens": scored.tokens})
        self.track("held_out", step, values)

    def track(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Tell the trackers."""
        self._accelerator.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def finish(self, step: int, scored: Evaluation, beside: Mapping[str, float]) -> bool:
        """Write the results and draw the curve; return whether it could be drawn."""
        if not self._accelerator.is_main_process:
            return False
        results = {"loss": scored.loss, "bits_per_byte": scored.bits_per_byte, "tokens": scored.tokens}
        results |= {"text_bytes": scored.text_bytes, "steps": step}
        self._facts["results"] = {**results, "beside_bits_per_byte": dict(beside)}
        save_json(self.folder / RECORD_FILE, self._facts)
        lines = read_jsonl(self.folder / METRICS_FILE)
        return draw_curve(lines, self.folder / CURVE_FILE, f"{self.folder.name}: loss")

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._accelerator.is_main_process:
            # JSON has no NaN: a loss that is not finite is null.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            append_jsonl(self.folder / METRICS_FILE, finite)


def finished_before(folder: Path) -> RunResult | None:
    """Return what a run came to that has ended already and whose model is in place, or None."""
    if not (folder / RECORD_FILE).is_file() or not (folder / "config.json").is_file():
        return None
    record = load_json(folder / RECORD_FILE)
    results = record.get("results")
    if results is None or results["steps"] != record["steps"]:
        return None
    scored = Evaluation(loss=results["loss"], tokens=results["tokens"], text_bytes=results["text_bytes"])
    return RunResult(folder=folder, steps=results["steps"], evaluation=scored)
