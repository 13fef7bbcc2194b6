"""What a user sees of a run: log lines, a progress bar on a terminal, and the pace of the steps."""

from __future__ import annotations

import importlib.util
from typing import Any, TextIO

from accelerate.tracking import get_available_trackers
from tqdm import tqdm

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.text import duration, short


class Console:
    """Writes log lines, above a progress bar if the stream is a terminal. Without a stream it is silent."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.interactive = stream is not None and stream.isatty()
        self._bar: tqdm[Any] = tqdm(disable=True)

    def log(self, line: str = "") -> None:
        """Write a line."""
        if self._stream is None:
            return
        encoding = self._stream.encoding or "utf-8"
        try:
            tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=self._stream)
            self._stream.flush()
        except BrokenPipeError:
            self._stream = None  # the reader is gone: the run continues without it

    def start(self, done: int, total: int) -> None:
        """Show the bar of a run that has done `done` of `total` steps."""
        layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        shown = {"total": total, "initial": done, "bar_format": layout, "dynamic_ncols": True, "leave": False}
        self._bar = tqdm(**shown, file=self._stream, disable=not self.interactive)

    def step(self, done: int, total: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show loss and speed after a step: in the bar, or as a line if there is none."""
        speed = f"{short(tokens_per_second)} tokens/s"
        if self.interactive:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
        else:
            self.log(f"step {done}/{total}  loss {loss:.3f}  {speed}  {duration(seconds_left)} left")

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def trackers(names: list[str]) -> list[str]:
    """Return the trackers for a `report_to` option. Raises UsageError for one that is not installed."""
    if names == ["none"]:
        return []
    if names == ["auto"]:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:
            raise UsageError(f"report_to {name!r} is not installed: pip install {name}, or use auto or none")
    return names
