"""What a run folder tells about its run: its state, options and results, and its curves by step and by tokens.

Nothing is written, and torch is not needed: a run can be read while another process trains it.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.checkpoints import checkpoint_step, list_checkpoints
from gpt_kit_hf.storage.lock import LEASE_SECONDS
from gpt_kit_hf.storage.metrics_file import MetricsReader, read_object
from gpt_kit_hf.storage.processes import is_of_this_machine, is_running
from gpt_kit_hf.storage.run_folder import (
    EVALUATIONS_FILE,
    INVARIANCE_FILE,
    LOCK_FILE,
    METRICS_FILE,
    OPTIONS_FILE,
    RECORD_FILE,
    holds_run,
)

State: TypeAlias = Literal["missing", "running", "finished", "interrupted", "failed"]
_DEEPEST = 3  # levels of folders in which `find_runs` looks

# The series: the kind of line and its key.
SERIES = {
    "loss": ("train", "loss"),
    "learning_rate": ("train", "learning_rate"),
    "grad_norm": ("train", "grad_norm"),
    "eval_loss": ("eval", "loss"),
    "bits_per_byte": ("eval", "bits_per_byte"),
    "tokens_per_second": ("speed", "tokens_per_second"),
    "memory_bytes": ("speed", "memory_bytes"),
    "seconds": ("speed", "seconds"),
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """A quantity over a run: three sequences of equal length; `tokens` are the trained ones up to each step.

    A value that was not finite, or was not recorded, is NaN.
    """

    steps: Sequence[int] = field(default_factory=lambda: array("q"))
    tokens: Sequence[int] = field(default_factory=lambda: array("q"))
    values: Sequence[float] = field(default_factory=lambda: array("d"))

    @property
    def last(self) -> float:
        """The last finite value, NaN if there is none."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that the model wrote during the run."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """An evaluation: its loss, NaN if it was not finite, and on how many tokens, None if that is not recorded.

    `is_last` marks the one at the end of a run, of the published model on all held-out data.
    """

    step: int
    loss: float
    tokens: int | None
    is_last: bool


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run as its folder shows it.

    `state` is "missing" (no folder, or none with a run), "running", "finished" (all steps are done and scored),
    "interrupted" (stopped on request, or its process ended without a word) or "failed" (with the `error`). `options`
    are flat, by "section.name", and `record` is run.json. `series` has an entry for each name in `SERIES`, without
    points where the run recorded nothing. `skipped` counts the updates that were skipped.
    """

    folder: Path
    state: State
    error: str | None
    options: Mapping[str, Any]
    record: Mapping[str, Any]
    series: Mapping[str, Series]
    scores: tuple[Score, ...]
    samples: tuple[Sample, ...]
    skipped: int
    checkpoints: tuple[int, ...]
    evaluations: tuple[Mapping[str, Any], ...]
    invariance: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def steps_done(self) -> int:
        """The last step of the curves."""
        return max((series.steps[-1] for series in self.series.values() if series.steps), default=0)

    @property
    def steps_planned(self) -> int | None:
        """The number of steps that the run was to do, also if it stopped early; None before it is known."""
        steps = self.record.get("planned_steps", self.record.get("steps"))
        return steps if type(steps) is int else None

    @property
    def step_published(self) -> int | None:
        """The step of the model in the folder of a finished run, None before the end."""
        step = self.results.get("published_step")
        return step if type(step) is int else None

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that were trained, each as often as it was."""
        return self.series["loss"].tokens[-1] if self.series["loss"].tokens else 0

    @property
    def results(self) -> Mapping[str, Any]:
        """The score on all evaluation data, {} before the run is finished."""
        return _object(self.record.get("results"))

    @property
    def baselines(self) -> dict[str, float]:
        """Bits per byte of the evaluation text by methods without a model, {"gzip -9": 3.19}; {} before the end."""
        found = _object(self.results.get("beside_bits_per_byte"))
        return {name: float(bits) for name, bits in found.items() if _is_number(bits)}

    @property
    def bytes_per_token(self) -> float | None:
        """The mean bytes of a token of the evaluation text: a loss of x nats is x / log(2) / this in bits per byte."""
        losses, bits = self.series["eval_loss"].values, self.series["bits_per_byte"].values
        for loss, bpb in zip(reversed(losses), reversed(bits), strict=True):
            if loss > 0 and bpb > 0:
                return loss / math.log(2) / bpb
        return None

    @property
    def elapsed(self) -> Series:
        """The seconds that all sessions of the run had trained at the steps where a speed was measured."""
        sessions = self.record.get("sessions")
        begins = sorted(_begins(sessions) if isinstance(sessions, list) else [])
        measured, total = self.series["seconds"], array("d")
        before = last = 0.0
        for step, seconds in zip(measured.steps, measured.values, strict=True):
            while begins and begins[0] < step:
                begins.pop(0)
                before, last = before + last, 0.0
            last = seconds
            total.append(before + seconds)
        return Series(steps=measured.steps, tokens=measured.tokens, values=total)

    @property
    def best(self) -> tuple[int, float] | None:
        """The step and the evaluation loss of the best checkpoint in the folder, None without one that was scored.

        Evaluations in the run are on a part of the held-out data, so the last one, on all of it, is compared with them
        only if they had as many tokens; it counts if there is no other. Evaluations before training, and before a
        change of the evaluation text, do not count.
        """
        since, kept = max(0, eval_changed_after(self.record)), set(self.checkpoints)
        scored = [each for each in self.scores if each.step > since and each.step in kept and math.isfinite(each.loss)]
        within = [each for each in scored if not each.is_last]
        steps, tokens = {each.step for each in within}, {each.tokens for each in within} - {None}
        within += [each for each in scored if each.is_last and each.step not in steps and tokens == {each.tokens}]
        best = min(within or scored, key=lambda each: (each.loss, each.step), default=None)
        return None if best is None else (best.step, best.loss)


class RunReader:
    """Reads a run folder; each later call of `read` takes only what is new in metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.restarts = 0  # how often the curves began anew, as the run was resumed or replaced
        self._metrics = MetricsReader(folder / METRICS_FILE)
        self._curves = _Curves()

    def read(self) -> RunHistory:
        """Return the run as it is now. Raises CheckpointError for a file that cannot be read."""
        lines = self._metrics.read()
        if self._metrics.restarted:
            self.restarts += 1
            self._curves = _Curves()
        for line in lines:
            self._curves.add(line, self.folder / METRICS_FILE)
        record = read_object(self.folder / RECORD_FILE)
        options = read_object(self.folder / OPTIONS_FILE) or _object(record.get("options"))
        state, error = _state(self.folder, record)
        evaluations = read_object(self.folder / EVALUATIONS_FILE).get("evaluations")
        return RunHistory(
            folder=self.folder,
            state=state,
            error=error,
            options=options,
            record=record,
            series=self._curves.series(),
            scores=tuple(self._curves.scores),
            samples=tuple(self._curves.samples),
            skipped=self._curves.skipped,
            checkpoints=tuple(checkpoint_step(folder) for folder in list_checkpoints(self.folder)),
            evaluations=tuple(map(_object, evaluations)) if isinstance(evaluations, list) else (),
            invariance=read_object(self.folder / INVARIANCE_FILE),
        )


def read_state(folder: Path) -> State:
    """Return the state of the run in a folder, without its curves. Raises CheckpointError as `read_run` does."""
    return _state(folder, read_object(folder / RECORD_FILE))[0]


def read_run(folder: Path) -> RunHistory:
    """Return what the folder tells about its run. Raises CheckpointError for a file that cannot be read."""
    return RunReader(folder).read()


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders in a folder, or the folder itself if it is one, by name.

    Folders within folders are looked at, to three levels; hidden ones, symbolic links and what lies in a run are not.
    """
    return [folder] if holds_run(folder) else sorted(_runs_below(folder, _DEEPEST))


def eval_changed_after(record: Mapping[str, Any]) -> int:
    """Return the last step after which the evaluation text of a run changed, -1 if it never did; from run.json."""
    sessions = [each for each in record.get("sessions", []) if each.get("data_changed")]
    # A run that was killed soon after a change has it again in its next session: the last one counts.
    changes = {each["after_step"]: each["data_changed"] for each in sessions}
    return max((step for step, change in changes.items() if eval_changed(change)), default=-1)


def eval_changed(change: Mapping[str, Any]) -> bool:
    """Return whether the evaluation text is another after a change of the data, or may be."""
    before = change["before"].get("eval_fingerprint")
    return before is None or before != change["now"].get("eval_fingerprint")


class _Curves:
    """The series of a run, to which lines of metrics.jsonl are added."""

    def __init__(self) -> None:
        self._columns = {name: (array("q"), array("q"), array("d")) for name in SERIES}
        self._tokens = 0
        self.scores: list[Score] = []
        self.samples: list[Sample] = []
        self.skipped = 0

    def add(self, line: Mapping[str, Any], source: Path) -> None:
        """Add a line. Raises CheckpointError, which names the source, if it has no step."""
        kind, step = line.get("kind"), line.get("step")
        if type(step) is not int or not 0 <= step < 2**63:
            raise CheckpointError(f"{source}: a line has the step {step!r}")
        if kind == "train":
            trained = line.get("trained_tokens")
            if "skipped" in line:
                self.skipped += 1
            elif type(trained) is int:
                self._tokens += trained
        elif kind == "eval":
            self.scores.append(_score(step, line))
        elif kind == "sample":
            self.samples.append(Sample(step=step, prompt=str(line.get("prompt", "")), text=str(line.get("text", ""))))
        for name, (of, key) in SERIES.items():
            if of == kind:
                steps, tokens, values = self._columns[name]
                steps.append(step)
                tokens.append(self._tokens)
                values.append(_float(line.get(key)))

    def series(self) -> dict[str, Series]:
        """Return the series so far, which do not change with the next line."""
        return {
            name: Series(steps=steps[:], tokens=tokens[:], values=values[:])
            for name, (steps, tokens, values) in self._columns.items()
        }


def _score(step: int, line: Mapping[str, Any]) -> Score:
    tokens = line.get("tokens")
    return Score(
        step=step,
        loss=_float(line.get("loss")),
        tokens=tokens if type(tokens) is int else None,
        is_last=line.get("last") is True,
    )


def _state(folder: Path, record: Mapping[str, Any]) -> tuple[State, str | None]:
    if _is_locked(folder):
        return "running", None
    if not holds_run(folder):
        return "missing", None
    results = _object(record.get("results"))
    if results and results.get("steps") == record.get("steps"):
        return "finished", None
    sessions = record.get("sessions")
    error = _object(sessions[-1]).get("error") if isinstance(sessions, list) and sessions else None
    return ("failed", str(error)) if error else ("interrupted", None)


def _is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of the run.

    That of another machine does if it renewed its lease in time by the clock of this one.
    """
    path, owner = folder / LOCK_FILE, {}
    with suppress(CheckpointError):  # it may be seen before its content, or be replaced at this moment
        owner = read_object(path)
    pid, lease = owner.get("pid"), owner.get("lease")
    if type(pid) is int and is_of_this_machine(owner):
        return is_running(pid, owner.get("started"))
    try:
        age = time.time() - path.lstat().st_mtime
    except OSError:
        return False
    return age <= (float(lease) if isinstance(lease, (int, float)) else LEASE_SECONDS)


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
                continue
            if holds_run(path):
                yield path
            elif levels > 1:
                yield from _runs_below(path, levels - 1)


def _begins(sessions: Iterable[object]) -> Iterator[int]:
    """Yield the step after which each session began."""
    for session in sessions:
        step = _object(session).get("after_step")
        if type(step) is int:
            yield step


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _float(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
