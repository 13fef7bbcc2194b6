"""The live view of a run on a terminal: progress, loss, speed, memory, the last score, the next save."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TextIO

import torch
from rich.cells import cell_len
from rich.console import Console as Terminal
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from gpt_kit_hf.text import duration, short
from gpt_kit_hf.training.log.console import gigabytes
from gpt_kit_hf.training.log.pace import Pace, peak_memory

_SECONDS = 0.5  # between two drawings
_LEVELS = "▁▂▃▄▅▆▇█"
_DONE, _LEFT = "━", "─"
_POINTS = 16  # of the curve
_BAR = 40  # columns, at most
_MARGIN = 3  # columns at the right that stay free: a terminal writes ^C there


@dataclass(kw_only=True)
class Progress:
    """What the view shows besides the pace; the loop keeps it up to date."""

    step: int
    steps: int
    save_steps: int
    loss: float = math.nan
    score: str = ""  # the last evaluation
    activity: str = ""  # between two steps


class _Terminal(Terminal):
    def on_broken_pipe(self) -> None:
        """Let the caller decide: the library would end the process."""
        raise


class LiveView:
    """A few lines below the log, drawn at most twice a second and only between steps."""

    def __init__(self, progress: Progress, pace: Pace, device: torch.device) -> None:
        self.progress = progress
        self._pace, self._device = pace, device
        self._curve = Curve()
        self._unicode = True
        self._drawn, self._width, self._lines = -math.inf, 0, [""]

    def start(self, stream: TextIO) -> bool:
        """Draw the view for the first time; return False for a terminal that cannot move its cursor."""
        self._terminal = _Terminal(file=stream, highlight=False)
        if not self._terminal.is_interactive:
            return False
        self._unicode = _can_write(_LEVELS + _DONE + _LEFT, self._terminal.encoding)
        self._live = Live(
            console=self._terminal,
            auto_refresh=False,
            transient=True,
            # What libraries print goes above the view, unless it is not written to this terminal.
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=sys.stderr.isatty(),
            get_renderable=self._render,
        )
        self._live.start()
        self._terminal.show_cursor(True)  # a process that is killed cannot show it again
        self._draw()
        return True

    def advance(self, step: int, loss: float) -> None:
        """Show a step."""
        self.progress.step, self.progress.loss = step, loss
        self._curve.add(loss)
        if time.monotonic() - self._drawn >= _SECONDS:
            self._draw()

    def set_activity(self, what: str) -> None:
        """Show what the run does between two steps, "" for nothing."""
        self.progress.activity = what
        if what:
            self._draw()

    def write(self, line: str) -> None:
        """Write a line above the view."""
        self._clear_after_resize()
        self._terminal.print(Text.from_ansi(line), soft_wrap=True)

    def stop(self) -> None:
        """Remove the view."""
        self._clear_after_resize()
        self._live.stop()

    def lines(self, width: int) -> list[str]:
        """Return the view for a terminal of so many columns."""
        shown, left = self.progress, self.progress.steps - self.progress.step
        save = min(shown.steps, (shown.step // shown.save_steps + 1) * shown.save_steps)
        curve = f" {self._curve.text()}" if self._unicode else ""
        remaining = f"{duration(left * self._pace.seconds_per_step)} left" if self._pace.seconds_per_step else ""
        speed = self._pace.tokens_per_second
        head = [f"step {shown.step:,} of {shown.steps:,}", f"{shown.step / max(1, shown.steps):.0%}", remaining]
        rest = [
            "" if math.isnan(shown.loss) else f"loss {shown.loss:.3f}{curve}",
            f"{short(speed)} tokens/s" if speed else "",
            f"{gigabytes(peak_memory(self._device))} memory",
            shown.score,
            f"next save at step {save:,}",
            shown.activity,
        ]
        bar = min(_BAR, width - _MARGIN - len("   ".join(filter(None, head))) - 3)
        if bar >= 10:
            head.insert(1, self._bar(bar))
        return [*_filled(head, width - _MARGIN), *_filled(rest, width - _MARGIN)]

    def _bar(self, width: int) -> str:
        done = width * self.progress.step // max(1, self.progress.steps)
        full, empty = (_DONE, _LEFT) if self._unicode else ("#", "-")
        return full * done + empty * (width - done)

    def _draw(self) -> None:
        self._clear_after_resize()
        self._drawn = time.monotonic()
        self._live.refresh()

    def _render(self) -> Text:
        self._width, self._lines = self._terminal.width, self.lines(self._terminal.width)
        text = Text("\n".join(self._lines), no_wrap=True, overflow="crop")
        text.highlight_regex(f"[{_DONE}#]+", "cyan")
        text.highlight_regex(f"[{_LEVELS}]+", "green")
        return text

    def _clear_after_resize(self) -> None:
        """Remove the rows into which a narrower terminal has broken the lines: the library counts unbroken ones."""
        width = self._terminal.width
        if width < self._width:
            rows = sum(max(0, -(-cell_len(line) // width) - 1) for line in self._lines)
            codes = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * rows
            self._terminal.control(Control((ControlType.ERASE_IN_LINE, 2), *codes))
        self._width = width


class Curve:
    """The values so far as a line of few characters: each stands for the mean of equally many values."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._size, self._sum, self._count = 1, 0.0, 0  # of the values in the character to come

    def add(self, value: float) -> None:
        """Add a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._size:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * _POINTS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._size *= 2

    def text(self) -> str:
        """Return the curve, from the lowest to the highest of its values."""
        means = self._means
        if len(means) > _POINTS:  # pairs, of which the last may be half
            means = [sum(means[i : i + 2]) / len(means[i : i + 2]) for i in range(0, len(means), 2)]
        if not means:
            return ""
        low, high = min(means), max(means)
        scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
        return "".join(_LEVELS[round((mean - low) * scale)] for mean in means)


def _filled(parts: list[str], width: int) -> list[str]:
    """Return the parts, without the empty ones, in as few lines as they fit in; one that is too long is cut."""
    lines = [""]
    for part in filter(None, parts):
        joined = f"{lines[-1]}   {part}" if lines[-1] else part
        if cell_len(joined) <= width or not lines[-1]:
            lines[-1] = joined[: max(1, width)]
        else:
            lines.append(part[: max(1, width)])
    return lines


def _can_write(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
