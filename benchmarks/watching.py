"""What `gpt-kit watch` costs the run that it watches: steps with and without it take turns.

`python benchmarks/watching.py` trains a small model on this project's documentation with `gpt-kit train`, and starts
`gpt-kit watch` for it. For some seconds a client asks for what is new every 2 s, as the open page does; then the
watching program is halted for as long, and so on. Turns are in the order on, off, off, on, so that a machine that gets
slower meets both alike. Measured are

1. the steps in a second in each turn, by the lines of metrics.jsonl, and the median of the pairs' ratios with a 95%
   interval (10,000 resamples of the pairs);
2. the CPU time of the watching program, in percent of the time in which it watched.

The drawing of the browser is not in it. The small model makes many steps, each with a line to read: a larger one makes
fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

PAGE_SECONDS = 2.0  # between two requests of the page
TEXT = Path(__file__).parents[1] / "docs" / "*.md"
COMMAND = (sys.executable, "-m", "gpt_kit_hf.commands.main")
SHAPE = "--encoding bytes --model nano-s --n_layer 2 --n_embd 64 --n_head 2 --max_length 64 --batch_size 8"


@contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*COMMAND, *arguments], text=True, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait()


class Page:
    """Asks as the page does: for what is new to what it has."""

    def __init__(self, url: str) -> None:
        self._url, self._seen = url, {"version": "", "about": "", "train": 0, "eval": 0, "speed": 0, "samples": 0}
        self.steps = 0

    def ask(self) -> None:
        body = json.dumps({"runs": {"0": self._seen}}).encode()
        request = urllib.request.Request(f"{self._url}update", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            run = json.load(answer)["runs"][0]
        rows = {group: found["from"] + len(found["steps"]) for group, found in run["curves"].items()}
        samples = run["samples"]["from"] + len(run["samples"]["new"])
        self._seen = {"version": run["version"], "about": run["about"]["digest"], "samples": samples, **rows}
        self.steps = run["facts"]["step"]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 300
    while not condition():
        if time.monotonic() > until:
            raise SystemExit(f"{what} did not happen within 300 s")
        time.sleep(0.1)


def turn(seconds: float, metrics: Path, ask: Callable[[], None] | None) -> tuple[int, int, float]:
    """Return the size of the metrics before and after the turn, and its seconds."""
    began, before = time.perf_counter(), metrics.stat().st_size
    while (left := seconds - (time.perf_counter() - began)) > 0:
        if ask is not None:
            ask()
        time.sleep(max(0.0, min(left, PAGE_SECONDS)))
    return before, metrics.stat().st_size, time.perf_counter() - began


def interval(ratios: list[float]) -> tuple[float, float]:
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[250], medians[-251]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="pairs of turns")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the run")
    parser.add_argument("--json", help="write the figures to this file, too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        metrics = run / "metrics.jsonl"
        train = f"train --text_files {TEXT} {SHAPE} --max_steps 10000000 --eval_steps 100000 --output_dir {run}"
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
        with (
            started(
                *train.split(), "--save_steps", "100000", "--report_to", "none", env=environment, **quiet
            ) as trained,
            started("watch", str(run), "--no_open", stdout=subprocess.PIPE) as watch,
        ):
            assert watch.stdout is not None
            page = Page(watch.stdout.readline().split()[2])
            wait_for(
                lambda: trained.poll() is not None or (metrics.is_file() and metrics.stat().st_size > 20_000),
                "the start of the run",
            )
            if trained.poll() is not None:
                raise SystemExit(f"the run ended with {trained.returncode}")
            page.ask()
            figures = measure(asked.rounds, asked.seconds, metrics, watch, page)
    print(json.dumps(figures, indent=1))
    if asked.json:
        Path(asked.json).write_text(json.dumps(figures, indent=1) + "\n")


def measure(
    rounds: int, seconds: float, metrics: Path, watch: subprocess.Popen[str], page: Page
) -> dict[str, float | list[float]]:
    turns: dict[bool, list[tuple[int, int, float]]] = {True: [], False: []}
    process = psutil.Process(watch.pid)
    used = 0.0
    for number in range(rounds):
        for on in (True, False) if number % 2 == 0 else (False, True):
            watch.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
            before = sum(process.cpu_times()[:2])
            turns[on].append(turn(seconds, metrics, page.ask if on else None))
            used += (sum(process.cpu_times()[:2]) - before) * on
    written = metrics.read_bytes()
    speeds = {
        on: [written.count(b'"kind": "train"', first, end) / taken for first, end, taken in found]
        for on, found in turns.items()
    }
    ratios = [watched / alone for watched, alone in zip(speeds[True], speeds[False], strict=True)]
    return {
        "steps per second, not watched": statistics.median(speeds[False]),
        "steps per second, watched": statistics.median(speeds[True]),
        "ratio": statistics.median(ratios),
        "95% interval of the ratio": list(interval(ratios)),
        "CPU time of the watching program, % of the time": 100 * used / sum(taken for *_, taken in turns[True]),
        "steps of the run": page.steps,
    }


if __name__ == "__main__":
    main()
