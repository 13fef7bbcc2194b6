"""What a person sees."""

from __future__ import annotations

import io

import psutil
import pytest
import torch

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.text import duration, printable, short
from gpt_kit_hf.training.log.console import Console, trackers
from gpt_kit_hf.training.log.pace import Pace


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


def test_console_writes_lines_to_a_pipe() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.start(0, 10)
    console.advance()
    console.step(1, 10, loss=2.5, tokens_per_second=1234, seconds_left=90)
    console.log("done")
    console.close()
    assert stream.getvalue() == "step 1/10  loss 2.500  1.23k tokens/s  1 min 30 s left\ndone\n"


def test_console_writes_lines_above_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    console = Console(stream)
    console.start(2, 10)
    console.step(3, 10, loss=2.5, tokens_per_second=1234, seconds_left=90)
    console.advance()
    console.log("a line")
    console.close()
    console.log("after")
    shown = stream.getvalue()
    assert "a line\n" in shown
    assert "2/10" in shown
    assert shown.endswith("after\n")


def test_console_without_a_stream_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(None)
    console.start(0, 1)
    console.step(1, 1, 1.0, 1.0, 1.0)
    console.log("nothing")
    console.close()
    assert capsys.readouterr() == ("", "")


def test_trackers_refuse_unknown_and_missing_ones() -> None:
    assert trackers(["none"]) == []
    assert trackers(["auto"]) in ([], ["tensorboard"])
    with pytest.raises(UsageError, match="unknown report_to 'tensorbord'; did you mean 'tensorboard'"):
        TrainingOptions(output_dir="x", report_to=["tensorbord"])
    with pytest.raises(UsageError, match="report_to 'comet_ml' is not installed"):
        trackers(["comet_ml"])
