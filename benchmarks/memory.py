"""The peak memory of a training step of the package beside its peers', each in a process of its own.

`python benchmarks/memory.py` takes three steps of each on the same weights and batches, and prints the most memory
that the process held beyond what it held before the model was made, on a CPU its resident memory, on a GPU torch's
allocations. What weights, gradients and AdamW's two means need is the same for all: 16 bytes a weight.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from typing import Any

import measure
import peers
import psutil
import torch

from gpt_kit_hf.training.runtime.memory import reuse_freed_memory

COMPARED = ["gpt_kit_hf", "transformers GPT-2", "transformers GPT-2, compiled", "by hand", "by hand, compiled"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=3)
    peers.add_work_options(parser)
    parser.add_argument("--only", nargs="+", choices=peers.STEPS, default=COMPARED)
    parser.add_argument("--measure", choices=peers.STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options)))
        return
    found = {name: measure.in_a_process("--measure", name) for name in options.only}
    report(options, found)


def measured(options: argparse.Namespace) -> dict[str, float]:
    work = peers.work_of(options)
    warm_up()
    if options.measure.startswith("gpt_kit_hf") and work.device == "cpu":
        reuse_freed_memory()  # as `gpt-kit train` does
    before = psutil.Process().memory_info().rss
    step = peers.STEPS[options.measure](work)
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses = [step(*batch) for batch in peers.batches_of(work, options.rounds)]
    if work.device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated(), "loss": losses[-1]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak": peak - before, "loss": losses[-1]}


def warm_up() -> None:
    """Load the libraries that a step loads, so that they count for nobody."""
    tiny = peers.Work(
        layers=1, width=8, heads=1, context=4, batch=1, vocabulary=16, dtype=torch.float32, device="cpu"
    )  # fmt: skip
    peers.STEPS["gpt_kit_hf"](tiny)(*peers.batches_of(tiny, 1)[0])


def report(options: argparse.Namespace, found: dict[str, dict[str, float]]) -> None:
    work = peers.work_of(options)
    parameters = sum(p.numel() for p in peers.our_model(work).parameters())
    ours = found[options.only[0]]
    for name, figures in found.items():
        if abs(figures["loss"] - ours["loss"]) > 2e-2 * ours["loss"]:
            raise SystemExit(f"{name} has loss {figures['loss']}, not {ours['loss']}: not the same work")
    print(f"machine  {measure.machine(work.device)}; {measure.versions('torch', 'transformers')}")
    print(f"work     {parameters / 1e6:.1f}M parameters, {work}")
    print(f"needed   {parameters * 16 / 1e6:,.0f} MB of weights, gradients and AdamW's means")
    rows = [
        [name, f"{figures['peak'] / 1e6:,.0f} MB", f"{ours['peak'] / figures['peak']:.2f}"]
        for name, figures in found.items()
    ]
    measure.show(rows, ["step of", "peak", "ours to it"])
    kept: dict[str, Any] = {"options": vars(options), "peaks": found}
    measure.keep(options.json, kept)


if __name__ == "__main__":
    main()
