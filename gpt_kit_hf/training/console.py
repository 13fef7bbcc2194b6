"""What a person sees of a run: lines, a progress bar on a terminal, and the picture of the loss."""

from __future__ import annotations

import importlib.util
from typing import Any, TextIO

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.text import duration, short


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
