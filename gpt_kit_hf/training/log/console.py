"""What a user sees of a run: lines of text or JSON, and a live view below them if the stream is a terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TextIO

from gpt_kit_hf.text import duration, finite, short

if TYPE_CHECKING:
    from gpt_kit_hf.training.log.live import LiveView


class Console:
    """Writes what happens in a run. Without a stream it is silent.

    `log_format` is "text", lines for people, or "json", an object a line. On a terminal, `show` adds a view of the
    progress below the lines of text; `view` is that view, None where there is none. `color` says whether lines of text
    may have colours.
    """

    def __init__(self, stream: TextIO | None, log_format: Literal["text", "json"] = "text") -> None:
        self._stream, self._json = stream, log_format == "json"
        self.interactive = stream is not None and not self._json and stream.isatty()
        # https://no-color.org
        self.color = self.interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.view: LiveView | None = None

    def log(self, line: str = "") -> None:
        """Write a line."""
        self.event("message", line, text=line)

    def event(self, name: str, line: str | None, **facts: Any) -> None:
        """Write what happened: as text the line, if it is not None; as JSON the name and the facts."""
        if self._json:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            self._write(json.dumps(finite({"event": name, "time": now, **facts})))
        elif line is not None:
            self._write(line)

    def step(self, step: int, steps: int, seconds_left: float, **facts: Any) -> None:
        """Write how far the run is: loss, speed and memory, in `facts`. The view, if there is one, shows it itself."""
        speed, memory = f"{short(facts['tokens_per_second'])} tokens/s", f"{gigabytes(facts['memory_bytes'])} memory"
        line = f"step {step:,}/{steps:,}  loss {facts['loss']:.3f}  {speed}  {memory}  {duration(seconds_left)} left"
        shown = None if self.view is not None else line
        self.event("step", shown, step=step, steps=steps, seconds_left=seconds_left, **facts)

    def estimate(self, step: int, steps: int, loss: float, seconds_per_step: float) -> None:
        """Write a first estimate of the time left, before the first line of `step`, if there is no view."""
        if self.view is None:
            left = duration((steps - step) * seconds_per_step)
            self.log(f"step {step:,}/{steps:,}  loss {loss:.3f}  about {left} left, without evaluations")

    def show(self, view: LiveView) -> None:
        """Show a view below the lines from now on, if the stream is a terminal."""
        if self.interactive and self._stream is not None:
            with self._leave_if_closed():
                self.view = view if view.start(self._stream) else None

    def advance(self, step: int, loss: float) -> None:
        """Show a step in the view."""
        if self.view is not None:
            with self._leave_if_closed():
                self.view.advance(step, loss)

    def score(self, score: str) -> None:
        """Show the last evaluation in the view."""
        if self.view is not None:
            self.view.progress.score = score

    @contextmanager
    def activity(self, what: str) -> Iterator[None]:
        """Name in the view what the run does between two steps."""
        for shown in (what, ""):
            if self.view is not None:
                with self._leave_if_closed():
                    self.view.set_activity(shown)
            if shown:
                yield

    def close(self) -> None:
        """Remove the view."""
        view, self.view = self.view, None
        if view is not None:
            with self._leave_if_closed():
                view.stop()

    def _write(self, line: str) -> None:
        if self._stream is None:
            return
        encoding = self._stream.encoding or "utf-8"
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        with self._leave_if_closed():
            if self.view is not None:
                self.view.write(line)
            else:
                self._stream.write(f"{line}\n")
                self._stream.flush()

    @contextmanager
    def _leave_if_closed(self) -> Iterator[None]:
        """Continue without output if the reader or the terminal is gone."""
        try:
            yield
        except OSError:
            self._stream, view, self.view = None, self.view, None
            if view is not None:
                with suppress(OSError):
                    view.stop()


def gigabytes(size: int) -> str:
    """Return a size as text: 1.24 GB."""
    return f"{size / 1e9:.2f} GB"
