"""What a person sees of a run: lines, a progress bar on a terminal, and the picture of the loss."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from gpt_kit_hf.durable_files import replace_file
from gpt_kit_hf.errors import UsageError, unknown_name


class Console:
    """Writes a run's progress: lines, and on a terminal a bar below them. Without a stream it is silent."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.interactive = stream is not None and stream.isatty()
        self._bar: tqdm[Any] | None = None

    def say(self, line: str = "") -> None:
        """Write a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._stream is not None:
            coding = self._stream.encoding or "utf-8"
            try:
                self._stream.write(line.encode(coding, "replace").decode(coding) + "\n")
                self._stream.flush()
            except BrokenPipeError:
                self._stream = None  # nobody reads any more: the run goes on

    def start(self, done: int, total: int) -> None:
        """Show the bar of a run that has `done` of `total` steps behind it."""
        if self.interactive:
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self._bar = tqdm(
                total=total, initial=done, file=self._stream, bar_format=layout, dynamic_ncols=True, leave=False
            )

    def step(self, done: int, total: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show the state after a step: in the bar, or as a line where there is none."""
        speed = f"{short(tokens_per_second)} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
        else:
            self.say(f"step {done}/{total}  loss {loss:.3f}  {speed}  {duration(seconds_left)} left")

    def advance(self) -> None:
        """Move the bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Pace:
    """Seconds a step takes; the first step, which compiles and allocates, counts only while it is alone."""

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0

    def add(self, seconds: float) -> None:
        """Count a step."""
        if self._steps == 1:
            self._seconds = 0.0
        self._steps += 1
        self._seconds += seconds

    @property
    def seconds_per_step(self) -> float:
        """The mean so far."""
        return self._seconds / max(1, self._steps - 1)


def printable(text: str) -> str:
    """Return text without control characters, which an untrained model may write and a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(number: float) -> str:
    """Return a count in at most four characters and a unit: 950, 12.3k, 124M, 1.56B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return a time as a person says it: 40 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def draw_curve(records: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Write a picture of training and held-out loss over the steps; return False where matplotlib is missing.

    `records` are the lines of metrics.jsonl.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"] is not None]
    held_out = [(r["step"], r["loss"]) for r in records if r["kind"] == "evaluation"]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="training, each step")
        axes.plot(steps, _smooth(losses), color="#2b5c9e", linewidth=1.6, label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c8452d", marker="o", markersize=4, label="held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    return True


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the running mean with a half-life of a fiftieth of the curve, unbiased at its start."""
    keep = 0.5 ** (50 / max(50, len(values)))
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        smoothed.append(total / weight)
    return smoothed


def trackers(names: list[str]) -> list[str]:
    """Return the trackers that `report_to` names; UsageError for one that is unknown or not installed."""
    if names == ["none"]:
        return []
    if names == ["auto"]:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(unknown_name("report_to", name, ["auto", "none", *LOGGER_TYPE_TO_CLASS]))
        if name not in installed:
            raise UsageError(f"report_to {name!r} is not installed: pip install {name}, or use auto or none")
    return names
