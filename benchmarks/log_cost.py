"""What watching a run costs: the live view, the JSON lines, metrics.jsonl and the trackers beside a training step.

`python benchmarks/log_cost.py` trains a small model in one process. After each step it does what the loop does to tell
of it, on a pseudo-terminal that another process reads, and measures that time by part. Blocks of steps with all of it
and with none of it take turns, so that what happens in other threads is seen, too.
"""

from __future__ import annotations

import argparse
import os
import pty
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import measure
import torch

from gpt_kit_hf import AMPTrainer, GPTModel, OptimizerOptions, TrainingOptions, create_model_config, create_optimizer
from gpt_kit_hf.storage.atomic_files import append_jsonl
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.log.live import LiveView, Progress
from gpt_kit_hf.training.log.pace import Pace
from gpt_kit_hf.training.log.trackers import Trackers

VOCABULARY = 512
BLOCK = 10  # steps with, then as many without


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-xs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--logging_steps", type=int, default=TrainingOptions.logging_steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="a file of figures to add to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRACKIO_DIR"] = f"{folder}/trackio"
        os.environ["TERM"] = "xterm-256color"
        figures = run(options, Path(folder))
    print(measure.machine(options.device))
    step = figures["step"]
    rows = [(name, f"{1e6 * seconds:.0f}", f"{seconds / step:.2%}") for name, seconds in figures["parts"].items()]
    print(f"a step takes {1000 * step:.1f} ms: {options.model}, {options.batch} x {options.context} tokens\n")
    measure.show(rows, ["part", "microseconds a step", "of a step"])
    print(f"\nsteps with all of it beside steps with none, in turns: {figures['ratio']:.3f}")
    measure.keep(options.out, {"options": vars(options), **figures})


def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return seconds of a step, those of each part per step, and the ratio of steps with and without all parts."""
    step, device = step_of(options), torch.device(options.device)
    stream = terminal()
    training = TrainingOptions(output_dir=str(folder / "run"), report_to=["tensorboard", "trackio"])
    (folder / "run").mkdir()
    trackers, pace = Trackers(training, lambda line: None, main=True), Pace()
    trackers.start("benchmark", {"seed": 0}, 0)
    console, json_lines = Console(stream), Console((folder / "lines").open("w"), "json")
    console.show(LiveView(Progress(step=0, steps=options.steps, save_steps=100), pace, device))
    spent: dict[str, float] = defaultdict(float)
    taken: dict[bool, list[float]] = {True: [], False: []}
    began = time.perf_counter()
    for number in range(1, options.steps + 1):
        told = (number - 1) // BLOCK % 2 == 0
        loss = step()
        after = time.perf_counter()
        pace.add(after - began, options.batch * options.context)
        if told:
            tell(number, loss, options, console, json_lines, trackers, pace, folder / "metrics.jsonl", spent)
        now = time.perf_counter()
        taken[told].append(now - began)
        began = now
    console.close()
    trackers.close()
    told_steps = len(taken[True])
    first = BLOCK  # allocates
    blocks = [
        [statistics.median(taken[told][i : i + BLOCK]) for i in range(first, len(taken[told]), BLOCK)]
        for told in (True, False)
    ]
    return {
        "step": statistics.median(taken[False][first:]),
        "parts": {name: seconds / told_steps for name, seconds in spent.items()},
        "ratio": measure.median_ratio(*blocks),
    }


def tell(
    number: int,
    loss: float,
    options: argparse.Namespace,
    console: Console,
    json_lines: Console,
    trackers: Trackers,
    pace: Pace,
    metrics: Path,
    spent: dict[str, float],
) -> None:
    """Do what the loop does after a step, and add the seconds of each part."""

    def timed(part: str, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        spent[part] += time.perf_counter() - began

    line = {"kind": "train", "step": number, "loss": loss, "grad_norm": 1.0, "trained_tokens": 512, "batch": "0" * 32}
    timed("metrics.jsonl, a line a step", lambda: append_jsonl(metrics, line))
    timed("the live view", lambda: console.advance(number, loss))
    if number_told(number) % options.logging_steps == 0:
        speed = asdict(pace.measure(torch.device(options.device)))
        values = {"loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, **speed}
        timed("JSON lines", lambda: json_lines.step(number, options.steps, 9.0, **values))
        timed("trackers: TensorBoard and trackio", lambda: trackers.log("train", number, values))


def number_told(number: int) -> int:
    """Return how many steps up to this one were told of: every other block."""
    blocks, rest = divmod(number, 2 * BLOCK)
    return blocks * BLOCK + min(rest, BLOCK)


def step_of(options: argparse.Namespace) -> Callable[[], float]:
    config = create_model_config(options.model, vocab_size=VOCABULARY, max_position_embeddings=options.context)
    model = GPTModel(config).to(options.device)
    trainer = AMPTrainer(model, create_optimizer(model, OptimizerOptions()), mixed_precision="fp32")
    rows = torch.randint(VOCABULARY, (options.batch, options.context + 1))
    return lambda: trainer.train_step(rows[:, :-1], rows[:, 1:]).loss


def terminal() -> TextIO:
    """Return a pseudo-terminal's end for a program; a process of its own reads the other end."""
    reader, writer = pty.openpty()
    subprocess.Popen(
        ["cat"], stdin=reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # ends with this process
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


if __name__ == "__main__":
    main()
