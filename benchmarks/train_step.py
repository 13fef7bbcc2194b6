"""A training step of the package beside its peers' on the same weights and batches.

`python benchmarks/train_step.py` runs the package's step with its defaults, transformers' GPT-2 and a GPT written by
hand, both as they are and compiled, each in a process of its own, of which one at a time computes a step, in turns. It
checks first that all of them compute the same losses over three steps, and prints the median time of a step, tokens/s,
the ratio to the package's, and the share of the machine's matrix ceiling.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure
import peers

from gpt_kit_hf.memory_reuse import reuse_freed_memory

CHECKED = 3  # steps whose losses are compared
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=7)
    peers.add_work_options(parser)
    parser.add_argument("--only", nargs="+", choices=peers.STEPS, default=list(peers.STEPS))
    parser.add_argument("--worker", choices=peers.STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work_in_turns(options)
        return
    with ExitStack() as stack:
        turns = {name: Turns(name, stack) for name in options.only}
        check({name: [turn.take()[0] for _ in range(CHECKED)] for name, turn in turns.items()}, options.precision)
        rounds = [{name: turn.take()[1] for name, turn in turns.items()} for _ in range(options.rounds)]
    report(options, peers.work_of(options), {name: [r[name] for r in rounds] for name in options.only})


def work_in_turns(options: argparse.Namespace) -> None:
    """Compute a step for each line of the input, and print its loss and its seconds."""
    work = peers.work_of(options)
    if options.worker.startswith("gpt_kit_hf") and work.device == "cpu":
        reuse_freed_memory()  # as `gpt-kit train` does
    step = peers.STEPS[options.worker](work)
    for batch, _ in zip(peers.batches_of(work, CHECKED + options.rounds), sys.stdin, strict=False):
        measure.synchronise(work.device)
        began = time.perf_counter()
        loss = step(*batch)
        measure.synchronise(work.device)
        print(f"TURN {loss!r} {time.perf_counter() - began!r}", flush=True)


class Turns:
    """A process that takes a step when it is told to."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--worker", name]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.name, self.process = name, stack.enter_context(process)
        stack.callback(process.terminate)

    def take(self) -> tuple[float, float]:
        """Return the loss of the next step, and its seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("TURN "):
                loss, seconds = map(float, line.split()[1:])
                return loss, seconds
        raise SystemExit(f"{self.name} ended: run it alone by --only {self.name!r} --worker {self.name!r}")


def check(losses: dict[str, list[float]], precision: str) -> None:
    """End the program where the variants do not do the same work."""
    tolerance = TOLERANCE[precision]
    first, expected = next(iter(losses.items()))
    for name, values in losses.items():
        for step, (one, other) in enumerate(zip(values, expected, strict=True)):
            if abs(one - other) > tolerance * other:
                raise SystemExit(f"step {step + 1} of {name} has loss {one}, of {first} {other}: not the same work")
    print("losses   " + ", ".join(f"{loss:.4f}" for loss in expected) + ": the same for all")


def report(options: argparse.Namespace, work: peers.Work, taken: dict[str, list[float]]) -> None:
    ceiling = measure.matrix_ceiling(work.device, work.dtype)
    parameters = sum(p.numel() for p in peers.our_model(work).parameters())
    print(f"machine  {measure.machine(work.device)}; {measure.versions('torch', 'transformers')}")
    print(f"work     {parameters / 1e6:.1f}M parameters, {work}")
    print(f"ceiling  {ceiling / 1e9:,.0f} GFLOP/s in a large {options.precision} matrix product")
    ours = taken[options.only[0]]
    rows, figures = [], {}
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        rate, ratio = work.flop(parameters) / middle, measure.median_ratio(seconds, ours)
        rows.append([name, f"{middle:.3f} s", f"{work.tokens / middle:,.0f}", f"{ratio:.2f}", f"{rate / ceiling:.0%}"])
        figures[name] = {"seconds": seconds, "tokens_per_second": work.tokens / middle, "ratio": ratio}
    measure.show(rows, ["step of", "median", "tokens/s", "time to ours", "of the ceiling"])
    kept: dict[str, Any] = {"options": vars(options), "ceiling_flops": ceiling, "steps": figures}
    measure.keep(options.json, kept)


if __name__ == "__main__":
    main()
