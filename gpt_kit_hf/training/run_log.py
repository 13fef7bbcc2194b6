"""What a run writes down about itself: its options and facts, a line for each step, its results, and trackers."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.evaluation.metrics import Evaluation
from gpt_kit_hf.storage.atomic_files import (
    Report,
    append_jsonl,
    cut_jsonl,
    load_json,
    read_jsonl,
    save_json,
    sync_path,
)
from gpt_kit_hf.storage.run_folder import CURVE_FILE, METRICS_FILE, OPTIONS_FILE, RECORD_FILE
from gpt_kit_hf.training.curve import draw_curve
from gpt_kit_hf.training.steps import StepReport


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to: its folder, the steps done, and the score on all of the held-out text."""

    folder: Path
    steps: int
    evaluation: Evaluation


class RunRecord:
    """The written record of a run; only the main process writes, all call."""

    def __init__(self, folder: Path, accelerator: Accelerator, report: Report) -> None:
        self.folder, self._accelerator, self._report = folder, accelerator, report
        self._facts: dict[str, Any] = {}
        self._unwritten: list[dict[str, Any]] = []
        self._tracking = True
        self.notes: list[str] = []  # why a run that continues will not give the same bits

    def start(
        self,
        options: Mapping[str, Any],
        facts: Mapping[str, Any],
        changes: Mapping[str, Any],
        *,
        done: int,
        total: int,
    ) -> None:
        """Write what the run is; of the metrics keep what the first `done` of `total` steps wrote.

        What each session ran with stays: a run that continues on other machines has several.
        """
        packages = ("gpt-kit-hf", "torch", "transformers", "accelerate", "datasets", "tiktoken")
        versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
        if self._accelerator.is_main_process:
            before = (
                load_json(self.folder / RECORD_FILE).get("sessions", [])
                if (self.folder / RECORD_FILE).exists()
                else []
            )
            session = {
                "after_step": done,
                "processes": self._accelerator.num_processes,
                "device": str(self._accelerator.device),
                "threads": torch.get_num_threads(),
                "changed_options": dict(changes),
                "versions": versions,
            }
            self.notes = _unlike(before[-1], session) if before else []
            self._facts = {"options": dict(options), "steps": total, "versions": versions, **facts}
            self._facts["sessions"] = [*before, session]
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

    def update(self, step: int, report: StepReport) -> None:
        """Write the line of a step."""
        update = report.update
        line = {"kind": "train", "step": step, "loss": update.loss, "grad_norm": update.grad_norm}
        line |= {"learning_rate": report.learning_rate, "trained_tokens": update.trained_tokens}
        line |= {"batch": report.batch, "chain": report.chain}
        if update.loss_scale is not None:
            line["loss_scale"] = update.loss_scale
        if update.skipped is not None:
            line["skipped"] = update.skipped
        self._write(line)

    def evaluation(self, step: int, scored: Evaluation) -> None:
        """Write the line of an evaluation, and tell the trackers."""
        values = {"loss": scored.loss, "bits_per_byte": scored.bits_per_byte}
        self._write({"kind": "evaluation", "step": step, **values, "tokens": scored.tokens})
        self.track("held_out", step, values)

    def track(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Tell the trackers, until one fails: a run does not end because its curve cannot be drawn elsewhere."""
        if self._tracking:
            try:
                self._accelerator.log({f"{group}/{name}": value for name, value in values.items()}, step=step)
            except OSError as error:
                self._tracking = False
                self._report(f"trackers are told no more: {error}")

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

    def scores(self) -> dict[int, float]:
        """Return the held-out loss of each evaluation so far, by step; on the main process."""
        file = self.folder / METRICS_FILE
        lines = read_jsonl(file) if file.exists() else []
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "evaluation"}

    def flush(self) -> None:
        """Return when all lines are on the disk; raise CheckpointError if it does not take them."""
        self._drain()
        if (self.folder / METRICS_FILE).exists():
            sync_path(self.folder / METRICS_FILE)

    def _write(self, line: Mapping[str, Any]) -> None:
        """Add a line; while the disk takes none they wait in memory, so that none is lost."""
        if not self._accelerator.is_main_process:
            return
        # JSON has no NaN: a loss that is not finite is null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._unwritten.append(finite)
        try:
            self._drain()
        except CheckpointError as error:
            if len(self._unwritten) == 1:
                self._report(f"{error}; it is kept, and written when the disk takes it")

    def _drain(self) -> None:
        while self._unwritten:
            append_jsonl(self.folder / METRICS_FILE, self._unwritten[0])
            del self._unwritten[0]


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


def _unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what of a session computes otherwise than the one before it: the same batches, rounded otherwise."""
    return [
        f"{name} was {before[name]}, is {now[name]}: the same batches, and losses that differ by rounding"
        for name in ("processes", "device", "threads")
        if before.get(name, now[name]) != now[name]
    ]
