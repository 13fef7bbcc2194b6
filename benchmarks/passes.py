"""What dropout, weight decay and an average of the weights bring when a text is read many times.

`python benchmarks/passes.py tinyshakespeare.txt` trains 4 layers of 128, or `--shape 2 64`, on a tenth of
tinyshakespeare by bytes, or on all of it, with the recipe `fast` and each of the changes below. It prints the loss on
all held-out text after the last step, or with `--best` of the checkpoint of the best evaluation, as a plan publishes
it, and the lowest loss of all evaluations. Runs are kept in the file `--results`; those in it are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import measure
import scaling
import studies
import torch
from recipes import FAST

# Options of the model and of the optimizer in each run, by name.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropout 0.2": ({"dropout": 0.2}, {}),
    "dropout 0.2, also of attention": ({"dropout": 0.2, "attn_pdrop": 0.2}, {}),
    "dropout 0.1": ({"dropout": 0.1}, {}),
    "dropout 0.3": ({"dropout": 0.3}, {}),
    "no dropout": ({}, {}),
    "no dropout, weight decay 0.3": ({}, {"weight_decay": 0.3}),
    "no dropout, weight decay 1": ({}, {"weight_decay": 1.0}),
    "dropout 0.1, weight decay 1": ({"dropout": 0.1}, {"weight_decay": 1.0}),
    "dropout 0.2, weight decay 1": ({"dropout": 0.2}, {"weight_decay": 1.0}),
}
# Runs with an average of the weights of about the last eighth of the steps, by its name.
OF_AN_AVERAGE = {f"{name}, an average": name for name in ("no dropout, weight decay 1", "dropout 0.1, weight decay 1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies.add_options(parser, results="runs/passes.jsonl")
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 400], help="3.7 and 7.3 passes")
    parser.add_argument("--shape", type=int, nargs=2, default=[4, 128], help="layers and width")
    parser.add_argument("--corpus", choices=["tenth", "tinyshakespeare"], default="tenth")
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *OF_AN_AVERAGE], default=list(RUNS))
    parser.add_argument("--best", action="store_true", help="score the checkpoint of the best evaluation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = studies.Results(options.results)
    work = scaling.work_of(options.corpus, options)
    layers, width = options.shape
    study = "passes, the best checkpoint" if options.best else "passes"
    of_all = {"study": study, "corpus": options.corpus, "shape": options.shape}
    for steps in options.steps:
        for seed in options.seeds:
            for name in options.runs:
                facts = {**of_all, "run": name, "steps": steps, "seed": seed}
                if not results.find(**facts):
                    of_model, of_optimizer = RUNS[OF_AN_AVERAGE.get(name, name)]
                    average = 1 - 8 / steps if name in OF_AN_AVERAGE else None
                    model = scaling.modern(layers, width, work.context, **of_model)
                    optimizer = dataclasses.replace(FAST, **of_optimizer, ema_decay=average)
                    found = studies.trained(work, model, steps, seed, steps // 8, optimizer, best=options.best)
                    results.add(facts, found)
        report(results, steps, of_all)


def report(results: studies.Results, steps: int, of_all: dict[str, Any]) -> None:
    """Print the losses of the runs of so many steps, the best first."""
    found = sorted(results.find(**of_all, steps=steps), key=lambda run: run["loss"])
    rows = [
        [run["run"], run["seed"], f"{run['loss']:.4f}", f"{min(loss for _, loss in run['curve']):.4f}"]
        for run in found
    ]
    print(f"{steps} steps")
    measure.show(rows, ["run", "seed", "loss", "best evaluation"])


if __name__ == "__main__":
    main()
