"""What a run writes about itself: options.json, run.json, a line of metrics.jsonl for each step, and trackers."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gpt_kit_hf.errors import CheckpointError, GPTKitError, one_line
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
from gpt_kit_hf.storage.run_history import eval_changed_after, read_run
from gpt_kit_hf.text import finite
from gpt_kit_hf.training.data_changes import change_notes
from gpt_kit_hf.training.log.curve import draw_curve
from gpt_kit_hf.training.log.pace import Speed
from gpt_kit_hf.training.log.trackers import Trackers
from gpt_kit_hf.training.runtime.determinism import differing_facts
from gpt_kit_hf.training.steps import StepReport


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run: its folder, the number of steps, and the score on all evaluation data."""

    folder: Path
    steps: int
    evaluation: Evaluation


class RunRecord:
    """Writes the record of a run. Every process calls its methods, only the main one writes.

    `check` raises if the main process may not write to the run any more.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, log: Report, check: Callable[[], None], trackers: Trackers
    ) -> None:
        self._accelerator, self._log, self._check = accelerator, log, check
        self._folder, self._name, self._curve = folder, folder.resolve().name, folder / CURVE_FILE
        self._options, self._record, self._metrics = folder / OPTIONS_FILE, folder / RECORD_FILE, folder / METRICS_FILE
        self._facts: dict[str, Any] = {}
        self._unwritten: list[dict[str, Any]] = []
        self._trackers, self._tokens = trackers, 0
        self.notes: list[str] = []  # why a resumed run may round differently

    def start(
        self,
        options: Mapping[str, Any],
        facts: Mapping[str, Any],
        changes: Mapping[str, Any],
        new_data: Mapping[str, Any] | None = None,
        *,
        computing: Mapping[str, Any],
        done: int,
        total: int,
    ) -> None:
        """Write options and facts, keep the metrics of the first `done` of `total` steps, and start the trackers.

        `computing` is what the bits of this session's steps depend on (`runtime.determinism`).
        """
        if self._accelerator.is_main_process:
            before = load_json(self._record) if self._record.exists() else {}
            sessions = before.get("sessions", [])
            session = _session(done, changes, computing)
            self.notes = _rounding_notes(sessions[-1], session) if sessions else []
            if new_data is not None:
                session["data_changed"] = dict(new_data)
                self.notes += change_notes(new_data, done)
            self._facts = {"options": dict(options), "steps": total, "versions": session["versions"], **facts}
            # By which a copy of the run is told from that of another one.
            self._facts["run_id"] = before.get("run_id") or secrets.token_hex(8)
            self._facts["sessions"] = [*sessions, session]
            self._check()
            save_json(self._options, options)
            save_json(self._record, self._facts)
            if self._metrics.exists():
                # What follows the last checkpoint will be written again, unless a finished run is made longer.
                is_over = done == total or "results" not in before
                cut_jsonl(self._metrics, lambda line: line["step"] <= done and not (is_over and _is_last(line, done)))
                self._tokens = sum(line.get("trained_tokens", 0) for line in read_jsonl(self._metrics))
            self._trackers.start(self._facts["run_id"], options, done)

    def update(self, step: int, report: StepReport) -> None:
        """Write the line of a step."""
        # The sums are the digest's, of which `batch` is made.
        update = {name: value for name, value in asdict(report.update).items() if name != "sums" and value is not None}
        line = {"kind": "train", "step": step, **update, "learning_rate": report.learning_rate}
        self._write({**line, "batch": report.batch, "chain": report.chain})
        self._tokens += report.update.trained_tokens

    def evaluation(self, step: int, score: Evaluation, *, last: bool = False) -> None:
        """Write the line of an evaluation, also to the trackers; `last` marks that of the published model."""
        values = {"loss": score.loss, "bits_per_byte": score.bits_per_byte}
        marked = {"last": True} if last else {}
        self._write({"kind": "eval", "step": step, **values, "tokens": score.tokens, **marked})
        self._trackers.log("eval", step, values)

    def speed(self, step: int, speed: Speed, values: Mapping[str, float]) -> None:
        """Write the line of a measured speed; trackers get the values of the step with it."""
        self._write({"kind": "speed", "step": step, **asdict(speed)})
        self._trackers.log("train", step, {**values, "tokens": self._tokens, **asdict(speed)})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Write the line of a text that the model generated."""
        self._write({"kind": "sample", "step": step, "prompt": prompt, "text": text})

    def finish(
        self, steps: int, published: int, score: Evaluation, baselines: Mapping[str, float], facts: Mapping[str, Any]
    ) -> bool:
        """Write the results and draw the curve, on the main process; return whether it could be drawn.

        `steps` were done, fewer than planned after an early stop; `published` is the step of the published model.
        """
        results = {"loss": score.loss, "bits_per_byte": score.bits_per_byte, "tokens": score.tokens}
        results |= {"text_bytes": score.text_bytes, "steps": steps, "published_step": published}
        if steps < self._facts["steps"]:
            self._facts |= {"steps": steps, "planned_steps": self._facts["steps"]}
        self._facts |= facts
        self._check()
        self._facts["results"] = {**results, "beside_bits_per_byte": dict(baselines)}
        save_json(self._record, self._facts)
        return draw_curve(read_run(self._folder), self._curve)

    def fail(self, error: BaseException) -> None:
        """Note in run.json that the session ended with this error, if the file can be written."""
        if not (self._accelerator.is_main_process and self._facts):
            return
        self._note("the error", error=f"{type(error).__name__}: {one_line(error)}")

    def split(self, step: int, splits: int) -> None:
        """Note in run.json into how many parts micro-batches are cut from this step on, if that has changed."""
        if self._accelerator.is_main_process and self._facts:
            known = self._facts["sessions"][-1].get("micro_batch_splits", {})
            if splits != [1, *known.values()][-1]:
                self._note("the size of the micro-batches", micro_batch_splits={**known, str(step): splits})

    def _note(self, what: str, **facts: Any) -> None:
        """Add facts to this session in run.json; a failure is logged, as training can go on."""
        self._facts["sessions"][-1] |= facts
        try:
            self._check()
            save_json(self._record, self._facts)
        except GPTKitError as reason:
            self._log(f"{what} is not noted in {self._record.name}: {one_line(reason)}")

    def scores(self, metric: str = "loss") -> dict[int, float]:
        """Return the loss or bits_per_byte of each evaluation on this text so far, by step; on the main process."""
        since = eval_changed_after(self._facts)
        evaluations = [line for line in self._lines() if line["kind"] == "eval" and line["step"] > since]
        return {line["step"]: line[metric] for line in evaluations}

    def kinds_at(self, step: int) -> set[str]:
        """Return the kinds of lines that there are of this step, such as "eval"; on the main process."""
        return {line["kind"] for line in self._lines() if line["step"] == step}

    def _lines(self) -> list[dict[str, Any]]:
        """Return the lines so far, without the score of a model that was published.

        That is on other samples, and a run that is made longer has it amid the others.
        """
        lines = read_jsonl(self._metrics) if self._metrics.exists() else []
        return [line for line in lines if line.get("last") is not True]

    def close(self) -> None:
        """Close the trackers."""
        self._trackers.close()

    def flush(self) -> None:
        """Write all lines to the disk; raise CheckpointError if that fails."""
        self._drain()
        if self._metrics.exists():
            sync_path(self._metrics)

    def _write(self, line: Mapping[str, Any]) -> None:
        """Append a line; while the disk refuses, lines wait in memory."""
        if not self._accelerator.is_main_process:
            return
        self._unwritten.append(finite(line))
        try:
            self._drain()
        except CheckpointError as error:
            if len(self._unwritten) == 1:
                self._log(f"{error}; the line is kept in memory until it can be written")

    def _drain(self) -> None:
        self._check()
        while self._unwritten:
            append_jsonl(self._metrics, self._unwritten[0])
            del self._unwritten[0]


def finished_before(folder: Path) -> RunResult | None:
    """Return the result of a run that is complete and whose model is in its root folder, else None."""
    if not (folder / RECORD_FILE).is_file() or not (folder / "config.json").is_file():
        return None
    record = load_json(folder / RECORD_FILE)
    results = record.get("results")
    if results is None or results["steps"] != record["steps"]:
        return None
    score = Evaluation(loss=results["loss"], tokens=results["tokens"], text_bytes=results["text_bytes"])
    return RunResult(folder=folder, steps=results["steps"], evaluation=score)


def _is_last(line: Mapping[str, Any], step: int) -> bool:
    """Return whether a line of metrics.jsonl was written after the last checkpoint, that of this step."""
    return line["step"] == step and (line["kind"] == "sample" or line.get("last") is True)


def _session(done: int, changes: Mapping[str, Any], computing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of one invocation; a run that is resumed has several."""
    packages = ("gpt-kit-hf", "torch", "transformers", "accelerate", "datasets", "tiktoken")
    return {
        "after_step": done,
        **computing,
        "changed_options": dict(changes),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def _rounding_notes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return how a session differs from the one before it in what changes rounding, but not the batches."""
    return [f"{line}: the same batches, but losses may differ by rounding" for line in differing_facts(before, now)]
