"""What a person sees."""

from __future__ import annotations

import io
import json
import math
import re
from datetime import datetime, timedelta, timezone
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.text import duration, printable, short
from gpt_kit_hf.training.log import live
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.log.live import Curve, LiveView, Progress
from gpt_kit_hf.training.log.pace import Pace
from gpt_kit_hf.training.log.trackers import chosen_trackers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (950, "950"), (12_345, "12.3k"), (124_439_808, "124M"), (1.5576e9, "1.56B")]
)
def test_short_counts(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (float("inf"), "unknown time")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_pace_leaves_out_the_first_step() -> None:
    pace, cpu = Pace(), torch.device("cpu")
    pace.add(60.0, 30)
    assert pace.seconds_per_step == 60.0
    assert pace.measure(cpu).tokens_per_second == 0.5
    pace.add(2.0, 50)
    pace.add(4.0, 40)
    assert pace.seconds_per_step == 3.0
    assert pace.measure(cpu).tokens_per_second == 15.0


def test_speed_is_that_since_the_last_measurement() -> None:
    pace, cpu = Pace(), torch.device("cpu")
    for seconds in (9.0, 1.0, 1.0):
        pace.add(seconds, 10)
    first = pace.measure(cpu)
    pace.add(5.0, 20)
    second = pace.measure(cpu)
    assert (first.tokens_per_second, second.tokens_per_second) == (10.0, 4.0)
    assert 0 < first.seconds < second.seconds
    resident = psutil.Process().memory_info().rss
    assert 0.5 * resident < second.memory_bytes < 100 * resident


def test_printable_replaces_control_characters() -> None:
    assert printable("a\tb\nc\x1b[2Jd\x07\u00e9") == "a\tb\nc\ufffd[2Jd\ufffd\u00e9"


SPEED = {"tokens_per_second": 1234.0, "seconds": 8.0, "memory_bytes": 1_500_000_000}
CPU = torch.device("cpu")


def view_of(progress: Progress, seconds: float = 1.0) -> LiveView:
    pace = Pace()
    for _ in range(3):
        pace.add(seconds, 50)
    return LiveView(progress, pace, CPU)


def test_console_writes_lines_to_a_pipe() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.show(view_of(Progress(step=0, steps=10, save_steps=5)))
    with console.activity("evaluating"):
        console.advance(1, 2.5)
    console.step(1, 10, 90.0, loss=2.5, **SPEED)
    console.event("begin", None, steps=10)
    console.estimate(2, 1000, loss=2.25, seconds_per_step=0.2)
    console.log("done")
    console.close()
    line = "step 1/10  loss 2.500  1.23k tokens/s  1.50 GB memory  1 min 30 s left"
    estimate = "step 2/1,000  loss 2.250  about 3 min 20 s left, without evaluations"
    assert stream.getvalue() == f"{line}\n{estimate}\ndone\n"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_console_writes_an_object_a_line(kind: type[io.StringIO]) -> None:
    stream = kind()
    console = Console(stream, "json")
    console.show(view_of(Progress(step=0, steps=10, save_steps=5)))
    console.advance(1, 2.5)
    console.step(1, 10, 90.0, loss=math.nan, **SPEED)
    console.log("two\nlines \u2588")
    console.event("eval", "step 1  eval loss 2.000", step=1, loss=2.0)
    console.close()
    step, message, scored = map(json.loads, stream.getvalue().splitlines())
    now = datetime.now(timezone.utc)
    for each in (step, message, scored):
        assert timedelta(0) <= now - datetime.fromisoformat(each.pop("time")) < timedelta(minutes=1)
    assert step == {"event": "step", "step": 1, "steps": 10, "seconds_left": 90.0, "loss": None, **SPEED}
    assert message == {"event": "message", "text": "two\nlines \u2588"}
    assert scored == {"event": "eval", "step": 1, "loss": 2.0}


def test_console_without_a_stream_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(None)
    console.show(view_of(Progress(step=0, steps=1, save_steps=1)))
    console.step(1, 1, 1.0, loss=1.0, **SPEED)
    console.log("nothing")
    console.close()
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_is_gone_does_not_end_the_run() -> None:
    for stream in (Terminal(), io.StringIO()):
        console = Console(stream)
        console.show(view_of(Progress(step=0, steps=9, save_steps=5)))
        stream.write = Mock(side_effect=OSError(5, "Input/output error"))  # type: ignore[method-assign]
        console.log("lost")
        for step in range(1, 4):
            console.advance(step, 1.0)
        with console.activity("evaluating"):
            pass
        console.close()
        assert stream.write.call_count >= 1


def screen_after(text: str, columns: int) -> list[str]:
    """What a terminal shows after the codes that the view uses; rows are not broken."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part == "\r":
            column = 0
        elif part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part.endswith("K"):
            rows[row] = ""
        elif not part.startswith("\x1b"):
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
            assert column <= columns
    return rows


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(live, "_SECONDS", 0.0)
    return Terminal()


def test_the_view_stays_below_the_lines(terminal: Terminal) -> None:
    console = Console(terminal)
    console.show(view_of(Progress(step=2, steps=10, save_steps=4)))
    console.step(2, 10, 90.0, loss=2.5, **SPEED)  # the view shows it
    console.estimate(2, 10, loss=2.5, seconds_per_step=0.2)
    console.advance(3, 2.5)
    console.log("a line\nand another")
    console.advance(4, 2.0)
    console.score("eval loss 2.100, 3.000 bits per byte (step 4)")
    with console.activity("evaluating"):
        shown = screen_after(terminal.getvalue(), 90)
    assert shown[:2] == ["a line", "and another"]
    assert re.fullmatch(r"step 4 of 10   ━{16}─{24}   40%   6 s left", shown[2])
    loss, *others = re.split(" {3}", "   ".join(shown[3:]))
    assert loss == "loss 2.000 █▁"
    assert others[0] == "50 tokens/s"
    assert others[2:] == ["eval loss 2.100, 3.000 bits per byte (step 4)", "next save at step 8", "evaluating"]
    console.close()
    console.log("after")
    assert [row for row in screen_after(terminal.getvalue(), 90) if row] == ["a line", "and another", "after"]


def test_the_view_is_not_drawn_at_every_step(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(live, "_SECONDS", 5)
    monkeypatch.setattr(live.time, "monotonic", lambda: float(next(now)))
    console = Console(terminal)
    console.show(view_of(Progress(step=0, steps=50, save_steps=50)))
    for step in range(1, 21):
        console.advance(step, 1.0)
    drawn = re.findall(r"step (\d+) of 50", terminal.getvalue())
    console.close()
    assert 3 <= len(drawn) <= 6


@pytest.mark.parametrize("name", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    name: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", name)
    console = Console(terminal)
    console.show(view_of(Progress(step=0, steps=10, save_steps=5)))
    console.advance(1, 2.5)
    console.step(1, 10, 90.0, loss=2.5, **SPEED)
    console.close()
    assert terminal.getvalue().startswith("step 1/10  loss 2.500")
    assert "\x1b" not in terminal.getvalue()


def test_no_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    colour = re.compile(r"\x1b\[[\d;]*m")
    for wanted in (True, False):
        console = Console(terminal)
        assert console.color is wanted
        console.show(view_of(Progress(step=5, steps=10, save_steps=5)))
        console.close()
        assert bool(colour.search(terminal.getvalue())) is wanted
        monkeypatch.setenv("NO_COLOR", "1")
        terminal.truncate(0)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_of_another_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    stream.isatty = lambda: True  # type: ignore[method-assign]
    console = Console(stream)
    console.show(view_of(Progress(step=5, steps=10, save_steps=5, loss=2.0)))
    console.log("Gr\xfc\xdfe \u5317")
    console.close()
    shown = raw.getvalue().decode(encoding)
    assert re.search(r"step 5 of 10   #+-+   50%", re.sub(r"\x1b\[[\d;]*m", "", shown))
    assert r"\u5317" in shown


@pytest.mark.parametrize("width", [10, 20, 40, 79, 200])
def test_the_view_fits_every_width(width: int) -> None:
    view = view_of(Progress(step=12_345, steps=100_000, save_steps=500, loss=2.5), seconds=3.0)
    view.progress.score = "eval loss 2.345, 3.210 bits per byte (step 12,000)"
    for step in range(100):
        view._curve.add(9.0 - 0.01 * step)
    lines = view.lines(width)
    assert max(map(len, lines)) <= width - 3
    shown = " ".join(lines)
    for part in ("step", "12%", "loss 2.5") if width > 12 else ("step",):
        assert part in shown
    if width >= 79:
        assert len(lines) <= 4


def test_rows_broken_by_a_narrower_terminal_are_removed(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that becomes narrower breaks the rows: they take more lines than the library counts."""
    console = Console(terminal)
    console.show(view_of(Progress(step=5, steps=10, save_steps=5, loss=2.0)))
    assert console.view is not None
    wide = console.view.lines(90)
    before = len(terminal.getvalue())
    monkeypatch.setattr(console.view._terminal, "_width", 40)
    console.advance(6, 2.0)
    up = sum(int(n or 1) for n in re.findall(r"\x1b\[(\d*)A", terminal.getvalue()[before:]))
    console.close()
    rows = sum(-(-len(line) // 40) for line in wide)
    assert rows > len(wide)
    assert up == rows - 1


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 100, 1000])
def test_the_curve_is_that_of_the_means(count: int) -> None:
    values = np.cumsum(np.random.default_rng(count).normal(size=count))
    curve = Curve()
    for value in values:
        curve.add(float(value))
        curve.add(math.nan)
    size = next(size for size in (1, 2, 4, 8, 16, 32) if count // size < 32)
    means = values[: count // size * size].reshape(-1, size).mean(axis=1)
    if len(means) > 16:
        means = np.array([means[i : i + 2].mean() for i in range(0, len(means), 2)])
    spread = max(means) - min(means)
    levels = np.rint((means - min(means)) / (spread or 1.0) * 7).astype(int)
    assert curve.text() == "".join("▁▂▃▄▅▆▇█"[level] for level in levels)


def test_trackers_refuse_unknown_and_missing_ones() -> None:
    assert chosen_trackers(["none"]) == []
    assert chosen_trackers(["auto"]) in ([], ["tensorboard"])
    with pytest.raises(UsageError, match="unknown report_to 'tensorbord'; did you mean 'tensorboard'"):
        TrainingOptions(output_dir="x", report_to=["tensorbord"])
    with pytest.raises(UsageError, match="report_to 'comet_ml' is not installed"):
        chosen_trackers(["comet_ml"])
