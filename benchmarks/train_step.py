"""A training step of the package beside its peers' on the same weights and batches.

`python benchmarks/train_step.py` runs the package's step with its defaults beside transformers' GPT-2 and a GPT by
hand, as they are and compiled: one after the other, two processes that compute a step in turns. It checks first that
both compute the same losses over three steps, and prints the median time of a step, tokens/s, the ratio to ours in the
same turns, and the share of the machine's matrix ceiling.
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

from gpt_kit_hf.training.runtime.memory import reuse_freed_memory

OURS = next(iter(peers.STEPS))
CHECKED = 3  # steps whose losses are compared
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=7)
    peers.add_work_options(parser)
    parser.add_argument("--only", nargs="+", choices=peers.STEPS, default=list(peers.STEPS), help="beside the package")
    parser.add_argument("--worker", choices=peers.STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work_in_turns(options)
        return
    report(
        options, peers.work_of(options), {name: beside_ours(name, options) for name in options.only if name != OURS}
    )


def beside_ours(name: str, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the seconds of our step and of another, of each round: two processes in turns, and no third.

    With more of them at once each finds its freed pages gone, and those that free much are slowed most.
    """
    with ExitStack() as stack:
        turns = {each: Turns(each, stack) for each in (OURS, name)}
        check({each: [turn.take()[0] for _ in range(CHECKED)] for each, turn in turns.items()}, options.precision)
        return [(turns[OURS].take()[1], turns[name].take()[1]) for _ in range(options.rounds)]


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
    print("losses   " + ", ".join(f"{loss:.4f}" for loss in expected) + f": the same for {' and '.join(losses)}")


def report(options: argparse.Namespace, work: peers.Work, taken: dict[str, list[tuple[float, float]]]) -> None:
    ceiling = measure.matrix_ceiling(work.device, work.dtype)
    parameters = sum(p.numel() for p in peers.our_model(work).parameters())
    print(f"machine  {measure.machine(work.device)}; {measure.versions('torch', 'transformers')}")
    print(f"work     {parameters / 1e6:.1f}M parameters, {work}")
    print(f"ceiling  {ceiling / 1e9:,.0f} GFLOP/s in a large {options.precision} matrix product")
    seconds = {OURS: [ours for pairs in taken.values() for ours, _ in pairs]}
    ratios = {OURS: 1.0}
    for name, pairs in taken.items():
        seconds[name] = [other for _, other in pairs]
        ratios[name] = measure.median_ratio(seconds[name], [ours for ours, _ in pairs])
    rows, figures = [], {}
    for name, each in seconds.items():
        middle = statistics.median(each)
        share = work.flop(parameters) / middle / ceiling
        rows.append([name, f"{middle:.3f} s", f"{work.tokens / middle:,.0f}", f"{ratios[name]:.2f}", f"{share:.0%}"])
        figures[name] = {"seconds": each, "tokens_per_second": work.tokens / middle, "ratio": ratios[name]}
    measure.show(rows, ["step of", "median", "tokens/s", "time to ours beside it", "of the ceiling"])
    kept: dict[str, Any] = {"options": vars(options), "ceiling_flops": ceiling, "steps": figures}
    measure.keep(options.json, kept)


if __name__ == "__main__":
    main()
