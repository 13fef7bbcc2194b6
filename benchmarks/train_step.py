"""A training step of the package beside its peers' on the same weights and batches.

`python benchmarks/train_step.py` runs the package's step with its defaults, transformers' GPT-2 and a GPT written by
hand, both as they are and compiled, in turns in one process. It checks first that all of them compute the same losses
over three steps, and prints the median time of a step, tokens/s, the ratio to the package's, and the share of the
machine's matrix ceiling.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import measure
import peers

CHECKED = 3  # steps whose losses are compared
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=7)
    peers.add_work_options(parser)
    parser.add_argument("--only", nargs="+", choices=peers.STEPS, default=list(peers.STEPS))
    options = parser.parse_args()
    work = peers.work_of(options)
    batches = peers.batches_of(work, CHECKED + options.rounds)
    steps = {name: peers.STEPS[name](work) for name in options.only}
    losses = {name: [step(*batch) for batch in batches[:CHECKED]] for name, step in steps.items()}
    check(losses, TOLERANCE[options.precision])
    positions = {name: iter(batches[CHECKED:]) for name in steps}
    taken = measure.interleaved(
        {name: lambda name=name: steps[name](*next(positions[name])) for name in steps},
        options.rounds,
        work.device,
        warm_up=0,
    )
    report(options, work, taken)


def check(losses: dict[str, list[float]], tolerance: float) -> None:
    """End the program where the variants do not do the same work."""
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
    print(
        f"work     {work.layers} layers, {work.width} wide, {parameters / 1e6:.1f}M parameters, {work.batch} x "
        f"{work.context} tokens, {work.vocabulary:,} in the vocabulary, {options.precision}"
    )
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
